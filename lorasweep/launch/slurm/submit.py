"""A sweep on a cluster: submit what is missing. Trains nothing.

Asking twice submits nothing twice: a run is submitted only if no live job has it before it. All
that decides this happens under one lock for the run folder, whoever asks; the rest is the store's:
a run that two jobs have is trained by the first that claims it.
"""

import dataclasses
import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorasweep.config import preflight as checks
from lorasweep.errors import ClusterError
from lorasweep.launch.slurm import client as slurm
from lorasweep.launch.slurm import resources as jobs
from lorasweep.launch.slurm import sbatch as launch
from lorasweep.launch.slurm import snapshot, submissions
from lorasweep.launch.slurm.cancel import prune, removed
from lorasweep.launch.slurm.reconcile import mend
from lorasweep.launch.slurm.resources import Ask
from lorasweep.launch.slurm.submissions import FOLLOW, Array, Queue, Submission
from lorasweep.plan import detect
from lorasweep.plan.estimate import ASSUMED_FLOPS_PER_CORE, Plan, make_plan, measured_flops
from lorasweep.plan.packing import Pack, make_packs
from lorasweep.spec.execution import Exec
from lorasweep.store import files
from lorasweep.store.claims import SILENCE_S
from lorasweep.store.run_store import FINAL, RunStore
from lorasweep.sweep.grid import Point
from lorasweep.sweep.request import Request

FOLLOW_GIB = 2.0
"""Memory of the job that follows: it plans, and fits and draws the answer. Assumption: several
times what imports take."""
IDLE = 3
"""Rounds without a finished run after which the following job gives up: nodes that break every job
would go on for ever."""


@dataclass
class Outcome:
    """What a command did, and what is on its way."""

    submitted: list[Submission] = field(default_factory=list)
    n_submitted: int = 0
    covered: bool = False
    """Some run that is not over is a live job's, queued or running."""
    queued: int = 0
    """Runs that live jobs have before them, those just submitted included."""
    running: int = 0
    exhausted: list[Point] = field(default_factory=list)
    """Runs that were killed exec.max_attempts times: not submitted again."""
    removed: dict[str, list[str]] = field(default_factory=dict)
    """Submission -> queued runs that are no longer part of the sweep."""
    untold: int = 0
    """Runs that jobs may have which this Slurm cannot tell about."""
    refused: str | None = None
    """Why Slurm took only a part."""
    pruned: int = 0
    scripts: list[Path] = field(default_factory=list)

    @property
    def waiting(self) -> bool:
        """Say whether there is something to wait for."""
        return bool(self.queued or self.running or self.scripts or self.untold)


def submit(
    request: Request,
    store: RunStore,
    points: Callable[[], list[Point]],
    say: Callable[[str], None],
    idle: int = 0,
    trainer: str | None = None,
) -> Outcome:
    """Submit the sweep's runs that are missing and that no live job has. `idle`: rounds without a
    finished run so far.

    Raises:
        ClusterError: no Slurm here, a partition that is not there, a job that no node can hold, a
            run folder that nodes
            cannot see, a disk that is too small, or Slurm's own refusal.
    """
    cluster = request.cluster
    slurm.require()
    partition = jobs.partition_of(cluster, slurm.partitions())
    if not cluster.shared:
        checks.check_visible(store.root, partition.hosts, checks.disks())
    _watch_others(store, points(), say)
    home = submissions.home(store.root)
    (home / "code").mkdir(parents=True, exist_ok=True)
    code = snapshot.take(home / "code")
    with submissions.locked(store.root, say):
        queue = mend(store.root, say)
        if queue.unknown:
            raise ClusterError(queue.unknown)
        todo, outcome, now = _missing(request, store, points(), queue)
        if request.prune:
            outcome.pruned = prune(queue, outcome.removed, say)
        if todo:
            packs = _packs(request, store, todo, now)
            flops_s = measured_flops(now.points, now.states, store)
            flops_s = flops_s or jobs.flops_per_s(
                cluster, ASSUMED_FLOPS_PER_CORE[todo[0].spec.precision]
            )
            tasks = jobs.group(packs, cluster, flops_s)
            ask = jobs.ask_for(tasks, cluster, flops_s, partition)
            jobs.check_fits(ask, cluster, partition)
            checks.check_disk(store.root, packs, ask.workers * cluster.parallel)
            say(f"jobs run {snapshot.say(code)}")
            given = [[p for pack in t for p in pack.points] for t in tasks]
            _submit(
                request,
                given,
                ask,
                code,
                queue,
                outcome,
                {"idle": idle, "trainer": trainer, "finished": _finished(now)},
            )
        elif (
            cluster.follow and cluster.submit and outcome.covered and not _followed(queue, request)
        ):
            ask = Ask(1, 0, 1.0, cluster.follow_min, 1)
            _submit(
                request,
                [],
                ask,
                code,
                queue,
                outcome,
                {"idle": idle, "trainer": trainer, "finished": _finished(now)},
            )
        return outcome


def _finished(now: Plan) -> int:
    return sum(s in FINAL for s in now.states.values())


def _exec_of(request: Request) -> Exec:
    return dataclasses.replace(request.exec, workers=jobs.workers(request.cluster))


def _packs(request: Request, store: RunStore, todo: list[Point], now: Plan) -> list[Pack]:
    exec_ = _exec_of(request)
    return make_packs(todo, now.states, store, exec_, now.hardware, now.throughputs)


def _missing(
    request: Request, store: RunStore, points: list[Point], queue: Queue
) -> tuple[list[Point], Outcome, Plan]:
    """Say which runs are to be submitted, and what is on its way already."""
    now = make_plan(points, store, request.exec, detect.this_machine())
    covered = queue.covered()
    outcome = Outcome(removed=removed(queue, request, now.points, store))
    outcome.running = sum(s == "running" for s in now.states.values())
    outcome.queued = sum(p.id in covered and now.states[p.id] != "running" for p in now.todo)
    outcome.covered = any(p.id in covered for p in now.todo)
    untold = queue.untold()
    outcome.untold = sum(p.id in untold for p in now.todo)
    todo = [
        p
        for p in now.todo
        if now.states[p.id] != "running" and p.id not in covered and p.id not in untold
    ]
    outcome.exhausted = [
        p
        for p in todo
        if now.states[p.id] == "stale" and store.failures(p.id) >= request.exec.max_attempts
    ]
    worn = {p.id for p in outcome.exhausted}
    return [p for p in todo if p.id not in worn], outcome, now


def _watch_others(store: RunStore, points: list[Point], say: Callable[[str], None]) -> None:
    """Watch the runs that other machines are said to work on, where only a heartbeat can tell,
    until it has told: an owner that died without a word would keep its runs for ever."""
    running = [i for i, s in store.states(p.id for p in points).items() if s == "running"]
    unsure = store.unsure(running)
    if unsure:
        say(
            f"watching {len(unsure)} run(s) that another machine is said to train, for at most {SILENCE_S + 1:.0f} s"
        )
    end = time.monotonic() + SILENCE_S + 1
    while unsure and time.monotonic() < end:
        time.sleep(2.0)
        unsure = store.unsure(i for i in unsure if store.state(i) == "running")


# ---------------------------------------------------------------- submitting


def _submit(
    request: Request,
    tasks: list[list[Point]],
    ask: Ask,
    code: Path,
    queue: Queue,
    outcome: Outcome,
    told: dict[str, Any],
) -> None:
    """Record the intent, then submit: arrays no longer than the cluster allows, and the job that
    follows them."""
    cluster = request.cluster
    folder = submissions.home(Path(request.exec.runs_dir)) / submissions.new_name(request.title)
    (folder / "tasks").mkdir(parents=True)
    (folder / "jobs").mkdir()
    longest = slurm.max_tasks()
    shares = range(0, len(tasks), longest)
    arrays = [
        Array(str(c), f"{folder.name}-{c}", k, min(longest, len(tasks) - k))
        for c, k in enumerate(shares)
    ]
    follow = (
        Array(FOLLOW, f"{folder.name}-{FOLLOW}", len(tasks), 1)
        if cluster.follow and cluster.submit
        else None
    )
    _write_tasks(folder, request, tasks, told, follow is not None)
    ids = [[p.id for p in runs] for runs in tasks]
    recorded = [*arrays, follow] if follow else arrays
    asked = [p.id for p in request.points]
    submissions.record(
        folder,
        request.title,
        asked,
        ids,
        recorded,
        code=code.name,
        script=not cluster.submit,
        cluster=slurm.setting("ClusterName"),
        host=socket.gethostname(),
        gpus=ask.gpus,
        cpus=ask.cpus,
        workers=ask.workers,
    )
    numbers: list[str] = []
    for array in arrays:
        if cluster.submit:
            try:
                numbers.append(launch.submit(folder, array, ask, cluster, code))
            except ClusterError as error:
                for refused in recorded[len(numbers) : None if not numbers else len(arrays)]:
                    submissions.note_array(folder, refused.part, None)
                if not numbers:
                    raise
                outcome.refused = str(
                    error
                )  # the arrays before it are on their way; the job that follows submits the rest
                break
            submissions.note_array(folder, array.part, numbers[-1])
        else:
            outcome.scripts.append(launch.write_script(folder, array, ask, cluster, code))
    if follow:
        others = {
            a.label(k)
            for s, k, _ in queue.live()
            if s.told["sweep"] == request.title
            for a in s.arrays
            if a.job and a.first <= k < a.first + a.n and a.part != FOLLOW
        }
        small = Ask(1, 0, FOLLOW_GIB, cluster.follow_min, 1)
        place = dataclasses.replace(
            cluster, gpus=0, partition=cluster.follow_partition or cluster.partition
        )
        try:
            number = launch.submit(folder, follow, small, place, code, sorted({*numbers, *others}))
        except ClusterError as error:
            submissions.note_array(folder, FOLLOW, None)
            outcome.refused = f"no job follows: {error}"
        else:
            submissions.note_array(folder, FOLLOW, number)
            _cancel_followers(queue, request)
    if numbers:
        taken = sum(len(t) for a in arrays[: len(numbers)] for t in tasks[a.first : a.first + a.n])
        outcome.n_submitted += taken
        outcome.queued += taken
        outcome.submitted.append(submissions.read(folder))


def _write_tasks(
    folder: Path, request: Request, tasks: list[list[Point]], told: dict[str, Any], follow: bool
) -> None:
    """Write what each task is told, and at the end what the job that follows is told."""
    exec_ = dataclasses.asdict(_exec_of(request))
    for k, runs in enumerate(tasks):
        task = {
            "runs": [p.spec.plain() for p in runs],
            "exec": exec_,
            "requeues": request.cluster.requeues,
            "skip": str(folder / "withdrawn.json"),
            "trainer": told["trainer"],
        }
        _write(folder / "tasks" / f"{k}.json", task)
    if follow:
        asked = {
            **request.plain(),
            "action": "run",
            "format": "text",
            "watch": False,
            "prune": False,
        }
        _write(folder / "request.json", asked)
        follow_task = {
            "follow": str(folder / "request.json"),
            "requeues": request.cluster.requeues,
            **told,
        }
        _write(folder / "tasks" / f"{len(tasks)}.json", follow_task)
    files.sync_folder(folder / "tasks")


def _write(path: Path, plain: Any) -> None:
    path.write_text(
        json.dumps(plain)
    )  # not synced one by one: the folder's record comes after, and a torn one fails loudly


def _followers(queue: Queue, request: Request) -> list[tuple[set[str], slurm.Job]]:
    """List the live following jobs of this sweep but this very one, each with the runs that it asks
    for."""
    mine = os.environ.get("SLURM_JOB_ID")
    asked = {
        s.name: set(s.told["asked"]) for s in queue.submissions if s.told["sweep"] == request.title
    }
    return [
        (asked[n], j) for n, j in queue.follows.items() if n in asked and j.live and j.id != mine
    ]


def _cancel_followers(queue: Queue, request: Request) -> None:
    """A new following job asks for all that older ones of the same runs ask for, so those are not
    needed. One that cannot be cancelled (another user's) does no harm."""
    ids = {p.id for p in request.points}
    old = [j.id for asked, j in _followers(queue, request) if asked <= ids]
    if old:
        slurm.cancel(old)


def _followed(queue: Queue, request: Request) -> bool:
    ids = {p.id for p in request.points}
    return any(asked >= ids for asked, _ in _followers(queue, request))


# ---------------------------------------------------------------- what would happen


def difference(request: Request, store: RunStore, now: Plan) -> dict[str, Any]:
    """Say what a submission would change in the queue: plain values; empty where nothing was ever
    submitted from here."""
    cluster = request.cluster
    if cluster.kind != "slurm" and not submissions.home(store.root).is_dir():
        return {}
    queue = submissions.look(store.root)
    todo, outcome, _ = _missing(request, store, now.points, queue)
    gone = sum(map(len, outcome.removed.values()))
    told: dict[str, Any] = {
        "queue": {"queued": outcome.queued, "to_submit": len(todo), "removed": gone}
    }
    if queue.unknown:
        told["queue"]["unknown"] = queue.unknown
    if cluster.kind == "slurm" and todo:
        flops_s = measured_flops(now.points, now.states, store)
        flops_s = flops_s or jobs.flops_per_s(
            cluster, ASSUMED_FLOPS_PER_CORE[todo[0].spec.precision]
        )
        packs = _packs(request, store, todo, now)
        tasks = jobs.group(packs, cluster, flops_s)
        anywhere = slurm.Partition("", True, 0, 0, 0, float("inf"), frozenset())
        told["queue"] |= {
            "jobs": len(tasks),
            "job": dataclasses.asdict(jobs.ask_for(tasks, cluster, flops_s, anywhere)),
        }
    return told


def difference_lines(told: dict[str, Any]) -> list[str]:
    """Write it for people."""
    if not told:
        return []
    queue = told["queue"]
    lines = []
    if "jobs" in queue:
        job = queue["job"]
        gpus = f", {job['gpus']} GPU(s)" if job["gpus"] else ""
        lines.append(
            f"  a submission would send {queue['to_submit']} runs in {queue['jobs']} job(s), each {job['cpus']} "
            f"processor(s){gpus}, {job['mem_gib']:g} GiB, {job['time_min']} min at most"
        )
    if queue["queued"]:
        lines.append(f"  {queue['queued']} runs are queued already")
    if queue["removed"]:
        lines.append(
            f"  {queue['removed']} queued run(s) are no longer part of the sweep: prune=true cancels them"
        )
    if "unknown" in queue:
        lines.append(f"  what is queued is not known: {queue['unknown']}")
    return lines
