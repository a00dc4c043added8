"""What a worker process asks of the system it runs on. Every request may be refused; nothing
depends on it."""

import ctypes
import signal
import sys


def die_with_parent() -> None:
    """Ask the kernel to stop this process when its parent dies, so that no orphan holds claims
    (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def keep_freed_memory() -> None:
    """Ask glibc to keep what is freed: a step frees and takes the same gigabytes again, and each
    page that is given back and taken anew costs a fault (LOG.md: the elementwise passes of a step
    take half the time with this)."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl has none
        return
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**26), (-8, 1)):
        mallopt(option, value)  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD, M_ARENA_MAX
