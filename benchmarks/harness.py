"""Time commands and baselines, write files of figures, and render pages from them."""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

from analysis.report.text import rendered, text_hash
from lorasweep.config.compose import compose_request
from lorasweep.plan import detect
from lorasweep.spec.execution import Exec
from lorasweep.store import files

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "analysis" / "results"
BENCH = RESULTS / "bench"
Log = Callable[[str], None]
Figures = dict[str, Any]


@dataclass(frozen=True)
class Page:
    """A page that is rendered from a file of figures in the same folder."""

    figures: Path
    name: str
    render: Callable[[Figures], str]
    draw: Callable[[Figures, str], None] = lambda figures, inputs: None
    """Writes the plots, given the figures and the hash of their file."""

    def write(self) -> None:
        """Write the page and its plots."""
        text = self.figures.read_text()
        content = json.loads(text)
        (self.figures.parent / self.name).write_text(self.render(content))
        self.draw(content, text_hash(text))


def measure(
    page: Page, parts: Mapping[str, Callable[..., Any]], arguments: Sequence[str], *packages: str
) -> None:
    """Measure parts one after another; write the file of figures after each, and at last the page.

    Args:
        parts: name -> function of a log (and a size), which returns the part's figures.
        arguments: `--out FILE` (then no page is written), and the parts to measure, as NAME or
            NAME:SIZE (default: all). The other parts' figures stay in the file.
        packages: packages whose versions are recorded.
    """
    wanted, path = list(arguments), page.figures
    if "--out" in wanted:
        at = wanted.index("--out")
        _, path = wanted.pop(at), Path(wanted.pop(at))
    unknown = [w for w in wanted if w.partition(":")[0] not in parts]
    if unknown:
        sys.exit(f"no part {', '.join(unknown)}. Allowed: {', '.join(parts)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.loads(path.read_text()) if path.is_file() and wanted else {}
    started, here = time.perf_counter(), detect.this_machine()

    def log(text: str) -> None:
        print(f"[{time.perf_counter() - started:5.0f} s] {text}", flush=True)

    for part in wanted or parts:
        key, _, size = part.partition(":")
        content[key] = parts[key](log, *([int(size)] if size else []))
        content["machine"] = {
            "processor": here.processor,
            "cores": here.cores,
            "gpus": [here.gpu_name] * here.gpus,
            "python": sys.version.split()[0],
            "packages": {name: metadata.version(name) for name in packages},
        }
        content.setdefault("measured_on", {})[key] = f"{here.processor}, {date.today()}"
        files.write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())
    if path == page.figures:
        page.write()


def exec_values() -> dict[str, Any]:
    """Return the fields of an Exec with absolute paths, because baselines run in other folders."""
    exec_ = compose_request(["scale=tiny"]).exec
    absolute = {
        k: [str(Path(d).resolve()) for d in getattr(exec_, k)] for k in ("models_dir", "data_dir")
    }
    return {**vars(Exec()), **absolute}


def command(*arguments: str, runs_dir: Path, most_status: int = 0) -> tuple[float, Any]:
    """Run a command line of lorasweep; return seconds, with process start, and the JSON.

    Args:
        most_status: exit statuses up to this are no error.
    """
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "lorasweep", *arguments, "format=json"],
        text=True,
        capture_output=True,
        env={**os.environ, "LORASWEEP_RUNS": str(runs_dir)},
    )
    if done.returncode > most_status or not done.stdout:
        raise RuntimeError(f"status {done.returncode}:\n{done.stderr[-2000:]}")
    seconds = time.perf_counter() - started
    try:
        return seconds, json.loads(done.stdout)
    except json.JSONDecodeError:  # messages come before the answer
        return seconds, json.loads(done.stdout.splitlines()[-1])


def baseline(
    kind: str, job: Figures, folder: Path, **variables: str
) -> tuple[float, list[Figures]]:
    """Train a job with benchmarks/trl_baseline.py, in a process in `folder` with all cores.

    Returns the wall seconds of the process, and the row that it printed for each run or customer.

    Args:
        kind: trl or loop.
        variables: more environment variables.
    """
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.trl_baseline", kind, str(path)],
        text=True,
        capture_output=True,
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": str(detect.cores()),
            **variables,
        },
    )
    wall_s = time.perf_counter() - started
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"train_s"')]
    wanted = len(job["jobs"])
    if done.returncode or len(rows) != wanted:
        raise RuntimeError(f"the baseline trained {len(rows)} of {wanted}:\n{done.stderr[-2000:]}")
    return wall_s, rows


def cpu_s() -> float:
    """Return the processor seconds of all child processes of this process that have ended."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def render(name: str, **values: Any) -> str:
    """Render a page from benchmarks/templates/NAME.md."""
    return rendered(f"{name}.md", "benchmarks", **values)


def packages_of(content: Figures) -> str:
    """Name the packages that were measured, with their versions."""
    return ", ".join(f"{k} {v}" for k, v in content["machine"]["packages"].items())
