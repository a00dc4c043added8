"""Which runs go into which job of a cluster, and what a job needs. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lorasweep.errors import ClusterError, unknown
from lorasweep.launch.slurm.partitions import Partition
from lorasweep.plan.packing import Pack
from lorasweep.spec.execution import Cluster, Exec

KINDS = ("local", "slurm")
RESERVED_OPTIONS = frozenset(
    (
        "job-name",
        "array",
        "output",
        "error",
        "signal",
        "dependency",
        "nodes",
        "ntasks-per-node",
        "requeue",
    )
)
"""Options of sbatch that lorasweep sets itself: records and jobs rely on them."""
MARGIN_TIME, MARGIN_MIN = 3.0, 15.0
"""A job asks for this many times its expected time, and these minutes for its start: estimates are
rough, and a job that reaches its limit goes on by being queued again."""
MARGIN_MEMORY = 1.3
"""A job asks for this many times the expected memory. The memory model holds within 20% (LOG.md).
"""
HOST_BYTES = 3 * 2**30
"""Host memory of a worker on a GPU, besides a copy of the weights: libraries, data, pinned buffers.
Assumption."""
GPU_FLOPS = 1e14
"""Floating-point operations a second of a GPU worker, until something was measured. Assumption: a
quarter of an A100's or an eighth of an H100's dense bf16 peak, rounded down."""


@dataclass(frozen=True)
class JobResources:
    """What every job of a submission needs."""

    cpus: int
    """Processors a job."""
    gpus: int
    mem_gib: float
    time_min: int
    workers: int


def workers_of(cluster: Cluster) -> int:
    """Return how many packs a job trains side by side."""
    return cluster.workers or max(1, cluster.gpus)


def flops_per_s(cluster: Cluster, per_core: float) -> float:
    """Return the assumed speed of a worker, in floating-point operations a second."""
    return GPU_FLOPS if cluster.gpus else per_core * cluster.cpus


def group(packs: Sequence[Pack], cluster: Cluster, flops_s: float) -> list[list[Pack]]:
    """Put packs into jobs of `work_min` to `work_max` minutes on all their workers, longest first.

    Jobs are as short as that allows while fewer of them than `parallel` are needed: the sweep ends
    sooner. Packs of one model stand together, so that a worker loads it once. A job has a pack for
    each of its workers.
    """
    side = workers_of(cluster)
    seconds = {id(p): p.flops / flops_s for p in packs}
    share_min = sum(seconds.values()) / 60 / side / cluster.parallel
    capacity = side * 60 * min(max(cluster.work_min, share_min), cluster.work_max)
    tasks: list[list[Pack]] = []
    left, room = 0.0, 0
    for pack in sorted(packs, key=lambda p: (p.points[0].spec.model.name, -p.flops)):
        s, n = seconds[id(pack)], len(pack.points)
        full = s > left if cluster.runs_per_job is None else n > room
        if not tasks or (full and (cluster.runs_per_job is not None or len(tasks[-1]) >= side)):
            tasks.append([])
            left, room = capacity, cluster.runs_per_job or 0
        tasks[-1].append(pack)
        left, room = left - s, room - n
    return sorted(tasks, key=lambda task: -sum(seconds[id(p)] for p in task))


def resources_for(
    tasks: Sequence[Sequence[Pack]], cluster: Cluster, flops_s: float, partition: Partition
) -> JobResources:
    """Return what a job of these tasks needs; settings of the cluster come before estimates."""
    side = workers_of(cluster)
    work = [[p.flops for p in task] for task in tasks]
    longest_s = max((max(sum(w) / side, max(w)) for w in work), default=0.0) / flops_s
    minutes = cluster.time_min
    if minutes is None:
        estimate = math.ceil(MARGIN_TIME * longest_s / 60 + MARGIN_MIN)
        minutes = int(min(estimate, partition.time_min))
    memory = cluster.mem_gib
    if memory is None:
        sizes = sorted((_bytes(p, cluster) for t in tasks for p in t), reverse=True)
        memory = math.ceil(10 * MARGIN_MEMORY * sum(sizes[:side]) / 2**30) / 10
    return JobResources(cluster.cpus * side, cluster.gpus, memory, minutes, side)


def _bytes(pack: Pack, cluster: Cluster) -> float:
    spec = pack.points[-1].spec
    if cluster.gpus:
        return HOST_BYTES + 4 * spec.model.n_params * (3 if spec.method.MAX_PACK == 1 else 1)
    return pack.memory_bytes


def check(cluster: Cluster) -> None:
    """Check a cluster's settings.

    Raises:
        ClusterError: one of them cannot be right on any cluster.
    """
    if cluster.kind not in KINDS:
        raise ClusterError(unknown("cluster.kind", cluster.kind, KINDS))
    if cluster.kind == "local":
        return
    for name in ("cpus", "parallel", "warn_s", "work_min", "work_max", "follow_min"):
        if not getattr(cluster, name) > 0:
            raise ClusterError(f"cluster.{name}={getattr(cluster, name)}: give more than 0.")
    for name in ("workers", "mem_gib", "time_min", "runs_per_job"):
        value = getattr(cluster, name)
        if value is not None and not value > 0:
            raise ClusterError(
                f"cluster.{name}={value}: give more than 0, or null to go by the plan."
            )
    for name in sorted(set(cluster.options) & RESERVED_OPTIONS):
        raise ClusterError(
            f"cluster.options.{name} is set by lorasweep itself. Use the settings of cluster, or "
            "leave it out."
        )
    if cluster.gpus < 0 or cluster.requeues < 0:
        raise ClusterError(
            f"cluster.gpus={cluster.gpus}, cluster.requeues={cluster.requeues}: give at least 0."
        )
    if cluster.work_max < cluster.work_min:
        raise ClusterError(
            f"cluster.work_max={cluster.work_max:g} is less than "
            f"cluster.work_min={cluster.work_min:g} minutes."
        )
    if cluster.gpus and cluster.workers and cluster.gpus % cluster.workers:
        raise ClusterError(
            f"cluster.gpus={cluster.gpus} cannot be dealt to cluster.workers={cluster.workers} "
            "evenly."
        )


def check_fits(needed: JobResources, cluster: Cluster, partition: Partition) -> None:
    """Check that a node of the partition can hold such a job.

    Raises:
        ClusterError: none can; the message names the setting to change.
    """
    limit = f"a node of partition {partition.name!r} has at most"
    if needed.gpus > partition.gpus:
        raise ClusterError(
            f"cluster.gpus={needed.gpus}, but {limit} {partition.gpus}. Set cluster.gpus to "
            f"{partition.gpus} or fewer: runs spread over more jobs by themselves."
        )
    if needed.cpus > partition.cpus:
        raise ClusterError(
            f"a job of {needed.workers} worker(s) x cluster.cpus={cluster.cpus} asks for "
            f"{needed.cpus} processors, but {limit} {partition.cpus}. Lower cluster.cpus or "
            "cluster.workers."
        )
    if needed.mem_gib * 1024 > partition.memory_mib:
        raise ClusterError(
            f"a job asks for {needed.mem_gib:g} GiB, but {limit} "
            f"{partition.memory_mib / 1024:.1f}. Set cluster.mem_gib, lower exec.pack_size or "
            "exec.micro_batch_size, or take another partition."
        )
    if needed.time_min > partition.time_min:
        raise ClusterError(
            f"cluster.time_min={needed.time_min}, but partition {partition.name!r} allows "
            f"{partition.time_min:g}. A job that reaches its limit goes on by itself, so a shorter "
            "one loses nothing."
        )
    if needed.time_min * 60 <= cluster.warn_s:
        raise ClusterError(
            f"a job of {needed.time_min} min would be warned at once "
            f"(cluster.warn_s={cluster.warn_s}). Raise cluster.time_min or lower cluster.warn_s."
        )


def check_pack_size(exec_: Exec, cluster: Cluster) -> None:
    """Check that a pack fits a job where the user set the size of both.

    Raises:
        ClusterError: it does not.
    """
    if exec_.pack_size and cluster.runs_per_job and exec_.pack_size > cluster.runs_per_job:
        raise ClusterError(
            f"exec.pack_size={exec_.pack_size} runs a pack do not fit "
            f"cluster.runs_per_job={cluster.runs_per_job}."
        )
