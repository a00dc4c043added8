"""Check before jobs are submitted that nodes see the run folder and that its disk has room."""

import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lorasweep.errors import ClusterError, StoreError
from lorasweep.plan.memory import checkpoint_bytes
from lorasweep.plan.packing import Pack
from lorasweep.store import checkpoint
from lorasweep.store.claims import SILENCE_S
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import Point

RUN_BYTES, STEP_BYTES = 40_000, 250
"""Disk space of a finished run, and of the record of an update. Measured: 12 files, of which 9.3 kB
are 40 records."""
LOCAL_FILE_SYSTEMS = ("tmpfs", "ramfs", "overlay", "squashfs")
LOCAL_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm", "/run")
WATCH_POLL_S = 2.0


def mounts() -> list[tuple[str, str]]:
    """List this machine's (mount point, type of file system); empty where the kernel hides them."""
    try:
        lines = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return []
    return [(f[1].replace("\\040", " "), f[2]) for f in map(str.split, lines) if len(f) > 2]


def check_visible(folder: Path, hosts: frozenset[str], mounted: Sequence[tuple[str, str]]) -> None:
    """Check that other machines can see the run folder.

    Raises:
        ClusterError: it is local to this machine, and a node is another machine.
    """
    if hosts <= {socket.gethostname(), socket.gethostname().partition(".")[0], "localhost"}:
        return
    folder = folder.resolve()
    above = [m for m in mounted if folder.is_relative_to(m[0])]
    file_system = max(above, key=lambda m: len(m[0]), default=("/", ""))[1]
    local = next((f for f in LOCAL_FOLDERS if folder.is_relative_to(f)), None)
    if file_system in LOCAL_FILE_SYSTEMS:
        why = f"it is a {file_system} of this machine"
    elif local:
        why = f"{local} is local to this machine"
    else:
        return
    raise ClusterError(
        f"run folder {folder}: {why}, so the nodes ({', '.join(sorted(hosts)[:3])}, ...) cannot "
        "see it. Set exec.runs_dir=FOLDER (or LORASWEEP_RUNS) to a shared file system. If this one "
        "is shared, set cluster.shared=true."
    )


def check_disk(root: Path, packs: Sequence[Pack], at_once: int) -> None:
    """Check that the disk has room for all results and the checkpoints of `at_once` packs.

    Raises:
        StoreError: it has not; the message gives the space needed.
    """
    checkpoints = sorted((checkpoint_bytes(p.spec for p in k.points) for k in packs), reverse=True)
    results = sum(RUN_BYTES + STEP_BYTES * p.spec.steps for pack in packs for p in pack.points)
    need = sum(checkpoints[:at_once]) + results
    free = checkpoint.free_bytes(root)
    if free < need:
        raise StoreError(
            f"the disk of {root} has {free / 2**30:.2f} GiB free, and this sweep needs up to "
            f"{need / 2**30:.2f} GiB (results, and the checkpoints of runs that train together)."
            " Free some space, choose exec.runs_dir=FOLDER, or lower cluster.parallel."
        )


def watch_others(store: RunStore, points: list[Point], notify: Callable[[str], None]) -> None:
    """Watch the heartbeats of runs that other machines seem to train, until it is clear.

    Only for owners that neither this machine nor Slurm knows: a dead one would keep its runs
    forever.
    """
    running = [i for i, s in store.states(p.id for p in points).items() if s == "running"]
    unsure = store.unsure(running)
    if unsure:
        notify(
            f"watching {len(unsure)} run(s) that another machine seems to train, for at most "
            f"{SILENCE_S + 1:.0f} s"
        )
    end = time.monotonic() + SILENCE_S + 1
    while unsure and time.monotonic() < end:
        time.sleep(WATCH_POLL_S)
        unsure = store.unsure(i for i in unsure if store.state(i) == "running")
