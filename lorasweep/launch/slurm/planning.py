"""Plan a submission: group the runs that are in no live job into jobs."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorasweep.errors import ClusterError
from lorasweep.launch.slurm import client, resources, submissions
from lorasweep.launch.slurm.client import Partition
from lorasweep.launch.slurm.resources import JobResources
from lorasweep.launch.slurm.submissions import Queue
from lorasweep.plan import detect
from lorasweep.plan.forecast import settings_of
from lorasweep.plan.hardware import Hardware, from_plain
from lorasweep.plan.packing import Pack, make_packs
from lorasweep.plan.plan import Plan
from lorasweep.plan.time import ASSUMED_FLOPS_PER_CORE, assumed_flops
from lorasweep.spec.execution import Exec
from lorasweep.store import files
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import Point
from lorasweep.sweep.request import Request


@dataclass(frozen=True)
class Work:
    """The unfinished runs of a sweep, by their state in Slurm's queue."""

    todo: list[Point]
    """Runs to submit."""
    queued: int
    """Runs that wait in live jobs."""
    running: int
    covered: bool
    """Whether an unfinished run is in a live job, queued or running."""
    exhausted: list[Point]
    """Runs that were killed exec.max_attempts times, and are not submitted again."""
    removed: dict[str, list[str]]
    """Submission -> queued runs that are no longer part of the sweep."""
    unknown_runs: int
    """Runs in jobs of another cluster or user, which this Slurm does not show."""

    @property
    def n_removed(self) -> int:
        """Number of runs in `removed`."""
        return sum(map(len, self.removed.values()))


def work_of(request: Request, store: RunStore, now: Plan, queue: Queue) -> Work:
    """Compare the unfinished runs of the plan `now` with the queue."""
    states, covered, unknown = now.states, queue.covered(), queue.unknown_runs()
    waiting = [p for p in now.todo if states[p.id] != "running"]
    free = [p for p in waiting if p.id not in covered and p.id not in unknown]
    killed = {p.id for p in free if states[p.id] == "interrupted"}
    exhausted = {i for i in killed if store.failures(i) >= request.exec.max_attempts}
    removed: dict[str, list[str]] = {}
    wanted = {p.id for p in now.points}
    for s, k, _ in queue.live():
        if request.sweep_name is not None and request.is_in_family(s.record["sweep"]):
            left = set(s.tasks[k]) - wanted - s.withdrawn
            not_started = [r for r in s.tasks[k] if r in left and store.state(r) == "missing"]
            if not_started:
                removed.setdefault(s.name, []).extend(not_started)
    return Work(
        todo=[p for p in free if p.id not in exhausted],
        queued=sum(p.id in covered for p in waiting),
        running=sum(s == "running" for s in states.values()),
        covered=any(p.id in covered for p in now.todo),
        exhausted=[p for p in free if p.id in exhausted],
        removed=removed,
        unknown_runs=sum(p.id in unknown for p in now.todo),
    )


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
    measured = now.measured_flops_s
    if hardware.has_speeds:
        assumed = assumed_flops(precision, hardware) / hardware.gpus
    elif cluster.gpus:
        assumed = resources.GPU_FLOPS
    else:
        assumed = ASSUMED_FLOPS_PER_CORE[precision] * cluster.cpus
    found: dict[tuple[int, int], list[Task]] = {}
    for chosen, points in settings_of(todo, hardware, request.exec):
        size, threads = chosen.world_size, chosen.threads
        if resources.nodes_of(size, cluster, partition) > 1:
            threads = threads or cluster.cpus  # such a job detects the cores of one node
        workers = resources.workers_of(cluster, size)
        exec_ = dataclasses.replace(chosen, workers=workers, threads=threads)
        made = make_packs(points, now.states, store, exec_, hardware, now.throughputs)
        for task in resources.group(made, cluster, measured or size * assumed, size):
            # all jobs of an array request the same memory
            key = (size, resources.memory_class(task, cluster))
            found.setdefault(key, []).append(Task(task, exec_))
    jobs = []
    for (size, _), tasks in sorted(found.items()):
        packs, flops_s = [t.packs for t in tasks], measured or size * assumed
        needed = resources.resources_for(packs, cluster, flops_s, partition, size)
        jobs.append(Jobs(tasks, needed))
    return jobs


def difference(request: Request, store: RunStore, now: Plan) -> dict[str, Any]:
    """Return how a submission would change the queue, as JSON values; empty without a cluster."""
    cluster = request.cluster
    if cluster.kind != "slurm" and files.status(submissions.home(store.root)) is None:
        return {}
    queue = submissions.look(store.root)
    work = work_of(request, store, now, queue)
    change: dict[str, Any] = {"queued": work.queued, "to_submit": len(work.todo)}
    change |= {"removed": work.n_removed}
    if queue.unavailable:
        change["unknown"] = queue.unavailable
    if cluster.kind == "slurm" and work.todo:
        try:
            known = client.partitions()
        except ClusterError:  # no Slurm here
            gpus = now.hardware.gpus_per_node
            partition = Partition("", True, 0, 0, gpus, float("inf"), frozenset())
        else:
            partition = client.partition_of(cluster, known)
        jobs = jobs_of(request, store, work.todo, now, partition)
        change["jobs"] = [{"jobs": len(j.tasks), **dataclasses.asdict(j.needed)} for j in jobs]
    return {"queue": change}
