"""Submit the missing runs of a sweep to a cluster, and cancel queued runs.

A run is submitted only if no live job has it. One lock per run folder protects this decision. If
two jobs have a run nevertheless, the first job that claims the run trains it.
"""

import dataclasses
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorasweep.errors import ClusterError, StoreError
from lorasweep.launch.slurm import client, guard, planning, resources, sbatch, snapshot, submissions
from lorasweep.launch.slurm.client import Partition
from lorasweep.launch.slurm.container import container_of
from lorasweep.launch.slurm.planning import Jobs, Task, Work
from lorasweep.launch.slurm.resources import JobResources
from lorasweep.launch.slurm.sbatch import Description
from lorasweep.launch.slurm.snapshot import Snapshot
from lorasweep.launch.slurm.submissions import FOLLOW, Array, Notify, Queue, Submission
from lorasweep.plan.memory import checkpoint_bytes
from lorasweep.plan.packing import Pack
from lorasweep.plan.plan import make_plan
from lorasweep.spec.execution import Cluster
from lorasweep.store import checkpoint, files
from lorasweep.store.claims import SILENCE_S
from lorasweep.store.run_store import FINAL, RunStore
from lorasweep.sweep.grid import Point
from lorasweep.sweep.request import Request

RUN_BYTES, STEP_BYTES = 40_000, 250
"""Measured disk space in bytes: a finished run without its records, and the record of an update."""
LOCAL_FILE_SYSTEMS = ("tmpfs", "ramfs", "overlay", "squashfs")
LOCAL_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm", "/run")
WATCH_POLL_S = 2.0
FOLLOW_GIB = 2.0
"""Assumed memory of the follow-up job (plans, fits, figures): a few times that after imports."""
MAX_IDLE = 3
"""Follow-up jobs in a row without a saved update, after which no more jobs are submitted."""


@dataclass(frozen=True)
class FollowUp:
    """A follow-up job: submits the missing runs or, if there are none, writes the answer."""

    command: Sequence[str]
    """Arguments of Python, before the path of the task file."""
    trainer: str | None = None
    idle: int = 0
    """Follow-up jobs in a row, so far, before which no update was saved."""
    updates: int = 0
    """`updates_of` the runs when the job was submitted."""


@dataclass
class Outcome:
    """Jobs that a command submitted, and the sweep's work before that (`planning.Work`)."""

    work: Work
    submitted: list[Submission] = field(default_factory=list)
    n_submitted: int = 0
    refused: str | None = None
    """Why Slurm refused some of the jobs; None: it refused none."""
    pruned: int = 0

    @property
    def queued(self) -> int:
        """Number of runs that wait in live jobs, including those just submitted."""
        return self.work.queued + self.n_submitted

    @property
    def waiting(self) -> bool:
        """Whether runs are in jobs, or may be."""
        return bool(self.queued or self.work.running or self.work.unknown_runs)


def submit(
    request: Request,
    store: RunStore,
    points: Callable[[], list[Point]],
    notify: Notify,
    follow_up: FollowUp,
) -> Outcome:
    """Submit the sweep's missing runs that are not in a live job.

    Raises:
        ClusterError: no Slurm or partition, no node is large enough or sees the run folder, or
            Slurm refused the jobs.
        StoreError: the disk is too small, or another command is submitting and does not end.
    """
    cluster = request.cluster
    partition, code = prepare(cluster, store.root)
    watch_others(store, points(), notify)
    with submissions.locked(store.root, notify):
        queue = submissions.reconcile(store.root, notify)
        if queue.unavailable:
            raise ClusterError(queue.unavailable)
        now = make_plan(points(), store, request.exec, planning.hardware_of(request))
        outcome = Outcome(planning.work_of(request, store, now, queue))
        work, ids = outcome.work, {p.id for p in request.points}
        if request.prune:
            outcome.pruned = work.n_removed
            empty = []  # pending tasks, all of whose runs are withdrawn
            for s in [s for s in queue.submissions if s.name in work.removed]:
                submissions.withdraw(s, work.removed[s.name])
                waiting = [(k, j) for t, k, j in queue.live() if t is s and j.state == "PENDING"]
                empty += [j.label for k, j in waiting if s.withdrawn >= set(s.tasks[k])]
            if empty and (denied := client.cancel(empty)):
                notify(f"some jobs could not be cancelled; they will train nothing ({denied})")
        jobs: list[Jobs] = []
        if work.todo:
            jobs = planning.jobs_of(request, store, work.todo, now, partition)
            for same in jobs:
                resources.check_fits(same.needed, cluster, partition)
            at_once = sum(same.needed.workers for same in jobs) * cluster.parallel
            packs = [pack for same in jobs for task in same.tasks for pack in task.packs]
            check_disk(store.root, packs, at_once)
            notify(f"jobs run {snapshot.describe(code)}")
        covered = any(served >= ids for served, _ in _followers(queue, request))
        if jobs or (work.covered and cluster.follow and not covered):
            follow_up = dataclasses.replace(follow_up, updates=updates_of(now.points, store))
            _submit(request, jobs, code, queue, outcome, follow_up)
        return outcome


def updates_of(points: Sequence[Point], store: RunStore) -> int:
    """Count the updates of finished runs, and those in the checkpoints of the others."""
    states = store.states(p.id for p in points)
    ended = {i for i, state in states.items() if state in FINAL}
    return sum(p.spec.steps if p.id in ended else store.saved_step(p.id) for p in points)


def prepare(cluster: Cluster, root: Path) -> tuple[Partition, Snapshot]:
    """Check that this machine can submit and the nodes see the run folder; copy the code there.

    Raises ClusterError if not.
    """
    if os.pathsep in str(root):
        raise ClusterError(
            f"exec.runs_dir={root} has a '{os.pathsep}' in its name, at which PYTHONPATH splits: "
            "jobs would not import the copied code in it. Choose a folder without it."
        )
    client.require()
    partition = client.partition_of(cluster, client.partitions())
    if not cluster.shared:
        check_visible(root, partition.hosts, mounts())
    home = submissions.home(root)
    (home / "code").mkdir(parents=True, exist_ok=True)
    return partition, snapshot.take(home / "code")


def _submit(
    request: Request,
    jobs: list[Jobs],
    code: Snapshot,
    queue: Queue,
    outcome: Outcome,
    follow_up: FollowUp,
) -> None:
    """Record the submission, then submit it; raise ClusterError if its first array is refused."""
    cluster = request.cluster
    tasks = [task for same in jobs for task in same.tasks]
    folder = submissions.home(Path(request.exec.runs_dir)) / submissions.new_name(request.title)
    described: list[Description] = []
    # task indices begin at 0 and must be below MaxArraySize
    first, most = 0, max(1, int(client.setting("MaxArraySize") or 1001) - 1)
    for same in jobs:
        end = first + len(same.tasks)
        while first < end:
            part = str(len(described))
            array = Array(part, f"{folder.name}-{part}", first, min(most, end - first))
            described.append(Description(folder, array, same.needed, cluster, code))
            first += array.n
    arrays = [d.array for d in described]
    if cluster.follow:
        arrays.append(Array(FOLLOW, f"{folder.name}-{FOLLOW}", len(tasks), 1))
    write_submission(folder, request, tasks, arrays, follow_up, code)
    numbers: list[str] = []
    for d in described:
        try:
            numbers.append(sbatch.submit(d))
        except ClusterError as error:
            for refused in arrays if not numbers else arrays[len(numbers) : len(described)]:
                submissions.note_array(folder, refused.part, None)
            if not numbers:
                raise
            outcome.refused = str(error)
            break  # the follow-up job will submit the rest
        submissions.note_array(folder, d.array.part, numbers[-1])
    if cluster.follow:  # a follow-up job for these arrays and the sweep's other live jobs
        others = {j.label for s, _, j in queue.live() if s.record["sweep"] == request.title}
        after = tuple(sorted({*numbers, *others}))
        partition = cluster.follow_partition or cluster.partition
        small = dataclasses.replace(cluster, gpus=0, partition=partition, container=None)
        needed = JobResources(1, 0, FOLLOW_GIB, cluster.follow_min, 1)
        try:
            last = sbatch.submit(Description(folder, arrays[-1], needed, small, code, after))
        except ClusterError as error:
            submissions.note_array(folder, FOLLOW, None)
            outcome.refused = f"no follow-up job: {error}"
        else:
            submissions.note_array(folder, FOLLOW, last)
            ids = {p.id for p in request.points}
            old = [j.id for served, j in _followers(queue, request) if served <= ids]
            if old:  # the new follow-up job replaces them
                client.cancel(old)
    if numbers:
        n_tasks = sum(a.n for a in arrays[: len(numbers)])
        outcome.n_submitted += sum(len(t.points) for t in tasks[:n_tasks])
        submission = submissions.read(folder)
        assert submission is not None
        outcome.submitted.append(submission)


def write_submission(
    folder: Path,
    request: Request,
    tasks: list[Task],
    arrays: Sequence[Array],
    follow_up: FollowUp,
    code: Snapshot,
) -> None:
    """Write task files, manifest and record; raise ClusterError if other users could write them."""
    requeues = request.cluster.requeues
    skip = str(submissions.note(folder, "withdrawn.json"))
    container = container_of(request.cluster, request.exec)
    common = {"requeues": requeues, "skip": skip, "trainer": follow_up.trainer}
    common |= {"container": container and dataclasses.asdict(container)}
    contents: dict[str, Any] = {}
    for k, task in enumerate(tasks):
        specs, settings = [p.spec.plain() for p in task.points], dataclasses.asdict(task.exec)
        contents[f"tasks/{k}.json"] = {"runs": specs, "exec": settings, **common}
    if any(a.part == FOLLOW for a in arrays):
        again = {"action": "run", "format": "text", "watch": False, "prune": False}
        contents["request.json"] = {**request.plain(), **again}
        last = {"follow": str(folder / "request.json"), "requeues": requeues}
        contents[f"tasks/{len(tasks)}.json"] = {**last, **dataclasses.asdict(follow_up)}
    asked, runs = [p.id for p in request.points], [[p.id for p in task.points] for task in tasks]
    write_files(folder, contents, request.title, asked, runs, arrays, code)


def write_files(
    folder: Path,
    contents: dict[str, Any],
    title: str,
    asked: list[str],
    tasks: list[list[str]],
    arrays: Sequence[Array],
    code: Snapshot,
) -> None:
    """Write files of JSON values by relative path, their manifest, and then submission.json.

    Raises ClusterError if other users could write them.
    """
    sums: dict[str, str] = {}
    for new in (folder, folder / "tasks", folder / "jobs"):
        new.mkdir()
    # no flush of each file: the record is written last, and `guard` refuses incomplete files
    for name, plain in [*contents.items(), (guard.MANIFEST, sums)]:
        content = json.dumps(plain).encode()
        (folder / name).write_bytes(content)
        sums[name] = hashlib.sha256(content).hexdigest()
    files.sync(folder / "tasks")
    written = (folder, folder / "tasks", folder / guard.MANIFEST)
    if problem := guard.untrusted(map(str, written)):
        raise ClusterError(
            f"{problem}, so others could make your jobs run their code. Choose a run folder on a "
            "file system that keeps permissions: exec.runs_dir=FOLDER."
        )
    submissions.write_record(
        folder,
        title,
        asked,
        tasks,
        arrays,
        code=code.folder.name,
        cluster=client.setting("ClusterName"),
        host=socket.gethostname(),
    )


def _followers(queue: Queue, request: Request) -> list[tuple[set[str], client.Job]]:
    """List this sweep's other live follow-up jobs, each with the sweep's runs."""
    mine = os.environ.get("SLURM_JOB_ID")
    same = [s for s in queue.submissions if s.record["sweep"] == request.title]
    found = [(set(s.record["asked"]), queue.follows.get(s.name)) for s in same]
    return [(served, j) for served, j in found if j and j.live and j.id != mine]


def cancel(request: Request, store: RunStore, notify: Notify) -> tuple[int, int]:
    """Cancel the sweep's jobs; return the number of jobs and of their unfinished runs.

    A submission belongs to the sweep if it has the same title and some of these runs. Raises
    ClusterError if there is no Slurm here, or it did not cancel some jobs.
    """
    if files.status(submissions.home(store.root)) is None:  # nothing was submitted
        return 0, 0
    client.require()
    ids = {p.id for p in request.points}
    with submissions.locked(store.root, notify):
        queue = submissions.reconcile(store.root, notify)
        same = [s for s in queue.submissions if s.record["sweep"] == request.title]
        mine = {s.name: s for s in same if not ids.isdisjoint(s.record["asked"])}
        live = [(s, k, j) for s, k, j in queue.live() if s.name in mine]
        follows = [j.label for n, j in queue.follows.items() if n in mine and j.live]
        withdrawn = {r for s, _, _ in live for r in s.withdrawn}
        runs = {r for s, k, _ in live for r in s.tasks[k]} - withdrawn
        ending = [r for r in runs if store.state(r) not in FINAL]
        labels = [*follows, *(j.label for _, _, j in live)]
        if denied := client.cancel(labels):
            raise ClusterError(f"some jobs could not be cancelled: {denied}.")
        return len(live), len(ending)


# ---------------------------------------------------------------- checks before submitting


def mounts() -> list[tuple[str, str]]:
    """List this machine's (mount point, type of file system); empty if the system hides them."""
    try:
        lines = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return []
    return [(f[1].replace("\\040", " "), f[2]) for f in map(str.split, lines) if len(f) > 2]


def check_visible(folder: Path, hosts: frozenset[str], mounted: Sequence[tuple[str, str]]) -> None:
    """Check that the nodes `hosts` see the run folder; raise ClusterError if not."""
    if hosts <= {socket.gethostname(), socket.gethostname().partition(".")[0], "localhost"}:
        return
    folder = folder.resolve()
    above = [m for m in mounted if folder.is_relative_to(m[0])]
    file_system = max(above, key=lambda m: len(m[0]), default=("/", ""))[1]
    local = next((f for f in LOCAL_FOLDERS if folder.is_relative_to(f)), None)
    if file_system in LOCAL_FILE_SYSTEMS:
        local = f"its {file_system}"
    if local:
        raise ClusterError(
            f"run folder {folder}: {local} is local to this machine, so the nodes "
            f"({', '.join(sorted(hosts)[:3])}, ...) cannot see it. Set exec.runs_dir=FOLDER (or "
            "LORASWEEP_RUNS) on a shared file system. If it is on one, set cluster.shared=true."
        )


def check_disk(root: Path, packs: Sequence[Pack], at_once: int) -> None:
    """Raise StoreError if the disk is too small for all results, and checkpoints of some packs.

    `at_once`: number of packs that have checkpoints at the same time.
    """
    checkpoints = sorted((checkpoint_bytes(p.spec for p in k.points) for k in packs), reverse=True)
    results = sum(RUN_BYTES + STEP_BYTES * p.spec.steps for pack in packs for p in pack.points)
    need = sum(checkpoints[:at_once]) + results
    free = checkpoint.free_bytes(root)
    if free < need:
        raise StoreError(
            f"the disk of {root} has {free / 2**30:.2f} GiB free, and this sweep needs up to "
            f"{need / 2**30:.2f} GiB (results, and the checkpoints of runs that train together)."
            " Free some space, choose exec.runs_dir=FOLDER, or lower cluster.parallel."
        )


def watch_others(store: RunStore, points: list[Point], notify: Notify) -> None:
    """Watch heartbeats until it is clear which owners on other machines are alive."""
    running = [i for i, s in store.states(p.id for p in points).items() if s == "running"]
    if unsure := store.unsure(running):
        notify(
            f"watching {len(unsure)} run(s) that another machine seems to train, for at most "
            f"{SILENCE_S + 1:.0f} s"
        )
    end = time.monotonic() + SILENCE_S + 1
    while unsure and time.monotonic() < end:
        time.sleep(WATCH_POLL_S)
        unsure = store.unsure(i for i in unsure if store.state(i) == "running")
