"""Who works on a run: attempts, and whether the process that made one still lives.

Clocks of two machines are never compared. On one machine the boot id, the process id and the
process's start time decide; for another machine Slurm, if the owner is a job of it that can be
asked about; else whether the owner's heartbeat's content changes while this one watches.
"""

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

from lorasweep.errors import StoreError
from lorasweep.launch.slurm import client as slurm
from lorasweep.store import files

HEARTBEAT_S = 15.0
"""Seconds between heartbeats of a working process."""
SILENCE_S = 90.0
"""An owner on another machine whose heartbeat stands still this long (by our clock) is dead.
Over 60 s, the longest that NFS clients usually keep attributes."""


UNKNOWN = "unknown"
OUR_JOB = "LORASWEEP_JOB"
"""Set inside the jobs that we submit: such a job ends with its process. An interactive job, in
which somebody runs a command, outlives it, so its life says nothing of the process."""


def host() -> str:
    """Name this machine; LORASWEEP_HOST replaces its own name, where several machines or containers
    have one name."""
    return os.environ.get("LORASWEEP_HOST") or socket.gethostname()


@cache
def processes() -> str:
    """Identify the space of process ids: containers of one machine have several."""
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
    """Return the start time of a process in clock ticks since boot; empty if it is gone or a
    zombie, UNKNOWN if the system hides it (another user's, on many login nodes)."""
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


def me() -> dict[str, Any]:
    """Describe this process as an owner."""
    pid = os.getpid()
    owner = {
        "host": host(),
        "boot": boot_id(),
        "space": processes(),
        "pid": pid,
        "started": start_time(pid),
    }
    job = os.environ.get("SLURM_JOB_ID")
    if job and os.environ.get(OUR_JOB):
        owner["slurm"] = {
            "cluster": os.environ.get("SLURM_CLUSTER_NAME", ""),
            "job": job,
            "restart": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        }
    return owner


def restarted(owner: dict[str, Any]) -> bool:
    """Say whether this process is the Slurm job that `owner` was, started again by Slurm."""
    mine, its = me().get("slurm"), owner.get("slurm")
    if not mine or not its:
        return False
    return (mine["cluster"], mine["job"]) == (its["cluster"], its["job"]) and mine["restart"] > its[
        "restart"
    ]


class Liveness:
    """Judge owners; remembers other machines' heartbeats between calls."""

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[bytes, float, bool]] = {}
        self._read: set[Path] = set()
        self._executions = slurm.Executions()

    def prepare(self, attempts: Iterable[Path]) -> None:
        """Look at many owners first, so that one question to Slurm is about all of them. An
        attempt's owner never changes."""
        owners = {a: _read(a) for a in attempts if a not in self._read}
        new = {a for a, o in owners.items() if o.get("slurm") and o.get("host") != host()}
        self._read |= new
        if new:
            self._executions.refresh()

    def verdict(self, attempt: Path) -> bool | None:
        """Say whether the owner lives, by this machine's processes or by Slurm; None if neither can
        tell."""
        owner = _read(attempt)
        if not owner:
            return False  # an attempt is created with its owner in one step, so this one is damaged
        mine = {"host": host(), "boot": boot_id(), "space": processes()}
        if all(owner.get(k, v) == v for k, v in mine.items()):
            started = start_time(owner["pid"])
            if started != UNKNOWN:
                return started == owner["started"] != ""
        if restarted(owner):
            return False
        if its := owner.get("slurm"):
            return self._executions(
                its["cluster"], its["job"], its["restart"], asked_before=attempt in self._read
            )
        return None

    def alive(self, attempt: Path) -> bool:
        """Say whether the owner of an attempt folder lives. Where nobody can tell, one whose
        heartbeat has not stood still for SILENCE_S while this one watched counts as alive."""
        told = self.verdict(attempt)
        if told is not None:
            return told
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
        """Say whether `alive` is more than a first guess: somebody could tell, or the heartbeat was
        seen to move."""
        return self.verdict(attempt) is not None or self._seen.get(attempt, (b"", 0.0, False))[2]


def _read(attempt: Path) -> dict[str, Any]:
    try:
        return json.loads((attempt / "owner.json").read_bytes())
    except (OSError, ValueError):
        return {}


class Lock:
    """One holder at a time among all processes that see a folder; a dead holder's is taken over."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._liveness = Liveness()
        self._mine: Path | None = None
        self._done = threading.Event()

    def acquire(self, wait_s: float, waiting: Callable[[str], None]) -> None:
        """Take it, waiting for its holder; `waiting` is told once who that is. StoreError after
        `wait_s`."""
        self._folder.mkdir(parents=True, exist_ok=True)
        end, told = time.monotonic() + wait_s, False
        while True:
            last = self._last()
            held = self._folder / str(last)
            if last == 0 or (held / "released").exists() or not self._liveness.alive(held):
                mine = self._folder / str(last + 1)
                if files.create_folder_once(mine, {"owner.json": json.dumps(me()).encode()}):
                    if self._last() == last + 1:
                        self._mine = mine
                        threading.Thread(target=self._beat, daemon=True).start()
                        return
                    shutil.rmtree(
                        mine
                    )  # others came and went since the look, and a later one holds it
                continue
            who = _read(held)
            if not who:
                continue  # given back since the look
            if not told:
                waiting(f"{who['host']}, process {who['pid']}")
                told = True
            if time.monotonic() > end:
                raise StoreError(
                    f"{held} is held by process {who['pid']} on {who['host']}, which still lives. "
                    "Ask again later."
                )
            time.sleep(0.2)

    def _last(self) -> int:
        return max((int(e.name) for e in os.scandir(self._folder) if e.name.isdigit()), default=0)

    def _beat(self) -> None:
        beat = 0
        while not self._done.wait(HEARTBEAT_S if beat else 0):
            beat += 1
            try:
                (self._mine / "heartbeat").write_text(str(beat))
            except OSError:
                continue

    def release(self) -> None:
        """Give it back, and clear away what earlier holders left."""
        self._done.set()
        files.write_atomic(self._mine / "released", b"")
        for entry in os.scandir(self._folder):
            if entry.name.isdigit() and int(entry.name) < int(self._mine.name):
                shutil.rmtree(entry.path, ignore_errors=True)
