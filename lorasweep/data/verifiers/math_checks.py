"""Compare mathematical answers in processes that are killed when a check takes too long.

math-verify's time limit is a signal, which works in the main thread only and not inside C calls.
"""

import json
import os
import queue
import select
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path

from lorasweep.errors import DataError

LIMIT_S = 10.0
"""Time limit of a check; the default limits of math-verify are 5 s to read and 5 s to compare."""
START_S = 120.0
"""Time limit for a process to import math-verify, which takes 1 to 3 s."""
MOST_PROCESSES = 8
MOST_KNOWN = 1 << 18
"""Largest number of cached verdicts."""
VERDICTS = {"right": 1.0, "wrong": 0.0, "unread": None}


class MathChecks:
    """A few processes that check answers. They end when the present process ends."""

    def __init__(self, processes: int, limit_s: float = LIMIT_S) -> None:
        """Prepare the processes; each is started when it is first needed."""
        self._threads = ThreadPoolExecutor(processes)
        self._free: queue.LifoQueue[_Worker] = queue.LifoQueue()
        for _ in range(processes):
            self._free.put(_Worker(limit_s))
        self._known: dict[tuple[str, str], float | None] = {}

    def check(self, pairs: Sequence[tuple[str, str]]) -> list[float | None]:
        """Return for each (gold answer, answer) 1, 0, or None if one of them cannot be read.

        None also for a pair that takes too long. Raises DataError if no process starts.
        """

        def checked(pair: tuple[str, str]) -> float | None:
            worker = self._free.get()
            try:
                return VERDICTS.get(worker.answer(json.dumps(pair)))
            finally:
                self._free.put(worker)

        if len(self._known) > MOST_KNOWN:
            self._known.clear()
        new = [p for p in dict.fromkeys(pairs) if p not in self._known]
        self._known.update(zip(new, self._threads.map(checked, new)))
        return [self._known[p] for p in pairs]


@cache
def _checks_of(process: int) -> MathChecks:
    here = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(process)) if here else os.cpu_count() or 1
    return MathChecks(min(MOST_PROCESSES, cores))


def check(pairs: Sequence[tuple[str, str]]) -> list[float | None]:
    """Check pairs with the processes that all data sets of this process share: see `MathChecks`."""
    return _checks_of(os.getpid()).check(pairs)


class _Worker:
    """One process that checks answers. It is started again whenever it has ended."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._process: subprocess.Popen[bytes] | None = None
        self._end: Callable[[], object] = lambda: None

    def answer(self, question: str) -> str:
        """Return the line that answers a question; empty after a timeout or two dead processes."""
        for _ in range(2):  # the system may have ended the process, as when out of memory
            process = self._process or self._start()
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.write(f"{question}\n".encode())
                process.stdin.flush()
            found = _line(process, self._limit_s)
            if found:
                return found
            self._stop()
            if found is None:
                break
        return ""

    def _start(self) -> "subprocess.Popen[bytes]":
        program = str(Path(__file__).with_name("math_worker.py"))
        command = [sys.executable, "-P", program, str(int(2 * self._limit_s) + 1)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
        self._process = process
        self._end = weakref.finalize(self, _kill, process)  # at the latest at exit
        if _line(process, START_S) != "ready":
            self._stop()
            raise DataError(f"no process starts that verifies answers: {' '.join(command)}")
        return process

    def _stop(self) -> None:
        self._process = None
        self._end()


def _line(process: "subprocess.Popen[bytes]", limit_s: float) -> str | None:
    """Return the next line of a process; empty if it has ended, None if none comes in time."""
    # the process writes one short line at a time, so the pipe holds a whole line or none
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], limit_s)
    return process.stdout.readline().decode().strip() if ready else None


def _kill(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.communicate()
