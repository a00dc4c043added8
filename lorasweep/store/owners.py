"""Record which process works on a run, and tell whether it is still alive.

For a process on this machine, boot id, process id and start time decide. For a job on another
machine, the scheduler decides. For any other process, its heartbeat decides: the process is alive
if the heartbeat changes while we watch. Clocks of two machines are never compared.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from lorasweep.store import files

HEARTBEAT_S = 15.0
"""Seconds between heartbeats of a working process."""
SILENCE_S = 90.0
"""Seconds without a new heartbeat after which an owner on another machine counts as dead. Longer
than the 60 s for which NFS clients usually cache attributes."""
UNKNOWN = "unknown"
JOB_VARIABLE = "LORASWEEP_JOB"
"""Environment variable that is set in submitted jobs, which end with their process. An interactive
job may outlive its command. So if that job runs, the command may nevertheless be dead."""


RunningJobs = Callable[[str, str, int, float], bool | None]
"""Says whether a job (cluster, id, number of restarts) of a scheduler is running; None if that is
unknown. The last argument: a time.monotonic() when it had begun (slurm/queue.RunningJobs)."""


def host() -> str:
    """Return this machine's name; LORASWEEP_HOST distinguishes machines with the same name."""
    return os.environ.get("LORASWEEP_HOST") or socket.gethostname()


@cache
def machine() -> dict[str, str]:
    """Return the id of this boot and of this namespace of process ids; empty where hidden."""
    found = {"boot": "", "space": ""}
    with suppress(OSError):
        found["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with suppress(OSError):
        found["space"] = os.readlink("/proc/self/ns/pid")
    return found


def start_time(pid: int) -> str:
    """Return the start time of a process in clock ticks since boot; empty if it has ended.

    UNKNOWN if the system hides it, as many login nodes do with other users' processes.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return ""
        except PermissionError:
            pass
        return UNKNOWN
    return "" if fields[0] in ("Z", "X") else fields[19]


def this_process() -> dict[str, Any]:
    """Return the owner record of this process."""
    pid = os.getpid()
    owner: dict[str, Any] = {"host": host(), **machine(), "pid": pid, "started": start_time(pid)}
    job = os.environ.get("SLURM_JOB_ID")
    if job and os.environ.get(JOB_VARIABLE):
        owner["slurm"] = {
            "cluster": os.environ.get("SLURM_CLUSTER_NAME", ""),
            "job": job,
            "restart": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        }
    return owner


def read_owner(attempt: Path) -> dict[str, Any]:
    """Return the owner of an attempt; empty if missing or damaged. Raises OSError otherwise."""
    try:
        return json.loads((attempt / "owner.json").read_bytes())
    except (*files.NOT_THERE, ValueError):
        return {}


def restarted(owner: dict[str, Any]) -> bool:
    """Return whether this process is in a later execution of the owner's Slurm job."""
    mine, before = this_process().get("slurm"), owner.get("slurm")
    if not (mine and before):
        return False
    return {**mine, "restart": 0} == {**before, "restart": 0} and mine["restart"] > before[
        "restart"
    ]


class Liveness:
    """Tells whether owners (processes with a claim) are alive. Keeps heartbeats between calls."""

    def __init__(self, jobs: RunningJobs | None = None) -> None:
        """Let `jobs` decide about owners that are jobs; if None, heartbeats decide about them."""
        self._jobs = jobs
        self._seen: dict[Path, tuple[bytes, float, bool]] = {}
        """Attempt -> last heartbeat, time when it was first seen, whether a change was seen."""
        self._known: dict[Path, float] = {}
        """Attempt -> a time when it had begun, so that one later query serves all attempts."""

    def prepare(self, attempts: Iterable[Path]) -> None:
        """Note which attempts have begun, before the scheduler is asked about them."""
        self._known = {**dict.fromkeys(attempts, time.monotonic()), **self._known}

    def verdict(self, attempt: Path) -> bool | None:
        """Return whether the owner is alive; None if neither machine nor scheduler can tell."""
        try:
            owner = read_owner(attempt)
        except OSError:
            return None
        if not owner:
            return False  # damaged: attempt and owner.json are created in one step
        if all(owner.get(k, v) == v for k, v in {"host": host(), **machine()}.items()):
            started = start_time(owner["pid"])
            if not started or UNKNOWN not in (started, owner["started"]):
                return started == owner["started"] != ""
        if restarted(owner):
            return False
        self.prepare([attempt])
        if (job := owner.get("slurm")) and self._jobs:
            return self._jobs(job["cluster"], job["job"], job["restart"], self._known[attempt])
        return None

    def alive(self, attempt: Path) -> bool:
        """Return whether the owner is alive; if `verdict` is None, whether its heartbeat is recent.

        Recent: the heartbeat has changed, or was first seen, in the last SILENCE_S.
        """
        if (verdict := self.verdict(attempt)) is not None:
            return verdict
        now, silent = time.monotonic(), False
        before, since, moved = self._seen.get(attempt, (None, now, False))
        try:
            beat = (attempt / "heartbeat").read_bytes()
            silent = beat == before
            moved = moved or (before is not None and not silent)
        except files.NOT_THERE:
            beat, silent = b"", before == b""
        except OSError:  # a failed read does not mean that the owner is silent
            if before is None:
                return True
            beat = before
        since = since if silent else now
        self._seen[attempt] = (beat, since, moved)
        return now - since < SILENCE_S

    def sure(self, attempt: Path) -> bool:
        """Return whether `alive` is certain: there is a verdict, or the heartbeat has changed."""
        return self.verdict(attempt) is not None or self._seen.get(attempt, (b"", 0.0, False))[2]


class Heartbeat:
    """A thread that writes a new number into each claimed folder while this process lives."""

    def __init__(self, folders: Callable[[], Iterable[Path]]) -> None:
        """Start the thread. `folders` returns the folders of the claims, which may change."""
        self._done = threading.Event()

        def work() -> None:
            beat = 0
            while not self._done.wait(HEARTBEAT_S if beat else 0):
                beat += 1
                for folder in folders():
                    with suppress(OSError):  # training gets the same error and reports it
                        (folder / "heartbeat").write_text(str(beat))

        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop, and wait for the thread."""
        self._done.set()
        self._thread.join()
