"""Plan a submission: the runs that no live job has, grouped into jobs."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorasweep.errors import ClusterError
from lorasweep.launch.slurm import cancel, partitions, resources, submissions
from lorasweep.launch.slurm.partitions import Partition
from lorasweep.launch.slurm.resources import JobResources
from lorasweep.launch.slurm.submissions import Queue
from lorasweep.plan import detect
from lorasweep.plan.forecast import settings_of
from lorasweep.plan.hardware import Hardware, from_plain
from lorasweep.plan.packing import Pack, make_packs
from lorasweep.plan.plan import Plan
from lorasweep.plan.time import ASSUMED_FLOPS_PER_CORE, assumed_flops
from lorasweep.spec.execution import Cluster, Exec
from lorasweep.store import files
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import Point
from lorasweep.sweep.request import Request


@dataclass(frozen=True)
class Work:
    """The unfinished runs of a sweep, compared with the queue."""

    todo: list[Point]
    """Runs to submit."""
    queued: int
    """Runs that wait in live jobs."""
    running: int
    covered: bool
    """True: at least one unfinished run is in a live job, queued or running."""
    exhausted: list[Point]
    """Runs that were killed exec.max_attempts times. They are not submitted again."""
    removed: dict[str, list[str]]
    """Submission -> queued runs that are no longer part of the sweep."""
    unknown_runs: int
    """Runs in jobs that this Slurm does not show: of another cluster or another user."""

    @property
    def n_removed(self) -> int:
        """Number of queued runs that are no longer part of the sweep."""
        return sum(map(len, self.removed.values()))


def work_of(request: Request, store: RunStore, now: Plan, queue: Queue) -> Work:
    """Compare a plan with the queue: which runs to submit, and which are already in jobs."""
    states, covered, unknown = now.states, queue.covered(), queue.unknown_runs()
    waiting = [p for p in now.todo if states[p.id] != "running"]
    free = [p for p in waiting if p.id not in covered and p.id not in unknown]
    exhausted = [
        p
        for p in free
        if states[p.id] == "interrupted" and store.failures(p.id) >= request.exec.max_attempts
    ]
    worn = {p.id for p in exhausted}
    return Work(
        todo=[p for p in free if p.id not in worn],
        queued=sum(p.id in covered for p in waiting),
        running=sum(s == "running" for s in states.values()),
        covered=any(p.id in covered for p in now.todo),
        exhausted=exhausted,
        removed=cancel.removed(queue, request, now.points, store),
        unknown_runs=sum(p.id in unknown for p in now.todo),
    )


@dataclass(frozen=True)
class Task:
    """The packs of one job, and the settings that they train with."""

    packs: list[Pack]
    exec: Exec

    @property
    def points(self) -> list[Point]:
        """Runs of the job."""
        return [p for pack in self.packs for p in pack.points]


@dataclass(frozen=True)
class Jobs:
    """Jobs that all need the same of the cluster."""

    tasks: list[Task]
    needed: JobResources

    @property
    def packs(self) -> list[Pack]:
        """Packs of all jobs."""
        return [pack for task in self.tasks for pack in task.packs]


def hardware_of(request: Request) -> Hardware:
    """Return the hardware that jobs are planned for: the chosen one, or this machine."""
    return from_plain(request.hardware) if request.hardware else detect.this_machine()


def cluster_of(request: Request) -> Cluster:
    """Return the cluster's settings. Jobs that are planned for GPUs ask for at least one."""
    cluster = request.cluster
    if cluster.gpus or not (request.hardware and hardware_of(request).has_speeds):
        return cluster
    return dataclasses.replace(cluster, gpus=1)


def _assumed(cluster: Cluster, precision: str, hardware: Hardware) -> float:
    """Return the assumed operations per second of a worker: by the GPUs' file, if one is chosen."""
    if hardware.has_speeds:
        return assumed_flops(precision, hardware) / hardware.gpus
    return resources.flops_per_s(cluster, ASSUMED_FLOPS_PER_CORE[precision])


def jobs_of(
    request: Request, store: RunStore, todo: Sequence[Point], now: Plan, partition: Partition
) -> list[Jobs]:
    """Group runs into packs, and packs into jobs: lists of jobs that need the same.

    Raises:
        SpecError: runs that do not fit on any number of GPUs.
    """
    cluster, hardware = cluster_of(request), now.hardware
    measured = now.measured_flops_s
    assumed = _assumed(cluster, todo[0].spec.precision, hardware)
    found: dict[tuple[int, int], list[Task]] = {}
    for chosen, points in settings_of(todo, hardware, request.exec):
        size, exec_ = chosen.world_size, _in_job(chosen, cluster, partition)
        packs = make_packs(points, now.states, store, exec_, hardware, now.throughputs)
        for task in resources.group(packs, cluster, measured or size * assumed, size):
            key = (size, resources.memory_class(task, cluster))
            found.setdefault(key, []).append(Task(task, exec_))
    return [
        Jobs(
            tasks,
            resources.resources_for(
                [t.packs for t in tasks], cluster, measured or size * assumed, partition, size
            ),
        )
        for (size, _), tasks in sorted(found.items())
    ]


def _in_job(exec_: Exec, cluster: Cluster, partition: Partition) -> Exec:
    """Return the settings that a job trains with."""
    size, threads = exec_.world_size, exec_.threads
    if resources.nodes_of(size, resources.per_node(cluster, partition)) > 1:
        threads = threads or cluster.cpus  # the job sees the cores of one node
    workers = resources.workers_of(cluster, size)
    return dataclasses.replace(exec_, workers=workers, threads=threads)


def _partition(cluster: Cluster, hardware: Hardware) -> Partition:
    """Return the partition that jobs would go to; where there is no Slurm, one of such nodes."""
    try:
        known = partitions.partitions()
    except ClusterError:
        return Partition("", True, 0, 0, hardware.gpus_per_node, float("inf"), frozenset())
    return partitions.partition_of(cluster, known)


def difference(request: Request, store: RunStore, now: Plan) -> dict[str, Any]:
    """Return what a submission would change in the queue, as JSON values.

    Empty without a cluster and without earlier submissions.
    """
    cluster = request.cluster
    if cluster.kind != "slurm" and files.status(submissions.home(store.root)) is None:
        return {}
    queue = submissions.look(store.root)
    work = work_of(request, store, now, queue)
    change: dict[str, Any] = {
        "queued": work.queued,
        "to_submit": len(work.todo),
        "removed": work.n_removed,
    }
    if queue.unavailable:
        change["unknown"] = queue.unavailable
    if cluster.kind == "slurm" and work.todo:
        jobs = jobs_of(request, store, work.todo, now, _partition(cluster, now.hardware))
        change["jobs"] = [{"jobs": len(j.tasks), **dataclasses.asdict(j.needed)} for j in jobs]
    return {"queue": change}
