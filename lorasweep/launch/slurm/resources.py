"""Which jobs train some packs, and what each asks of Slurm: cores, GPUs, memory, time, nodes."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from lorasweep.launch.slurm.queue import Partition
from lorasweep.plan.detect import hardware_of
from lorasweep.plan.needs import ASSUMED_FLOPS_PER_CORE, products_flops_s
from lorasweep.plan.planner import Pack, Plan, Planner, make_packs
from lorasweep.spec.execution import Cluster, Exec
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import Point
from lorasweep.sweep.request import Request

MARGIN_TIME, MARGIN_MIN = 3.0, 15.0
"""Time limit: MARGIN_TIME times the expected time plus MARGIN_MIN minutes. Estimates are rough."""
MARGIN_MEMORY = 1.3
"""Requested / expected memory. Memory is planned within 20% (docs/log/2026-11-25.md)."""
HOST_BYTES = 3 * 2**30
"""Assumed host memory of a GPU worker for libraries, data and pinned buffers, without weights."""
GPU_FLOPS = 1e14
"""Assumed FLOP/s of a GPU worker until runs were measured: a third of an A100's dense bf16 peak."""


@dataclass(frozen=True)
class JobResources:
    """Resources of every job of an array; `cpus`, `gpus` and `mem_gib` are per node."""

    cpus: int
    gpus: int
    mem_gib: float
    time_min: int
    workers: int
    nodes: int = 1


@dataclass(frozen=True)
class Jobs:
    """Jobs with the same resources and settings."""

    tasks: list[list[Pack]]
    """Packs of each job."""
    exec: Exec
    needed: JobResources


def jobs_of(
    request: Request, store: RunStore, todo: Sequence[Point], now: Plan, partition: Partition
) -> list[Jobs]:
    """Group runs into packs and packs of one model into jobs; SpecError: a run fits on no device.

    The largest jobs are first, so if Slurm refuses one as too large, nothing has been submitted.
    """
    cluster, hardware, precision = request.cluster, now.hardware, todo[0].spec.precision
    if not cluster.gpus and request.hardware and hardware_of(request.hardware).has_speeds:
        cluster = dataclasses.replace(cluster, gpus=1)  # hardware= names GPUs
    if hardware.has_speeds:
        assumed = products_flops_s(hardware, precision)
    else:
        assumed = GPU_FLOPS if cluster.gpus else ASSUMED_FLOPS_PER_CORE[precision] * cluster.cpus
    jobs = []
    for chosen, points in Planner(hardware, request.exec).settings(todo):
        size, threads = chosen.world_size, chosen.threads
        if nodes_of(size, cluster, partition) > 1:
            threads = threads or cluster.cpus  # such a job detects the cores of one node
        workers = workers_of(cluster, size)
        exec_ = dataclasses.replace(chosen, workers=workers, threads=threads)
        flops_s = now.speeds.get(None) or size * assumed
        made = make_packs(points, now.states, store, Planner(hardware, exec_))

        def model(pack: Pack) -> str:
            return pack.points[0].spec.model.name

        for _, same in itertools.groupby(sorted(made, key=model), model):
            tasks = group(list(same), cluster, flops_s, size)
            needed = resources_for(tasks, cluster, flops_s, partition, size)
            jobs.append(Jobs(tasks, exec_, needed))
    return sorted(jobs, key=lambda j: (-j.needed.nodes * j.needed.gpus, -j.needed.mem_gib))


def workers_of(cluster: Cluster, world_size: int = 1) -> int:
    """Return the number of packs that a job trains in parallel, each on `world_size` processes."""
    most = max(1, cluster.gpus // world_size)
    asked = cluster.workers or most
    return min(asked, most) if world_size > 1 and cluster.gpus else asked


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

    Jobs are as short as possible with at most `parallel` of them. A job has at least one pack per
    worker, if possible.
    """
    side = workers_of(cluster, world_size)
    seconds = {id(p): p.flops / flops_s for p in packs}
    share_min = sum(seconds.values()) / 60 / side / cluster.parallel
    capacity = side * 60 * min(max(cluster.work_min, share_min), cluster.work_max)
    tasks: list[list[Pack]] = []
    left, room = 0.0, 0
    for pack in sorted(packs, key=lambda p: -p.flops):
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
    """Return the resources of each job: the settings in `cluster`, or estimates if not set.

    The time is at most the partition's limit: a job at its limit requeues itself.
    """
    side, nodes = workers_of(cluster, world_size), nodes_of(world_size, cluster, partition)
    here = world_size // nodes
    minutes, memory = cluster.time_min, cluster.mem_gib
    if minutes is None:
        work = [[p.flops for p in task] for task in tasks]
        longest_s = max((max(sum(w) / side, max(w)) for w in work), default=0.0) / flops_s
        minutes = math.ceil(MARGIN_TIME * longest_s / 60 + MARGIN_MIN)
    if memory is None:
        sizes = []
        for pack in (pack for task in tasks for pack in task):
            spec, size = pack.points[-1].spec, pack.memory_bytes
            if cluster.gpus:  # host memory of the node where process 0 reads the weights
                copies = 3 if spec.method.TRAINS_BASE else 1
                size = here * HOST_BYTES + 4 * spec.model.n_params * copies
            sizes.append(size)
        most = sum(sorted(sizes, reverse=True)[:side])
        memory = math.ceil(10 * MARGIN_MEMORY * most / 2**30) / 10
    gpus = here if nodes > 1 else max(cluster.gpus, here if cluster.gpus else 0)
    limit = int(min(minutes, partition.time_min))
    return JobResources(cluster.cpus * side * here, gpus, memory, limit, side, nodes)
