"""Group packs into jobs, and compute the resources of a job. All functions are pure."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from lorasweep.errors import ClusterError, unknown
from lorasweep.launch.slurm.client import Partition
from lorasweep.plan.packing import Pack
from lorasweep.spec.execution import Cluster, Exec

KINDS = ("local", "slurm")
CONTAINER_KINDS = ("pyxis", "apptainer")
POSITIVE = ("cpus", "parallel", "warn_s", "work_min", "work_max", "follow_min")
POSITIVE_OR_NONE = ("workers", "mem_gib", "time_min", "runs_per_job", "gpus_per_node")
RESERVED_OPTIONS = {"job-name", "array", "output", "error", "signal", "dependency", "nodes"}
RESERVED_OPTIONS |= {"ntasks-per-node", "requeue"}
"""sbatch options that lorasweep sets itself, because records and jobs depend on them."""
UNSAFE = re.compile(r"""['"`\\$;<>\x00-\x1f\x7f]""")
"""Characters that a shell could read as a command, forbidden in settings that go into a script."""
MARGIN_TIME, MARGIN_MIN = 3.0, 15.0
"""Time limit: MARGIN_TIME times the expected time plus MARGIN_MIN minutes. Estimates are rough."""
MARGIN_MEMORY = 1.3
"""Requested memory divided by expected memory. The memory model is right within 20% (docs/log)."""
HOST_BYTES = 3 * 2**30
"""Assumed host memory of a GPU worker for libraries, data and pinned buffers, without weights."""
GPU_FLOPS = 1e14
"""Assumed FLOP/s of a GPU worker until runs were measured: about a third of the dense bf16 peak of
an A100, and a tenth of the peak of an H100."""


@dataclass(frozen=True)
class JobResources:
    """Resources of every job of an array; `cpus`, `gpus` and `mem_gib` are per node."""

    cpus: int
    gpus: int
    mem_gib: float
    time_min: int
    workers: int
    nodes: int = 1

    @property
    def tasks(self) -> int:
        """Slurm tasks per node: one, or one per process if the job has several nodes."""
        return self.gpus if self.nodes > 1 else 1


def workers_of(cluster: Cluster, world_size: int = 1) -> int:
    """Return the number of packs that a job trains in parallel, each on `world_size` processes."""
    most = max(1, cluster.gpus // world_size)
    if world_size == 1 or not cluster.gpus:
        return cluster.workers or most
    return min(cluster.workers or most, most)


def nodes_of(world_size: int, cluster: Cluster, partition: Partition) -> int:
    """Return the smallest number of nodes for a run, with equally many processes on each."""
    per_node = cluster.gpus_per_node or partition.gpus
    if not cluster.gpus or not per_node:
        return 1  # processes without GPUs share one node
    divisors = (n for n in range(1, world_size + 1) if world_size % n == 0)
    return next(n for n in divisors if world_size // n <= per_node)


def group(
    packs: Sequence[Pack], cluster: Cluster, flops_s: float, world_size: int = 1
) -> list[list[Pack]]:
    """Group packs into jobs of `work_min` to `work_max` minutes, longest job first.

    Jobs are as short as possible with at most `parallel` of them. Packs are sorted by model, so
    that a worker seldom loads another model. A job has at least one pack per worker, if possible.
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
    """Return the resources of each job: the settings in `cluster`, or estimates if not set."""
    side = workers_of(cluster, world_size)
    nodes = nodes_of(world_size, cluster, partition)
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
    """Return the rounded log2 of a GPU job's host memory in bytes; 0 without GPUs."""
    sizes = (round(math.log2(_bytes(pack, cluster, 1))) for pack in packs)
    return max(sizes) if cluster.gpus else 0


def _bytes(pack: Pack, cluster: Cluster, processes: int) -> float:
    """Return the host memory of a pack, in bytes, on the node where process 0 reads the weights."""
    spec = pack.points[-1].spec
    if cluster.gpus:
        copies = 3 if spec.method.MAX_PACK == 1 else 1
        return processes * HOST_BYTES + 4 * spec.model.n_params * copies
    return pack.memory_bytes


def check(cluster: Cluster) -> None:
    """Raise ClusterError if a setting is wrong on every cluster."""
    c = cluster
    if c.kind not in KINDS:
        raise ClusterError(unknown("cluster.kind", c.kind, KINDS))
    if c.kind == "local":
        return
    named = vars(c)
    texts = {name: value for name, value in named.items() if isinstance(value, str)}
    texts |= {f"options.{name}": value for name, value in c.options.items()}
    texts |= {f"container_mounts.{k}": value for k, value in enumerate(c.container_mounts)}
    for name, value in texts.items():
        if UNSAFE.search(value) or UNSAFE.search(name) or " " in name:
            raise ClusterError(
                f"cluster.{name}={value!r} has a character that a shell could read as a command, "
                "such as a quote or a newline. Leave it out."
            )
    if c.container_kind not in (None, *CONTAINER_KINDS):
        raise ClusterError(unknown("cluster.container_kind", c.container_kind, CONTAINER_KINDS))
    if (c.container_kind or c.container_mounts) and not c.container:
        raise ClusterError(
            "cluster.container_kind and cluster.container_mounts need cluster.container=IMAGE."
        )
    for line in c.setup:  # shell lines of the user
        if re.search(r"[\x00-\x08\n-\x1f]", line):
            raise ClusterError(
                f"cluster.setup has {line!r} with a control character. Write one entry per line."
            )
    for name in (*POSITIVE, *POSITIVE_OR_NONE):
        optional, value = name in POSITIVE_OR_NONE, named[name]
        if not (optional and value is None) and not value > 0:
            default = ", or null for the default" if optional else ""
            raise ClusterError(f"cluster.{name}={value}: expected a number above 0{default}.")
    for name in sorted(set(c.options) & RESERVED_OPTIONS):
        raise ClusterError(f"cluster.options.{name} is reserved: lorasweep sets it. Leave it out.")
    if c.gpus < 0 or c.requeues < 0:
        raise ClusterError(
            f"cluster.gpus={c.gpus}, cluster.requeues={c.requeues}: expected 0 or more."
        )
    if c.work_max < c.work_min:
        raise ClusterError(
            f"cluster.work_max={c.work_max:g} must not be below cluster.work_min={c.work_min:g}."
        )
    if c.gpus and c.workers and c.gpus % c.workers:
        raise ClusterError(
            f"cluster.gpus={c.gpus} must be a multiple of cluster.workers={c.workers}: each worker "
            "gets the same number of GPUs."
        )


def check_fits(needed: JobResources, cluster: Cluster, partition: Partition) -> None:
    """Check that a job fits into the partition; raise ClusterError if not."""
    p, limit = partition, f"a node of partition {partition.name!r} has at most"
    problems = (
        (
            needed.nodes > p.nodes,
            f"a run with {needed.nodes * needed.gpus} processes needs {needed.nodes} nodes with "
            f"{needed.gpus} GPU(s) each, and partition {p.name!r} has {p.nodes} node(s) with at "
            f"most {p.gpus}. Leave such runs out with exec.max_gpus={p.nodes * p.gpus}, lower "
            "exec.world_size, or choose another partition.",
        ),
        (
            needed.gpus > p.gpus,
            f"cluster.gpus={needed.gpus}, but {limit} {p.gpus}. Set cluster.gpus to at most that.",
        ),
        (
            needed.cpus > p.cpus,
            f"a job with cluster.cpus={cluster.cpus} for each of its processes (workers: "
            f"{needed.workers}) needs {needed.cpus} CPU cores, but {limit} {p.cpus}. Lower "
            "cluster.cpus or cluster.workers.",
        ),
        (
            needed.mem_gib * 1024 > p.memory_mib,
            f"a job needs {needed.mem_gib:g} GiB, but {limit} {p.memory_mib / 1024:.1f}. Lower "
            "cluster.mem_gib, exec.pack_size or exec.micro_batch_size, or change the partition.",
        ),
        (
            needed.time_min > p.time_min,
            f"cluster.time_min={needed.time_min}, but partition {p.name!r} allows at most "
            f"{p.time_min:g}. Lower cluster.time_min: at its limit a job requeues itself, and runs "
            "resume from their checkpoints.",
        ),
        (
            needed.time_min * 60 <= cluster.warn_s,
            f"a job of {needed.time_min} min would be warned at once (cluster.warn_s="
            f"{cluster.warn_s}). Raise cluster.time_min or lower cluster.warn_s.",
        ),
    )
    for wrong, message in problems:
        if wrong:
            raise ClusterError(message)


def check_pack_size(exec_: Exec, cluster: Cluster) -> None:
    """Check that exec.pack_size fits into cluster.runs_per_job; raise ClusterError if not."""
    if exec_.pack_size and cluster.runs_per_job and exec_.pack_size > cluster.runs_per_job:
        raise ClusterError(
            f"exec.pack_size={exec_.pack_size} must be at most cluster.runs_per_job="
            f"{cluster.runs_per_job}: a pack must fit into a job."
        )
