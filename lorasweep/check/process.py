"""Measure cases in a process of their own, and keep each result in a file.

The process reads a case a line from stdin, {"measure", "options", "spec", "n_runs", "predicted"},
and prints the result of each as a line of JSON. If it dies, that case has failed, and another
process goes on with the next one.
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
from typing import IO, Any

from lorasweep.check.cases import Case
from lorasweep.launch.process import die_with_parent, keep_freed_memory, worker_environment
from lorasweep.methods.registry import spec_from
from lorasweep.store import files

LIMIT_S = 2700.0
"""Seconds after which no case begins. The next command measures the cases that are left."""
LAST_S = 60.0
"""Seconds that the last case may go on beyond LIMIT_S."""
Report = Callable[[Case, dict[str, Any]], None]


def path_of(folder: Path, case: Case) -> Path:
    """Return the file of a case's result: its measures, {"misfit": why} or {"failed": cause}."""
    name = re.sub(r"[^a-z0-9.]+", "_", f"{case.part} {case.name}".lower())
    return folder / "cases" / f"{name}.json"


def measure(
    cases: Sequence[Case],
    folder: Path,
    threads: int,
    predicted: Mapping[str, Any],
    report: Report,
    limit_s: float = LIMIT_S,
) -> None:
    """Measure the cases that have no result, or that failed; keep and report each."""
    until, child = time.monotonic() + limit_s, None
    (folder / "cases").mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("a+") as log:
        try:
            for case in cases:
                path, before = path_of(folder, case), predicted.get(case.name, {})
                known, left_s = files.read_json(path), until - time.monotonic()
                if "misfit" in before:
                    result = {"misfit": before["misfit"]}
                elif (known is not None and "failed" not in known) or left_s <= 0:
                    continue
                else:
                    child = child or _start(log, threads)
                    result = _result_of(case, before, child, left_s + LAST_S, log)
                    if "failed" in result:
                        child = None
                files.write_atomic(path, json.dumps(result).encode())
                report(case, result)
        finally:
            if child is not None:
                child.kill()
                child.wait()


def _start(log: IO[str], threads: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "lorasweep.check.process"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
    return subprocess.Popen(command, text=True, env=worker_environment(threads), **pipes)


def _result_of(
    case: Case, predicted: Any, child: "subprocess.Popen[str]", limit_s: float, log: IO[str]
) -> dict[str, Any]:
    """Let a process measure a case; kill it after `limit_s`."""
    job: dict[str, Any] = {name: getattr(case, name) for name in ("measure", "options", "n_runs")}
    job |= {"spec": case.spec.plain() if case.spec else None, "predicted": predicted}
    begin, started = log.seek(0, os.SEEK_END), time.monotonic()
    timer = threading.Timer(limit_s, child.kill)
    timer.start()
    assert child.stdin and child.stdout
    try:
        with suppress(BrokenPipeError):  # it died: its status says so
            print(json.dumps(job), file=child.stdin, flush=True)
        line = child.stdout.readline()
    finally:
        timer.cancel()
    took_s = time.monotonic() - started
    if line:
        return {**json.loads(line), "seconds": round(took_s, 1)}
    status = child.wait()
    log.seek(begin)
    said = [text for text in log.read().splitlines() if text.strip()]
    if took_s >= limit_s:
        return {"failed": f"it took more than {LAST_S:.0f} s beyond the time of all cases"}
    return {"failed": said[-1] if said and status > 0 else f"signal {-status}"}


def main() -> None:
    """Measure the cases that stdin names."""
    die_with_parent()
    keep_freed_memory()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes into the log
    kept: dict[str, Any] = {}  # the base of a case may serve for the next one
    for job in map(json.loads, sys.stdin):
        module, _, function = job["measure"].partition(":")
        arguments = dict(job["options"])
        if job["spec"]:
            arguments["spec"] = spec_from(job["spec"])
        if job["predicted"]:
            arguments |= {"kept": kept, "n_runs": job["n_runs"], "predicted": job["predicted"]}
        measured = getattr(importlib.import_module(f"lorasweep.check.{module}"), function)
        print(json.dumps(measured(**arguments)), file=out, flush=True)


if __name__ == "__main__":
    main()
