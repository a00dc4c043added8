"""Signals, memory and environment of a worker process."""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from lorasweep.store.owners import JOB_VARIABLE

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
WAIT_POLICY = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Makes waiting OpenMP threads sleep. By default they spin: two training processes on two busy
cores are then 100 times slower (docs/log/2026-11-26.md)."""


class Stopped(Exception):
    """A signal requested a clean stop; checkpoints are written."""


class StopFlag:
    """Flag to finish the update, checkpoint and exit, which signals set.

    A signal later than SAME_S after the first ends the process at once: an update, or loading a
    base, may take long. Inside a job only Ctrl-C does so; Slurm itself kills a job if needed.
    """

    SAME_S = 2.0  # Ctrl-C reaches a worker directly and from its parent

    def __init__(self) -> None:
        self.set, self._since = False, 0.0

    def install(self) -> None:
        """Handle these signals; under nohup a process outlives its terminal."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.set:
            self.set, self._since = True, time.monotonic()
        may_end = number == signal.SIGINT or JOB_VARIABLE not in os.environ
        if may_end and time.monotonic() - self._since > self.SAME_S:
            os._exit(128 + number)


def die_with_parent() -> None:
    """Make Linux stop this process when its parent dies, so that an orphan keeps no claims."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def keep_freed_memory() -> None:
    """Make glibc keep freed memory: fewer page faults halve the time of elementwise operations."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:  # musl does not have it
        return
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**26), (-8, 1)):
        mallopt(option, value)  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD, M_ARENA_MAX


def worker_environment(threads: int) -> dict[str, str]:
    """Return a worker's environment: the path of this code (not the current folder) and threads."""
    root = str(Path(__file__).resolve().parents[2])
    return {
        **WAIT_POLICY,
        **os.environ,
        **dict.fromkeys(THREAD_VARIABLES, str(threads)),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONSAFEPATH": "1",
    }
