"""Time commands, time functions in turns, and write files of figures and pages."""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from analysis.report.text import rendered
from lorasweep.config.compose import compose_request
from lorasweep.plan import detect
from lorasweep.spec.execution import Exec
from lorasweep.store import files
from lorasweep.tracking import provenance

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "analysis" / "results"
FIGURES = RESULTS / "bench"
"""Folder of the files of figures and of their pages."""
Log = Callable[[str], None]
Figures = dict[str, Any]


def measure_parts(
    name: str,
    parts: Mapping[str, Callable[[Log], Any]],
    arguments: Sequence[str],
    record: Callable[[Figures, str, Any], None],
) -> None:
    """Measure parts one after another, and write the file `name` of figures after each.

    Args:
        arguments: `--out FILE`, and the parts to measure (default: all). The other parts' figures
            stay in the file.
        record: puts the figures of a part into the content of the file.
    """
    wanted, path = list(arguments), FIGURES / name
    if "--out" in wanted:
        at = wanted.index("--out")
        path = Path(wanted[at + 1])
        del wanted[at : at + 2]
    unknown = [w for w in wanted if w.partition(":")[0] not in parts]
    if unknown:
        sys.exit(f"no part {', '.join(unknown)}. Allowed: {', '.join(parts)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.loads(path.read_text()) if path.is_file() and wanted else {}
    started = time.perf_counter()

    def log(text: str) -> None:
        print(f"[{time.perf_counter() - started:5.0f} s] {text}", flush=True)

    for part in wanted or parts:
        key, _, size = part.partition(":")
        measured = parts[key](log) if not size else parts[key](log, int(size))  # type: ignore[call-arg]
        record(content, key, measured)
        files.write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())


def machine(*packages: str) -> Figures:
    """Describe this machine and the versions of some packages."""
    versions = {name: metadata.version(name) for name in packages}
    return {"processor": provenance.processor(), "cores": detect.cores(), "packages": versions}


def exec_values() -> dict[str, Any]:
    """Return the fields of an Exec with absolute paths, because baselines run in other folders."""
    exec_ = compose_request(["scale=tiny"]).exec
    absolute = {
        k: [str(Path(d).resolve()) for d in getattr(exec_, k)] for k in ("models_dir", "data_dir")
    }
    return {**vars(Exec()), **absolute}


def in_turns(turns: int, timed: Sequence[Callable[[], float]]) -> list[list[float]]:
    """Call functions in turns, because speed drifts; leave out the values of the first turn."""
    values = [[one() for one in timed] for _ in range(turns + 1)][1:]
    return [list(column) for column in zip(*values)]


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
