"""Who works on a run: attempts, and whether the process that made one still lives.

Clocks of two machines are never compared. On one machine the boot id, the process id and the process's start
time decide; for another machine, whether its heartbeat's content changes while this one watches.
"""

import json
import os
import socket
import time
from functools import cache
from pathlib import Path
from typing import Any

HEARTBEAT_S = 15.0
"""Seconds between heartbeats of a working process."""
SILENCE_S = 90.0
"""An owner on another machine whose heartbeat stands still this long (by our clock) is dead.
Over 60 s, the longest that NFS clients usually keep attributes."""


@cache
def boot_id() -> str:
    """Identify this boot of this machine (empty where the system does not say)."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def start_time(pid: int) -> str:
    """Return the start time of a process in clock ticks since boot; empty if it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "" if Path("/proc/self").exists() or not _exists(pid) else "unknown"
    return "" if fields[0] in ("Z", "X") else fields[19]


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def me() -> dict[str, Any]:
    """Describe this process as an owner."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "boot": boot_id(), "pid": pid, "started": start_time(pid)}


class Liveness:
    """Judge owners; remembers other machines' heartbeats between calls."""

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[bytes, float]] = {}

    def alive(self, attempt: Path) -> bool:
        """Say whether the owner of an attempt folder lives. Unknown, on another machine, counts as alive."""
        try:
            owner = json.loads((attempt / "owner.json").read_bytes())
        except (OSError, ValueError):
            return False  # an attempt is created with its owner in one step, so this one is damaged
        if owner.get("boot") == boot_id() and owner.get("host") == socket.gethostname():
            return start_time(owner["pid"]) == owner["started"] != ""
        try:
            beat = (attempt / "heartbeat").read_bytes()
        except OSError:
            beat = b""
        now = time.monotonic()
        before, since = self._seen.get(attempt, (None, now))
        if beat != before:
            since = now
        self._seen[attempt] = (beat, since)
        return now - since < SILENCE_S
