"""Check a cluster's settings, group the runs that no live job has into jobs, and size the jobs."""

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorasweep.errors import ClusterError
from lorasweep.launch.slurm import queue as slurm
from lorasweep.launch.slurm.queue import Partition, Queue
from lorasweep.plan import detect
from lorasweep.plan.hardware import Hardware, from_plain
from lorasweep.plan.load import ASSUMED_FLOPS_PER_CORE, products_flops_s
from lorasweep.plan.planner import Pack, Plan, Planner, make_packs
from lorasweep.spec.execution import Cluster, Exec
from lorasweep.spec.values import misfits
from lorasweep.store import files
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import Point
from lorasweep.sweep.request import Request

RESERVED_OPTIONS = {"job-name", "array", "output", "error", "signal", "dependency", "nodes"}
RESERVED_OPTIONS |= {"ntasks-per-node", "requeue"}
"""sbatch options that lorasweep sets itself, because jobs depend on them."""
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


def check(cluster: Cluster, exec_: Exec) -> None:
    """Raise ClusterError if a setting is wrong on every cluster."""
    c = vars(cluster)
    for problem in misfits(cluster, "cluster."):
        raise ClusterError(problem)
    if cluster.kind == "local":
        return
    texts = {name: value for name, value in c.items() if isinstance(value, str)}
    texts |= {f"options.{name}": value for name, value in cluster.options.items()}
    texts |= {f"container_mounts.{k}": value for k, value in enumerate(cluster.container_mounts)}
    unsafe = [n for n, text in texts.items() if UNSAFE.search(text) or UNSAFE.search(n) or " " in n]
    lines = [line for line in cluster.setup if re.search(r"[\x00-\x08\n-\x1f]", line)]
    reserved = sorted(set(cluster.options) & RESERVED_OPTIONS)
    inside = [n for n in ("container_kind", "container_mounts") if c[n] and not cluster.container]
    uneven = cluster.workers and cluster.gpus % cluster.workers
    large = (exec_.pack_size or 0) > (cluster.runs_per_job or math.inf)
    wrong: dict[str, Sequence[str]] = {
        "no character that a shell could read as a command, such as a quote or a newline": unsafe,
        "one entry per line, without control characters": ["setup"] if lines else [],
        "left out, as lorasweep sets it": [f"options.{name}" for name in reserved],
        "only with cluster.container=IMAGE": inside,
        "at least cluster.work_min": ["work_max"] if cluster.work_max < cluster.work_min else [],
        "a multiple of cluster.workers, as each worker gets as many": ["gpus"] if uneven else [],
        "at least exec.pack_size, as a pack must fit into a job": ["runs_per_job"] if large else [],
    }
    for expected, names in wrong.items():
        for name in names:
            given = {**c, **texts, "setup": lines}.get(name, "")
            raise ClusterError(f"cluster.{name}={given!r}: expected {expected}.")


# ---------------------------------------------------------------- which runs


@dataclass
class Work:
    """The unfinished runs of a sweep, by their state in Slurm's queue."""

    todo: list[Point]
    """Runs to submit."""
    queued: int
    """Runs that wait in live jobs."""
    running: int
    covered: bool
    """Whether an unfinished run is in a live job, queued or running."""
    exhausted: int
    """Runs that were killed exec.max_attempts times, and are not submitted again."""
    removed: list[tuple[slurm.Submission, list[str]]]
    """Submissions with their queued runs that are no longer part of the sweep."""
    unknown: int
    """Runs in jobs of another cluster, which this Slurm does not show."""

    @property
    def n_removed(self) -> int:
        """Number of runs in `removed`."""
        return sum(len(runs) for _, runs in self.removed)


def work_of(request: Request, store: RunStore, now: Plan, queue: Queue) -> Work:
    """Compare the unfinished runs of the plan `now` with the queue."""
    states, covered = now.states, queue.covered()
    waiting = [p for p in now.todo if states[p.id] != "running"]
    free = [p for p in waiting if p.id not in covered and p.id not in queue.elsewhere]
    killed = {p.id for p in free if states[p.id] == "interrupted"}
    exhausted = {i for i in killed if store.failures(i) >= request.exec.max_attempts}
    gone: dict[str, tuple[slurm.Submission, list[str]]] = {}
    wanted = {p.id for p in now.points}
    for s, k, _ in queue.jobs:
        if request.sweep_name is not None and request.is_in_family(s.record["sweep"]):
            left = set(s.tasks[k]) - wanted - s.withdrawn
            if runs := [r for r in s.tasks[k] if r in left and store.state(r) == "missing"]:
                gone.setdefault(s.folder.name, (s, []))[1].extend(runs)
    return Work(
        todo=[p for p in free if p.id not in exhausted],
        queued=sum(p.id in covered for p in waiting),
        running=sum(s == "running" for s in states.values()),
        covered=any(p.id in covered for p in now.todo),
        exhausted=len(exhausted),
        removed=list(gone.values()),
        unknown=sum(p.id in queue.elsewhere for p in now.todo),
    )


def difference(request: Request, store: RunStore, now: Plan) -> dict[str, Any]:
    """Return how a submission would change the queue, as JSON values; empty without a cluster."""
    cluster = request.cluster
    if cluster.kind != "slurm" and files.status(slurm.home(store.root)) is None:
        return {}
    queue = slurm.look(store.root)
    work = work_of(request, store, now, queue)
    change: dict[str, Any] = {"queued": work.queued, "to_submit": len(work.todo)}
    change |= {"removed": work.n_removed}
    if queue.unavailable:
        change["unknown"] = queue.unavailable
    if cluster.kind == "slurm" and work.todo:
        try:
            known = slurm.partitions()
        except ClusterError:  # no Slurm here
            gpus = now.hardware.gpus_per_node
            partition = Partition("", True, 0, 0, gpus, float("inf"), frozenset())
        else:
            partition = slurm.partition_of(cluster, known)
        jobs = jobs_of(request, store, work.todo, now, partition)
        change["jobs"] = [{"jobs": len(j.tasks), **dataclasses.asdict(j.needed)} for j in jobs]
    return {"queue": change}


# ---------------------------------------------------------------- which jobs


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


@dataclass(frozen=True)
class Task:
    """The packs of one job and their settings."""

    packs: list[Pack]
    exec: Exec

    @property
    def points(self) -> list[Point]:
        """Runs of the job."""
        return [p for pack in self.packs for p in pack.points]


@dataclass(frozen=True)
class Jobs:
    """Jobs with the same resources."""

    tasks: list[Task]
    needed: JobResources


def hardware_of(request: Request) -> Hardware:
    """Return the hardware to plan for: `request.hardware`, or this machine if that is empty."""
    return from_plain(request.hardware) if request.hardware else detect.this_machine()


def jobs_of(
    request: Request, store: RunStore, todo: Sequence[Point], now: Plan, partition: Partition
) -> list[Jobs]:
    """Group runs into packs and packs into jobs; raise SpecError if a run fits on no device."""
    cluster, hardware, precision = request.cluster, now.hardware, todo[0].spec.precision
    if not cluster.gpus and request.hardware and hardware_of(request).has_speeds:
        cluster = dataclasses.replace(cluster, gpus=1)  # hardware= names GPUs
    measured = now.speeds.finished.get(None)
    if hardware.has_speeds:
        assumed = products_flops_s(hardware, precision)
    else:
        assumed = GPU_FLOPS if cluster.gpus else ASSUMED_FLOPS_PER_CORE[precision] * cluster.cpus
    found: dict[tuple[int, int], list[Task]] = {}
    for chosen, points in Planner(hardware, request.exec, now.speeds).settings(todo):
        size, threads = chosen.world_size, chosen.threads
        if nodes_of(size, cluster, partition) > 1:
            threads = threads or cluster.cpus  # such a job detects the cores of one node
        workers = workers_of(cluster, size)
        exec_ = dataclasses.replace(chosen, workers=workers, threads=threads)
        made = make_packs(points, now.states, store, Planner(hardware, exec_, now.speeds))
        for task in group(made, cluster, measured or size * assumed, size):
            # all jobs of an array request the same memory
            key = (size, memory_class(task, cluster))
            found.setdefault(key, []).append(Task(task, exec_))
    jobs = []
    for (size, _), tasks in sorted(found.items()):
        packs, flops_s = [t.packs for t in tasks], measured or size * assumed
        jobs.append(Jobs(tasks, resources_for(packs, cluster, flops_s, partition, size)))
    return jobs


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
    minutes, memory = cluster.time_min, cluster.mem_gib
    if minutes is None:
        estimate = math.ceil(MARGIN_TIME * longest_s / 60 + MARGIN_MIN)
        minutes = int(min(estimate, partition.time_min))
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


def check_fits(needed: JobResources, cluster: Cluster, partition: Partition) -> None:
    """Check that a job fits into the partition; raise ClusterError if not."""
    n, p = needed, partition
    less = "Lower cluster.{}, or choose another cluster.partition.".format
    rows = (
        (
            "nodes",
            n.nodes,
            p.nodes,
            f"Leave runs out with exec.max_gpus={p.nodes * p.gpus}.",
        ),
        ("gpus", n.gpus, p.gpus, less("gpus")),
        ("cpus", n.cpus, p.cpus, less(f"cpus, now {cluster.cpus} for each process, or workers")),
        ("mem_gib", n.mem_gib, p.memory_mib / 1024, less("mem_gib or exec.micro_batch_size")),
        ("time_min", n.time_min, p.time_min, less("time_min: a job at its limit requeues itself")),
    )
    for name, asked, most, remedy in rows:
        if asked > most:
            raise ClusterError(
                f"a job needs cluster.{name}={asked:g} ({n.nodes} nodes with {n.gpus} GPUs each), "
                f"but partition {p.name!r} allows at most {most:g}. {remedy}"
            )
    if n.time_min * 60 <= cluster.warn_s:
        raise ClusterError(
            f"a job of {n.time_min} min would be warned at once: lower cluster.warn_s."
        )
