"""Signals, memory and environment of a worker process."""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from lorasweep.store import claims

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
WAIT_POLICY = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Makes waiting OpenMP threads sleep. By default they spin: two training processes on two busy
cores are then 100 times slower (docs/log)."""


class Stopped(Exception):
    """A signal requested a clean stop; checkpoints are written."""


class StopFlag:
    """Flag to finish the update, checkpoint and exit.

    SIGINT, SIGTERM, SIGHUP (the terminal was closed) and Slurm's SIGUSR2 set it.
    """

    SAME_S = 2.0
    """Seconds in which signals count as one. Ctrl-C reaches a worker directly and from its parent.
    """

    def __init__(self) -> None:
        self.set = False
        self._since = 0.0

    def install(self) -> None:
        """Handle these signals. A second signal, later than SAME_S, ends the process at once."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP):
            if number != signal.SIGHUP or not hangups_ignored():
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # inside a job, only Ctrl-C ends the process at once: Slurm itself kills it if needed
        impatient = number == signal.SIGINT or claims.JOB_VARIABLE not in os.environ
        if self.set and impatient and time.monotonic() - self._since > self.SAME_S:
            os._exit(128 + number)
        if not self.set:
            self.set, self._since = True, time.monotonic()


def hangups_ignored() -> bool:
    """Return whether this process outlives its terminal, as under nohup."""
    return signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


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
