"""Measure the cases of a part in a process of their own, and keep each result in a file.

The process reads its job from stdin, and prints the name of each case that it has measured:

    {"cases": [{"name", "measure", "spec", "n_runs", "options", "predicted"}, ...],
     "folder": FOLDER, "part_s": SECONDS}
"""

import importlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lorasweep.check.cases import Case
from lorasweep.launch.process import die_with_parent, keep_freed_memory, worker_environment
from lorasweep.methods.registry import spec_from
from lorasweep.store import files

PART_S = 540.0
"""Seconds after which a part begins no case. The next command measures the cases that are left."""
LAST_S = 60.0
"""Seconds that the last case of a part may go on beyond PART_S."""
Report = Callable[[Case, dict[str, Any]], None]


def path_of(folder: Path, case: Case) -> Path:
    """Return the file of a case's result."""
    name = re.sub(r"[^a-z0-9.]+", "_", f"{case.part} {case.name}".lower())
    return folder / "cases" / f"{name}.json"


def result_of(folder: Path, case: Case) -> dict[str, Any] | None:
    """Return the kept result of a case: its measures, {"misfit": why} or {"failed": cause}."""
    return files.read_json(path_of(folder, case))


def keep(folder: Path, case: Case, result: dict[str, Any]) -> dict[str, Any]:
    """Keep and return the result of a case."""
    path = path_of(folder, case)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomic(path, json.dumps(result).encode())
    return result


def measure(
    cases: Sequence[Case],
    folder: Path,
    threads: int,
    predicted: Mapping[str, Any],
    report: Report,
    part_s: float = PART_S,
) -> None:
    """Measure the cases of a part that have no result, or that failed; report each result.

    If the process dies, the case that it was measuring has failed, and a new one goes on.
    """
    until, left = time.monotonic() + part_s, []
    for case in cases:
        found = result_of(folder, case)
        if why := predicted.get(case.name, {}).get("misfit"):
            report(case, keep(folder, case, {"misfit": why}))
        elif found is None or "failed" in found:
            path_of(folder, case).unlink(missing_ok=True)
            left.append(case)
    while left and time.monotonic() < until:
        error = _run(left, folder, threads, predicted, report, until)
        left = [case for case in left if result_of(folder, case) is None]
        if not error:
            break  # the time of the part is over
        if left:
            report(left[0], keep(folder, left[0], {"failed": error}))
            left = left[1:]


def _run(
    cases: Sequence[Case],
    folder: Path,
    threads: int,
    predicted: Mapping[str, Any],
    report: Report,
    until: float,
) -> str:
    """Measure cases in a process; return why it died, empty if it ended by itself."""
    left_s = max(0.0, until - time.monotonic())
    job: dict[str, Any] = {"folder": str(folder), "part_s": left_s, "cases": []}
    for c in cases:
        values = {name: getattr(c, name) for name in ("part", "name", "measure", "n_runs")}
        more = {"options": c.options, "predicted": predicted.get(c.name)}
        job["cases"].append({**values, **more, "spec": c.spec.plain() if c.spec else None})
    folder.mkdir(parents=True, exist_ok=True)
    by_name = {c.name: c for c in cases}
    with (folder / "log.txt").open("a+") as log:
        begin = log.seek(0, os.SEEK_END)
        child = subprocess.Popen(
            [sys.executable, "-m", "lorasweep.check.process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=worker_environment(threads),
        )
        timer = threading.Timer(left_s + LAST_S, child.kill)
        timer.start()
        assert child.stdin and child.stdout
        try:
            with suppress(BrokenPipeError):  # it died while it started: its status says so
                child.stdin.write(json.dumps(job))
                child.stdin.close()
            for line in child.stdout:
                case = by_name[line.strip()]
                report(case, result_of(folder, case) or {})
            child.wait()
        finally:
            timer.cancel()
            child.kill()
        if not child.returncode:
            return ""
        log.seek(begin)
        said = [line for line in log.read().splitlines() if line.strip()]
    if time.monotonic() >= until + LAST_S:
        return f"it took more than {LAST_S:.0f} s beyond the time of its part"
    return said[-1] if said and child.returncode > 0 else f"signal {-child.returncode}"


def main() -> None:
    """Measure the cases of the job in stdin."""
    die_with_parent()
    keep_freed_memory()
    job = json.load(sys.stdin)
    folder, started, longest = Path(job["folder"]), time.monotonic(), 0.0
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes into the log
    kept: dict[str, Any] = {}  # the base of a case may serve for the next one
    for values in job["cases"]:
        begun = time.monotonic()
        if begun - started + longest > job["part_s"]:
            break
        module, _, function = values["measure"].partition(":")
        arguments = dict(values["options"])
        if values["spec"]:
            arguments["spec"] = spec_from(values["spec"])
        if values["predicted"]:
            arguments |= {"kept": kept, "n_runs": values["n_runs"]}
            arguments["predicted"] = values["predicted"]
        measured = getattr(importlib.import_module(f"lorasweep.check.{module}"), function)
        result = measured(**arguments)
        longest = max(longest, time.monotonic() - begun)
        case = Case(values["part"], values["name"], values["measure"])
        keep(folder, case, {**result, "seconds": round(time.monotonic() - begun, 1)})
        print(values["name"], file=out, flush=True)


if __name__ == "__main__":
    main()
