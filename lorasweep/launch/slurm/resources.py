"""Group packs into jobs, and compute the resources of a job. Pure."""

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from lorasweep.errors import ClusterError, unknown
from lorasweep.launch.slurm.client import Partition
from lorasweep.plan.packing import Pack
from lorasweep.spec.execution import Cluster, Exec

KINDS = ("local", "slurm")
RESERVED_OPTIONS = frozenset(
    [
        "job-name",
        "array",
        "output",
        "error",
        "signal",
        "dependency",
        "nodes",
        "ntasks-per-node",
        "requeue",
    ]
)
"""sbatch options that lorasweep sets itself, because records and jobs depend on them."""
UNSAFE = re.compile(r"""['"`\\$;<>\x00-\x1f\x7f]""")
"""What no setting may have that ends up in a script: a newline ends the line of an option, and the
rest would be a command."""
MARGIN_TIME, MARGIN_MIN = 3.0, 15.0
"""The time limit is MARGIN_TIME times the expected time plus MARGIN_MIN minutes. Estimates are
rough; a job that reaches its limit requeues itself."""
MARGIN_MEMORY = 1.3
"""Requested memory divided by expected memory. The memory model is right within 20% (LOG.md)."""
HOST_BYTES = 3 * 2**30
"""Host memory of a GPU worker in addition to a copy of the weights: libraries, data, pinned
buffers. Assumption."""
GPU_FLOPS = 1e14
"""Floating-point operations per second of a GPU worker, used until runs were measured. Assumption:
a quarter of the dense bf16 peak of an A100, or an eighth of an H100's, rounded down."""


@dataclass(frozen=True)
class JobResources:
    """What every job of an array needs."""

    cpus: int
    """CPU cores on each node."""
    gpus: int
    """GPUs on each node."""
    mem_gib: float
    """Memory on each node."""
    time_min: int
    workers: int
    nodes: int = 1

    @property
    def tasks(self) -> int:
        """Tasks that Slurm has to place on each node: on several nodes, one a process."""
        return self.gpus if self.nodes > 1 else 1


def workers_of(cluster: Cluster, world_size: int = 1) -> int:
    """Return how many packs a job trains in parallel, each with `world_size` processes."""
    most = max(1, cluster.gpus // world_size)
    if world_size == 1 or not cluster.gpus:
        return cluster.workers or most
    return min(cluster.workers or most, most)


def nodes_of(world_size: int, gpus_per_node: int) -> int:
    """Return the fewest nodes that train a run, each with the same number of its processes.

    `gpus_per_node`: GPUs of a node that a job may take; 0: processes need none, and share one node.
    """
    if not gpus_per_node:
        return 1
    return next(
        n
        for n in range(1, world_size + 1)
        if world_size % n == 0 and world_size // n <= gpus_per_node
    )


def per_node(cluster: Cluster, partition: Partition) -> int:
    """Return how many GPUs of a node a job may take; 0: it takes none."""
    return (cluster.gpus_per_node or partition.gpus) if cluster.gpus else 0


def group(
    packs: Sequence[Pack], cluster: Cluster, flops_s: float, world_size: int = 1
) -> list[list[Pack]]:
    """Group packs into jobs of `work_min` to `work_max` minutes, longest job first.

    Jobs are as short as possible while no more than `parallel` are needed, so that the sweep ends
    sooner. Packs of one model go into the same job, so that a worker loads it once. A job has a
    pack for each of its workers.
    """
    side = workers_of(cluster, world_size)
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
    tasks: Sequence[Sequence[Pack]],
    cluster: Cluster,
    flops_s: float,
    partition: Partition,
    world_size: int = 1,
) -> JobResources:
    """Return what each job needs. Settings of the cluster come before estimates.

    `world_size`: processes of a run; with GPUs each has one, on as few nodes as have them.
    """
    side = workers_of(cluster, world_size)
    nodes = nodes_of(world_size, per_node(cluster, partition))
    here = world_size // nodes
    work = [[p.flops for p in task] for task in tasks]
    longest_s = max((max(sum(w) / side, max(w)) for w in work), default=0.0) / flops_s
    minutes = cluster.time_min
    if minutes is None:
        estimate = math.ceil(MARGIN_TIME * longest_s / 60 + MARGIN_MIN)
        minutes = int(min(estimate, partition.time_min))
    memory = cluster.mem_gib
    if memory is None:
        sizes = sorted((_bytes(p, cluster, here) for t in tasks for p in t), reverse=True)
        memory = math.ceil(10 * MARGIN_MEMORY * sum(sizes[:side]) / 2**30) / 10
    gpus = here if nodes > 1 else max(cluster.gpus, here if cluster.gpus else 0)
    return JobResources(cluster.cpus * side * here, gpus, memory, minutes, side, nodes)


def memory_class(packs: Sequence[Pack], cluster: Cluster) -> int:
    """Return the power of two next to the host memory of a job with GPUs; 0 without GPUs.

    Jobs of one array ask for the same memory, and that of a small model is not a large one's.
    """
    if not cluster.gpus:
        return 0
    return max(round(math.log2(_bytes(pack, cluster, 1))) for pack in packs)


def _bytes(pack: Pack, cluster: Cluster, processes: int) -> float:
    """Return the host memory of a pack's processes on one node. Process 0 reads the weights."""
    spec = pack.points[-1].spec
    if cluster.gpus:
        copies = 3 if spec.method.MAX_PACK == 1 else 1
        return processes * HOST_BYTES + 4 * spec.model.n_params * copies
    return pack.memory_bytes


def check(cluster: Cluster) -> None:
    """Check a cluster's settings.

    Raises:
        ClusterError: one is wrong on any cluster.
    """
    if cluster.kind not in KINDS:
        raise ClusterError(unknown("cluster.kind", cluster.kind, KINDS))
    if cluster.kind == "local":
        return
    _check_text(cluster)
    for name in ("cpus", "parallel", "warn_s", "work_min", "work_max", "follow_min"):
        if not getattr(cluster, name) > 0:
            raise ClusterError(
                f"cluster.{name}={getattr(cluster, name)}: expected a number above 0."
            )
    for name in ("workers", "mem_gib", "time_min", "runs_per_job", "gpus_per_node"):
        value = getattr(cluster, name)
        if value is not None and not value > 0:
            raise ClusterError(
                f"cluster.{name}={value}: expected a number above 0, or null for the default."
            )
    for name in sorted(set(cluster.options) & RESERVED_OPTIONS):
        raise ClusterError(
            f"cluster.options.{name} is reserved: lorasweep sets it itself. Leave it out."
        )
    if cluster.gpus < 0 or cluster.requeues < 0:
        raise ClusterError(
            f"cluster.gpus={cluster.gpus}, cluster.requeues={cluster.requeues}: expected 0 or more."
        )
    if cluster.work_max < cluster.work_min:
        raise ClusterError(
            f"cluster.work_max={cluster.work_max:g} is below "
            f"cluster.work_min={cluster.work_min:g} minutes. Raise the first or lower the second."
        )
    if cluster.gpus and cluster.workers and cluster.gpus % cluster.workers:
        raise ClusterError(
            f"cluster.gpus={cluster.gpus} is not a multiple of cluster.workers={cluster.workers}: "
            "each worker gets the same number of GPUs. Change one of them."
        )


def _check_text(cluster: Cluster) -> None:
    """Refuse what a shell could read as more than a value.

    `setup` lines are shell, and are the user's own; each is one line.
    """
    named = {f.name: getattr(cluster, f.name) for f in dataclasses.fields(cluster)}
    texts = {name: value for name, value in named.items() if isinstance(value, str)}
    texts |= {f"options.{name}": value for name, value in cluster.options.items()}
    for name, value in texts.items():
        if UNSAFE.search(value) or UNSAFE.search(name) or " " in name:
            raise ClusterError(
                f"cluster.{name}={value!r} has a quote, a newline or another character that a "
                "shell could read as a command. Leave it out."
            )
    for line in cluster.setup:
        if re.search(r"[\x00-\x08\n-\x1f]", line):
            raise ClusterError(
                f"cluster.setup has {line!r}: a newline or a control character. Give one list "
                "entry a line."
            )


def check_fits(needed: JobResources, cluster: Cluster, partition: Partition) -> None:
    """Check that a node of the partition is large enough for a job.

    Raises:
        ClusterError: none is; the message names the setting to change.
    """
    limit = f"a node of partition {partition.name!r} has at most"
    if needed.nodes > partition.nodes:
        raise ClusterError(
            f"a run with {needed.nodes * needed.gpus} processes needs {needed.nodes} nodes with "
            f"{needed.gpus} GPU(s) each, and partition {partition.name!r} has {partition.nodes} "
            f"node(s) with at most {partition.gpus}. Leave such runs out with "
            f"exec.max_gpus={partition.nodes * partition.gpus}, lower exec.world_size, or choose "
            "another partition."
        )
    if needed.gpus > partition.gpus:
        raise ClusterError(
            f"cluster.gpus={needed.gpus}, but {limit} {partition.gpus}. Set cluster.gpus to "
            f"{partition.gpus} or fewer; the runs are spread over more jobs."
        )
    if needed.cpus > partition.cpus:
        raise ClusterError(
            f"a job with cluster.cpus={cluster.cpus} for each of its processes (workers: "
            f"{needed.workers}) needs {needed.cpus} CPU cores, but {limit} {partition.cpus}. Lower "
            "cluster.cpus or cluster.workers."
        )
    if needed.mem_gib * 1024 > partition.memory_mib:
        raise ClusterError(
            f"a job needs {needed.mem_gib:g} GiB, but {limit} "
            f"{partition.memory_mib / 1024:.1f}. Set cluster.mem_gib, lower exec.pack_size or "
            "exec.micro_batch_size, or choose another partition."
        )
    if needed.time_min > partition.time_min:
        raise ClusterError(
            f"cluster.time_min={needed.time_min}, but partition {partition.name!r} allows "
            f"at most {partition.time_min:g}. Lower it: a job that reaches its limit requeues "
            "itself and loses nothing."
        )
    if needed.time_min * 60 <= cluster.warn_s:
        raise ClusterError(
            f"a job of {needed.time_min} min would be warned at once "
            f"(cluster.warn_s={cluster.warn_s}). Raise cluster.time_min or lower cluster.warn_s."
        )


def check_pack_size(exec_: Exec, cluster: Cluster) -> None:
    """Check that a pack fits into a job, if the user set the sizes of both.

    Raises:
        ClusterError: it does not.
    """
    if exec_.pack_size and cluster.runs_per_job and exec_.pack_size > cluster.runs_per_job:
        raise ClusterError(
            f"exec.pack_size={exec_.pack_size} is above "
            f"cluster.runs_per_job={cluster.runs_per_job}, but a pack must fit into a job. Lower "
            "the first or raise the second."
        )
