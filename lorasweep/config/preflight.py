"""What must hold before anything starts: weights and data, room, a folder that nodes see."""

import socket
from collections.abc import Sequence
from pathlib import Path

from lorasweep.errors import ClusterError, SpecError, StoreError
from lorasweep.plan.memory import checkpoint_bytes
from lorasweep.plan.packing import Pack
from lorasweep.store import checkpoint
from lorasweep.sweep.request import Request

RUN_BYTES, STEP_BYTES = 40_000, 250
"""Disk that a run takes when it is over, and an update's record. Measured: 12 files, of which 9.3
kB are 40 records."""
LOCAL_DISKS = ("tmpfs", "ramfs", "overlay", "squashfs")
OWN_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm", "/run")


def check_available(request: Request) -> None:
    """Raise an error that says how to get them if weights or data of any point are not on this
    machine."""
    from lorasweep.data import load as data
    from lorasweep.models import load as models

    seen: set[str] = set()
    for p in request.points:
        for spec, check, dirs in (
            (p.spec.model, models.check_available, request.exec.models_dir),
            (p.spec.dataset, data.check_available, request.exec.data_dir),
        ):
            if spec.name not in seen:
                seen.add(spec.name)
                check(spec, dirs)
        vocab = data.generator_vocab(p.spec.dataset)
        if vocab is not None and vocab > p.spec.model.vocab_size:
            raise SpecError(
                f"dataset {p.spec.dataset.name!r} has {vocab} symbols, model {p.spec.model.name!r} only "
                f"{p.spec.model.vocab_size}. Choose a model made for it (conf/model)."
            )


# ---------------------------------------------------------------- the place


def disks() -> list[tuple[str, str]]:
    """List this machine's (mount point, type of file system), as the kernel tells; nothing where it
    does not."""
    try:
        lines = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return []
    return [(f[1].replace("\\040", " "), f[2]) for f in map(str.split, lines) if len(f) > 2]


def check_visible(folder: Path, hosts: frozenset[str], mounted: Sequence[tuple[str, str]]) -> None:
    """Raise ClusterError if the run folder is plainly this machine's own while the nodes are other
    machines."""
    if hosts <= {socket.gethostname(), socket.gethostname().partition(".")[0], "localhost"}:
        return
    folder = folder.resolve()
    holding = max(
        (m for m in mounted if folder.is_relative_to(m[0])),
        key=lambda m: len(m[0]),
        default=("/", ""),
    )
    own = next((o for o in OWN_FOLDERS if folder.is_relative_to(o)), None)
    if holding[1] in LOCAL_DISKS or own:
        why = (
            f"it is a {holding[1]} of this machine"
            if holding[1] in LOCAL_DISKS
            else f"{own} is this machine's own"
        )
        raise ClusterError(
            f"run folder {folder}: {why}, so the nodes ({', '.join(sorted(hosts)[:3])}, ...) cannot see it. "
            "Set exec.runs_dir=FOLDER (or LORASWEEP_RUNS) to a shared file system, or say cluster.shared=true if it is one."
        )


def check_disk(root: Path, packs: Sequence[Pack], at_once: int) -> None:
    """Raise StoreError, with what is needed, if the disk cannot hold the packs' results and the
    checkpoints of the largest `at_once` of them."""
    largest = sorted((checkpoint_bytes(p.spec for p in k.points) for k in packs), reverse=True)
    results = sum(RUN_BYTES + STEP_BYTES * p.spec.steps for pack in packs for p in pack.points)
    need = sum(largest[:at_once]) + results
    free = checkpoint.free_bytes(root)
    if free < need:
        raise StoreError(
            f"the disk of {root} has {free / 2**30:.2f} GiB free, and this sweep needs up to {need / 2**30:.2f} GiB "
            "(results, and the checkpoints of the runs that train at once). Free some, choose exec.runs_dir=FOLDER, or lower "
            "cluster.parallel."
        )
