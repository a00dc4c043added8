"""Submit the missing runs of a sweep to a cluster, and cancel queued runs.

A run is submitted only if no live job has it. One lock per run folder protects this decision. If
two jobs have a run nevertheless, the first job that claims the run trains it.
"""

import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorasweep.errors import ClusterError
from lorasweep.launch.container import container_of
from lorasweep.launch.slurm import queue as slurm
from lorasweep.launch.slurm.queue import FOLLOW, Job, Partition, Queue
from lorasweep.launch.slurm.resources import JobResources, Jobs, jobs_of
from lorasweep.launch.slurm.sbatch import send, write
from lorasweep.launch.slurm.snapshot import prepare
from lorasweep.plan.detect import hardware_of
from lorasweep.plan.planner import Plan, make_plan
from lorasweep.store import files
from lorasweep.store.files import Notify
from lorasweep.store.owners import SILENCE_S
from lorasweep.store.run_store import FINISHED, RunStore
from lorasweep.sweep.grid import Point
from lorasweep.sweep.request import Request


@dataclass
class Work:
    """The unfinished runs of a sweep in Slurm's queue, and what a command has submitted.

    `queued`, `running`, `exhausted` (killed exec.max_attempts times) and the fields with n_ count
    runs. `refused`: why Slurm did not take some jobs.
    """

    todo: list[Point]
    queued: int
    running: int
    covered: list[Job]
    """Live jobs with unfinished runs, also jobs of another sweep."""
    exhausted: int
    removed: str
    """Which runs wait in jobs of this sweep and are not of this command, in words; else empty."""
    folder: Path = Path()
    """Folder with records and logs of the jobs that were submitted."""
    sent: dict[str, int] = field(default_factory=dict)
    """Slurm id of an array -> its number of jobs."""
    follow: str | None = None
    """Slurm id of the follow-up job."""
    n_submitted: int = 0
    refused: str | None = None


def work_of(request: Request, store: RunStore, now: Plan, queue: Queue) -> Work:
    """Compare the unfinished runs of the plan `now` with the queue."""
    states, covered = now.states, queue.covered()
    waiting = [p for p in now.todo if states[p.id] != "running"]
    free = [p for p in waiting if p.id not in covered]
    killed = {p.id for p in free if states[p.id] == "interrupted"}
    exhausted = {i for i in killed if store.failures(i) >= request.exec.max_attempts}
    wanted, family = {p.id for p in now.points}, f"{request.sweep_name}-{request.scale}-"
    gone, stop = set[str](), dict[str, None]()
    for s, runs, j in queue.jobs:
        ours = j.state == "PENDING" and f"{s.sweep}-".startswith(family)
        if more := {i for i in runs if ours and i not in wanted and store.state(i) == "missing"}:
            again = [k.label for f, k in queue.follows if f.sweep == s.sweep]
            gone, stop = gone | more, stop | dict.fromkeys([j.label, *again])
    said = (
        f"{len(gone)} queued run(s) of this sweep are not of this command, and will train; to take "
        f"them back: scancel {' '.join(stop)}, then this command again"
    )
    return Work(
        todo=[p for p in free if p.id not in exhausted],
        queued=len(waiting) - len(free),
        running=sum(s == "running" for s in states.values()),
        covered=list(dict.fromkeys(covered[p.id] for p in now.todo if p.id in covered)),
        exhausted=len(exhausted),
        removed=said if gone else "",
    )


def difference(request: Request, store: RunStore, now: Plan) -> dict[str, Any]:
    """Return how a submission would change the queue, as JSON values; empty without a cluster."""
    cluster = request.cluster
    if cluster.kind != "slurm" and files.status(slurm.home(store.root)) is None:
        return {}
    queue = slurm.look(store.root)
    work = work_of(request, store, now, queue)
    change: dict[str, Any] = {"queued": work.queued, "to_submit": len(work.todo)}
    change["removed"] = work.removed
    if queue.unavailable:
        change["unknown"] = queue.unavailable
    if cluster.kind == "slurm" and work.todo:
        partition = Partition(now.hardware.gpus_per_node)
        with suppress(ClusterError):  # no Slurm here
            partition = slurm.partition_of(cluster)
        jobs = jobs_of(request, store, work.todo, now, partition)
        change["jobs"] = [{"jobs": len(j.tasks), **dataclasses.asdict(j.needed)} for j in jobs]
    return {"queue": change}


def submit(
    request: Request,
    store: RunStore,
    points: Callable[[], list[Point]],
    notify: Notify,
    trainer: str | None = None,
    idle: int = 0,
) -> Work:
    """Submit the sweep's missing runs that are not in a live job, and a follow-up job.

    `idle`: follow-up jobs in a row, so far, before which no update was saved.
    Raises ClusterError if Slurm cannot or will not take the jobs, StoreError if another command is
    submitting and does not end.
    """
    cluster = request.cluster
    partition, code = prepare(cluster, store.root)
    watch_others(store, points(), notify)
    with slurm.settled(store.root, notify) as queue:
        now = make_plan(points(), store, request.exec, hardware_of(request.hardware))
        work = work_of(request, store, now, queue)
        jobs: list[Jobs] = []
        if work.todo:
            jobs = jobs_of(request, store, work.todo, now, partition)
            notify(f"jobs run code snapshot {code.folder.name}")
        mine = os.environ.get("SLURM_JOB_ID")
        follows = [j.id for s, j in queue.follows if s.sweep == request.title and j.id != mine]
        if not jobs and (follows or not (work.covered and cluster.follow)):
            return work
        container = container_of(cluster, request.exec)
        common = {"requeues": cluster.requeues, "trainer": trainer}
        inside = {"container": container and dataclasses.asdict(container)}
        runs: list[list[str]] = []
        lines, arrays = [], []
        # task indices begin at 0 and must be below MaxArraySize
        most = max(1, int(slurm.setting("MaxArraySize") or 1001) - 1)
        for same in jobs:
            settings = {"exec": dataclasses.asdict(same.exec), **common, **inside}
            for k in range(0, len(same.tasks), most):
                part = same.tasks[k : k + most]
                arrays.append((len(runs), len(part), same.needed))
                for task in part:
                    of_task = [p for pack in task for p in pack.points]
                    runs.append([p.id for p in of_task])
                    lines.append({"runs": [p.spec.plain() for p in of_task], **settings})
        if cluster.follow:
            again = {**request.plain(), "action": "run", "format": "text"}
            before = {"idle": idle, "updates": updates_of(now.points, store)}
            lines.append({"follow": again, **common, **before})
        work.folder = folder = write(store.root, request.title, runs, lines)
        for first, n, needed in arrays:
            try:
                work.sent[send(folder, str(first), first, n, needed, cluster, code)] = n
            except ClusterError as error:
                if not work.sent:
                    shutil.rmtree(folder, ignore_errors=True)
                    raise
                work.refused = str(error)
                break  # the follow-up job will submit the rest
            work.n_submitted += sum(map(len, runs[first : first + n]))
        work.queued += work.n_submitted
        if cluster.follow:  # it waits for these jobs and the others of these runs
            where = cluster.follow_partition or cluster.partition
            small = dataclasses.replace(cluster, gpus=0, partition=where, container=None)
            needed = JobResources(1, 0, 2.0, cluster.follow_min, 1)  # plans, fits, figures: 2 GiB
            after = sorted({*work.sent, *(job.label for job in work.covered)})
            try:
                work.follow = send(folder, FOLLOW, len(runs), 1, needed, small, code, after)
            except ClusterError as error:
                work.refused = f"no follow-up job: {error}"
            if work.follow:  # it replaces the others
                with suppress(ClusterError):
                    slurm.cancel(follows)
        return work


def cancel(request: Request, store: RunStore, notify: Notify) -> tuple[int, int]:
    """Cancel the sweep's jobs; return the number of jobs and of their unfinished runs."""
    if files.status(slurm.home(store.root)) is None:  # nothing was submitted
        return 0, 0
    with slurm.settled(store.root, notify) as queue:
        live = [(runs, j) for s, runs, j in queue.jobs if s.sweep == request.title]
        follows = [j.label for s, j in queue.follows if s.sweep == request.title]
        states = store.states({r for runs, _ in live for r in runs})
        slurm.cancel([*follows, *(j.label for _, j in live)])
        return len(live), sum(state not in FINISHED for state in states.values())


def updates_of(points: Sequence[Point], store: RunStore) -> int:
    """Count the updates of finished runs, and those in the checkpoints of the others."""
    states = store.states(p.id for p in points)
    ended = {i for i, state in states.items() if state in FINISHED}
    return sum(p.spec.steps if p.id in ended else store.saved_step(p.id) for p in points)


def watch_others(store: RunStore, points: list[Point], notify: Notify) -> None:
    """Watch heartbeats until it is clear which owners on other machines are alive."""
    states = store.states(p.id for p in points)
    if unsure := store.unsure(i for i, state in states.items() if state == "running"):
        notify(
            f"watching {len(unsure)} run(s) that another machine seems to train, for at most "
            f"{SILENCE_S + 1:.0f} s"
        )
    end = time.monotonic() + SILENCE_S + 1
    while unsure and time.monotonic() < end:
        time.sleep(2)
        unsure = store.unsure(i for i in unsure if store.state(i) == "running")
