"""Submit the follow-up job of a sweep, which submits what is still missing, and finally answers."""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorasweep.errors import ClusterError
from lorasweep.launch.slurm import client, sbatch, submissions
from lorasweep.launch.slurm.resources import JobResources
from lorasweep.launch.slurm.sbatch import Description
from lorasweep.launch.slurm.snapshot import Snapshot
from lorasweep.launch.slurm.submissions import FOLLOW, Array, Queue
from lorasweep.sweep.request import Request

FOLLOW_GIB = 2.0
"""Memory of the follow-up job, which plans, fits curves and draws figures. Assumption: a few times
the memory of imports."""
MAX_IDLE = 3
"""Rounds without a finished run after which the follow-up job gives up. Otherwise it would go on
forever on a cluster where every job fails."""


@dataclass(frozen=True)
class Following:
    """The command and the counters of a follow-up job."""

    command: Sequence[str]
    """Arguments of Python, before the path of the task file."""
    trainer: str | None = None
    idle: int = 0
    """Rounds without a finished run so far."""
    finished: int = 0
    """Number of finished runs when the job was submitted."""


def submit(
    request: Request,
    folder: Path,
    follow: Array,
    code: Snapshot,
    queue: Queue,
    numbers: Sequence[str],
) -> str | None:
    """Submit a follow-up job for these arrays and the sweep's other live jobs.

    Returns why Slurm refused it, or None.
    """
    others = {
        a.label(k)
        for s, k, _ in queue.live()
        if s.record["sweep"] == request.title
        for a in s.arrays
        if a.job and a.first <= k < a.first + a.n and a.part != FOLLOW
    }
    cluster = request.cluster
    partition = cluster.follow_partition or cluster.partition
    small = dataclasses.replace(cluster, gpus=0, partition=partition)
    needed = JobResources(1, 0, FOLLOW_GIB, cluster.follow_min, 1)
    after = tuple(sorted({*numbers, *others}))
    try:
        number = sbatch.submit(Description(folder, follow, needed, small, code, after))
    except ClusterError as error:
        submissions.note_array(folder, FOLLOW, None)
        return f"no follow-up job: {error}"
    submissions.note_array(folder, FOLLOW, number)
    _cancel_older(queue, request)
    return None


def _followers(queue: Queue, request: Request) -> list[tuple[set[str], client.Job]]:
    """List this sweep's other live follow-up jobs, each with its runs."""
    mine = os.environ.get("SLURM_JOB_ID")
    served = {
        s.name: set(s.record["asked"])
        for s in queue.submissions
        if s.record["sweep"] == request.title
    }
    jobs = [(n, j) for n, j in queue.follows.items() if j.live and j.id != mine]
    return [(served[n], j) for n, j in jobs if n in served]


def _cancel_older(queue: Queue, request: Request) -> None:
    """Cancel older follow-up jobs of the same runs, because the new one replaces them.

    One that cannot be cancelled (another user's) does no harm.
    """
    ids = {p.id for p in request.points}
    old = [j.id for served, j in _followers(queue, request) if served <= ids]
    if old:
        client.cancel(old)


def exists(queue: Queue, request: Request) -> bool:
    """Return whether a live follow-up job already covers all these runs."""
    ids = {p.id for p in request.points}
    return any(served >= ids for served, _ in _followers(queue, request))
