"""Signals, and what a worker process asks of the system it runs on.

Each request to the system may be refused; nothing depends on it.
"""

import ctypes
import os
import signal
import sys
import time
from types import FrameType

from lorasweep.store import claims


class Stopped(Exception):
    """A signal asked for a clean stop; the checkpoint is written."""


class StopFlag:
    """Set by SIGINT, SIGTERM and Slurm's warning SIGUSR2: finish the update, checkpoint, leave."""

    SAME_S = 2.0
    """Signals this close together count as one: a terminal's Ctrl-C reaches a worker directly and
    by its parent."""

    def __init__(self) -> None:
        self.set = False
        self._since = 0.0

    def install(self) -> None:
        """Take over these signals.

        One that comes later than SAME_S after the first ends the process at once.
        """
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # inside a job Slurm has its own way to end us, so only Ctrl-C counts as impatience there
        impatient = number == signal.SIGINT or claims.JOB_VARIABLE not in os.environ
        if self.set and impatient and time.monotonic() - self._since > self.SAME_S:
            os._exit(128 + number)
        if not self.set:
            self.set, self._since = True, time.monotonic()


def die_with_parent() -> None:
    """Ask Linux to stop this process when its parent dies, so that no orphan holds claims."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def keep_freed_memory() -> None:
    """Ask glibc to keep what is freed.

    A step frees and takes the same gigabytes again, and each page that is given back and taken anew
    costs a fault (LOG.md: the elementwise passes of a step take half the time with this).
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl has none
        return
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**26), (-8, 1)):
        mallopt(option, value)  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD, M_ARENA_MAX
