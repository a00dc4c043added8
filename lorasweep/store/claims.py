"""Who works on a run: the owner of an attempt, and whether its process still lives.

Clocks of two machines are never compared. On one machine the boot id, the process id and the
process's start time decide. For another machine the scheduler decides, if the owner is a job that
it can tell about; else whether the content of the owner's heartbeat changes while this process
watches.
"""

import json
import os
import socket
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, Protocol

HEARTBEAT_S = 15.0
"""Seconds between heartbeats of a working process."""
SILENCE_S = 90.0
"""An owner on another machine whose heartbeat stands still this long (by our clock) is dead.
Over 60 s, the longest that NFS clients usually keep attributes."""
UNKNOWN = "unknown"
JOB_VARIABLE = "LORASWEEP_JOB"
"""Set inside the jobs that we submit: such a job ends with its process. An interactive job, in
which somebody runs a command, outlives it, so its life says nothing of the process."""


class RunningJobs(Protocol):
    """What a scheduler tells about the jobs that own attempts (launch/slurm/client)."""

    def refresh(self) -> None:
        """Ask once about all jobs that run."""

    def __call__(
        self, cluster: str, job: str, restart: int, known_before: bool = False
    ) -> bool | None:
        """Return whether that execution of a job still runs; None if nobody can tell.

        `known_before`: it was known before the last `refresh`, so its absence there counts.
        """


def host() -> str:
    """Return this machine's name.

    LORASWEEP_HOST replaces it where two machines or containers have one name.
    """
    return os.environ.get("LORASWEEP_HOST") or socket.gethostname()


@cache
def pid_namespace() -> str:
    """Identify the space of process ids: containers of one machine have one each."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


@cache
def boot_id() -> str:
    """Identify this boot of this machine (empty where the system does not say)."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def start_time(pid: int) -> str:
    """Return the start time of a process in clock ticks since boot.

    Empty if it is gone or a zombie. UNKNOWN if the system hides it, as many login nodes hide the
    processes of other users.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return UNKNOWN if _exists(pid) else ""
    return "" if fields[0] in ("Z", "X") else fields[19]


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def this_process() -> dict[str, Any]:
    """Describe this process as an owner."""
    pid = os.getpid()
    owner = {
        "host": host(),
        "boot": boot_id(),
        "space": pid_namespace(),
        "pid": pid,
        "started": start_time(pid),
    }
    job = os.environ.get("SLURM_JOB_ID")
    if job and os.environ.get(JOB_VARIABLE):
        owner["slurm"] = {
            "cluster": os.environ.get("SLURM_CLUSTER_NAME", ""),
            "job": job,
            "restart": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        }
    return owner


def read_owner(attempt: Path) -> dict[str, Any]:
    """Return the owner of an attempt folder; empty if it is not there or damaged.

    Raises:
        OSError: it cannot be read at present, as on a network that fails for a moment.
    """
    try:
        return json.loads((attempt / "owner.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}


def restarted(owner: dict[str, Any]) -> bool:
    """Return whether this process is the job that `owner` was, started again by Slurm."""
    mine, its = this_process().get("slurm"), owner.get("slurm")
    if not mine or not its:
        return False
    same = (mine["cluster"], mine["job"]) == (its["cluster"], its["job"])
    return same and mine["restart"] > its["restart"]


def _is_job_elsewhere(attempt: Path) -> bool:
    try:
        owner = read_owner(attempt)
    except OSError:
        return False
    return bool(owner.get("slurm")) and owner.get("host") != host()


class Liveness:
    """Judge owners; remembers other machines' heartbeats between calls."""

    def __init__(self, jobs: RunningJobs | None = None) -> None:
        """`jobs`: who can tell about owners that are jobs; without it their heartbeats decide."""
        self._jobs = jobs
        self._seen: dict[Path, tuple[bytes, float, bool]] = {}
        self._known: set[Path] = set()

    def prepare(self, attempts: Iterable[Path]) -> None:
        """Look at many owners first, so that one question to the scheduler serves all of them.

        An attempt's owner never changes, so each is read once.
        """
        new = {a for a in attempts if a not in self._known and _is_job_elsewhere(a)}
        self._known |= new
        if new and self._jobs:
            self._jobs.refresh()

    def verdict(self, attempt: Path) -> bool | None:
        """Return whether the owner lives, by this machine's processes or by the scheduler.

        None if neither can tell.
        """
        try:
            owner = read_owner(attempt)
        except OSError:
            return None
        if not owner:
            return False  # an attempt is created with its owner in one step, so this one is damaged
        here = {"host": host(), "boot": boot_id(), "space": pid_namespace()}
        if all(owner.get(k, v) == v for k, v in here.items()):
            started = start_time(owner["pid"])
            if started != UNKNOWN:
                return started == owner["started"] != ""
        if restarted(owner):
            return False
        its = owner.get("slurm")
        if its and self._jobs:
            return self._jobs(its["cluster"], its["job"], its["restart"], attempt in self._known)
        return None

    def alive(self, attempt: Path) -> bool:
        """Return whether the owner of an attempt folder lives.

        Where nobody can tell, it counts as alive until its heartbeat has stood still for SILENCE_S
        while this process watched.
        """
        verdict = self.verdict(attempt)
        if verdict is not None:
            return verdict
        try:
            beat = (attempt / "heartbeat").read_bytes()
        except OSError:
            beat = b""
        now = time.monotonic()
        before, since, moved = self._seen.get(attempt, (beat, now, False))
        if beat != before:
            since, moved = now, True
        self._seen[attempt] = (beat, since, moved)
        return now - since < SILENCE_S

    def sure(self, attempt: Path) -> bool:
        """Return whether `alive` is more than a first guess.

        It is if somebody could tell, or if the heartbeat was seen to move.
        """
        return self.verdict(attempt) is not None or self._seen.get(attempt, (b"", 0.0, False))[2]
