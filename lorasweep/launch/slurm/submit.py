"""Submit the missing runs of a sweep to a cluster. Trains nothing.

Running the command twice submits nothing twice: a run is submitted only if it is not in a live job.
One lock per run folder protects this decision, for all users. If a run is in two jobs all the same,
the first one that claims it trains it.
"""

import dataclasses
import hashlib
import json
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorasweep.errors import ClusterError
from lorasweep.launch import guard
from lorasweep.launch.slurm import (
    cancel,
    client,
    following_job,
    partitions,
    planning,
    preflight,
    resources,
    sbatch,
    snapshot,
    submissions,
)
from lorasweep.launch.slurm.following_job import Following
from lorasweep.launch.slurm.planning import Jobs, Task, Work
from lorasweep.launch.slurm.reconcile import Notify, reconcile
from lorasweep.launch.slurm.resources import JobResources
from lorasweep.launch.slurm.sbatch import Description
from lorasweep.launch.slurm.snapshot import Snapshot
from lorasweep.launch.slurm.submissions import FOLLOW, Array, Queue, Submission
from lorasweep.plan.plan import Plan, make_plan
from lorasweep.store import files
from lorasweep.store.run_store import FINAL, RunStore
from lorasweep.sweep.grid import Point
from lorasweep.sweep.request import Request


@dataclass
class Outcome:
    """What a command submitted, and what was already in jobs."""

    work: Work
    submitted: list[Submission] = field(default_factory=list)
    n_submitted: int = 0
    refused: str | None = None
    """Why Slurm accepted only a part."""
    pruned: int = 0
    scripts: list[Path] = field(default_factory=list)

    @property
    def queued(self) -> int:
        """Number of runs that wait in live jobs, with those just submitted."""
        return self.work.queued + self.n_submitted

    @property
    def waiting(self) -> bool:
        """Whether there is something to wait for."""
        return bool(self.queued or self.work.running or self.scripts or self.work.unknown_runs)


def submit(
    request: Request,
    store: RunStore,
    points: Callable[[], list[Point]],
    notify: Notify,
    following: Following,
) -> Outcome:
    """Submit the sweep's missing runs that are not in a live job.

    Raises:
        ClusterError: there is no Slurm here, the partition does not exist, no node is large enough,
            nodes cannot see the run folder, or Slurm refused the jobs.
        StoreError: the disk is too small, or another command is submitting and does not end.
    """
    cluster = request.cluster
    client.require()
    partition = partitions.partition_of(cluster, partitions.partitions())
    if not cluster.shared:
        preflight.check_visible(store.root, partition.hosts, preflight.mounts())
    preflight.watch_others(store, points(), notify)
    home = submissions.home(store.root)
    (home / "code").mkdir(parents=True, exist_ok=True)
    for shared in (home, home / "code"):
        files.protect_entries(shared)
    code = snapshot.take(home / "code")
    with submissions.locked(store.root, notify):
        queue = reconcile(store.root, notify)
        if queue.unavailable:
            raise ClusterError(queue.unavailable)
        now = make_plan(points(), store, request.exec, planning.hardware_of(request))
        work = planning.work_of(request, store, now, queue)
        outcome = Outcome(work)
        following = dataclasses.replace(following, finished=_finished(now))
        if request.prune:
            outcome.pruned = cancel.prune(queue, work.removed, notify)
        wanted = cluster.follow and cluster.submit and not following_job.exists(queue, request)
        if work.todo:
            jobs = planning.jobs_of(request, store, work.todo, now, partition)
            for same in jobs:
                resources.check_fits(same.needed, cluster, partition)
            at_once = sum(same.needed.workers for same in jobs) * cluster.parallel
            packs = [pack for same in jobs for pack in same.packs]
            preflight.check_disk(store.root, packs, at_once)
            notify(f"jobs run {snapshot.describe(code)}")
            _submit(request, jobs, code, queue, outcome, following)
        elif work.covered and wanted:
            _submit(request, [], code, queue, outcome, following)
        return outcome


def _finished(now: Plan) -> int:
    return sum(s in FINAL for s in now.states.values())


# ---------------------------------------------------------------- submitting


def _submit(
    request: Request,
    jobs: list[Jobs],
    code: Snapshot,
    queue: Queue,
    outcome: Outcome,
    following: Following,
) -> None:
    """Record the submission, then submit its arrays and the follow-up job."""
    cluster = request.cluster
    tasks = [task for same in jobs for task in same.tasks]
    folder = submissions.home(Path(request.exec.runs_dir)) / submissions.new_name(request.title)
    needed = _arrays(folder.name, jobs)
    arrays = [array for array, _ in needed]
    follow = None
    if cluster.follow and cluster.submit:
        follow = Array(FOLLOW, f"{folder.name}-{FOLLOW}", len(tasks), 1)
    with files.own_only():
        _write_tasks(folder, request, tasks, following, follow is not None)
        submissions.write_record(
            folder,
            request.title,
            [p.id for p in request.points],
            [[p.id for p in task.points] for task in tasks],
            [*arrays, follow] if follow else arrays,
            code=code.folder.name,
            script=not cluster.submit,
            cluster=client.setting("ClusterName"),
            host=socket.gethostname(),
        )
    described = [Description(folder, array, each, cluster, code) for array, each in needed]
    if not cluster.submit:
        outcome.scripts += map(sbatch.write_script, described)
        return
    numbers = _submit_arrays(described, follow, outcome)
    if follow:
        outcome.refused = (
            following_job.submit(request, folder, follow, code, queue, numbers) or outcome.refused
        )
    if numbers:
        taken = arrays[: len(numbers)]
        outcome.n_submitted += sum(
            len(t.points) for a in taken for t in tasks[a.first : a.first + a.n]
        )
        submission = submissions.read(folder)
        assert submission is not None
        outcome.submitted.append(submission)


def _arrays(name: str, jobs: Sequence[Jobs]) -> list[tuple[Array, JobResources]]:
    """Split the tasks into arrays of at most the cluster's limit, each with what its jobs need."""
    longest, first = client.max_tasks(), 0
    found: list[tuple[Array, JobResources]] = []
    for same in jobs:
        left = len(same.tasks)
        while left:
            part = str(len(found))
            array = Array(part, f"{name}-{part}", first, min(longest, left))
            found.append((array, same.needed))
            first, left = first + array.n, left - array.n
    return found


def _submit_arrays(
    described: Sequence[Description], follow: Array | None, outcome: Outcome
) -> list[str]:
    """Submit arrays until Slurm refuses one, and return their ids.

    Raises:
        ClusterError: Slurm refused the first one.
    """
    numbers: list[str] = []
    for d in described:
        try:
            numbers.append(sbatch.submit(d))
        except ClusterError as error:
            for refused in described[len(numbers) :]:
                submissions.note_array(refused.folder, refused.array.part, None)
            if not numbers:
                if follow:
                    submissions.note_array(d.folder, follow.part, None)
                raise
            # earlier arrays are submitted; the follow-up job will submit the rest
            outcome.refused = str(error)
            break
        submissions.note_array(d.folder, d.array.part, numbers[-1])
    return numbers


def _write_tasks(
    folder: Path,
    request: Request,
    tasks: list[Task],
    following: Following,
    follow: bool,
) -> None:
    """Write the file of each task, that of the follow-up job, and a manifest of them all.

    Raises:
        ClusterError: others could write them, whatever mode this process gives them.
    """
    for new in (folder, folder / "tasks", folder / "jobs"):
        files.own_folder(new)
    sums: dict[str, str] = {}
    requeues = request.cluster.requeues
    common = {
        "requeues": requeues,
        "skip": str(submissions.note(folder, "withdrawn.json")),
        "trainer": following.trainer,
    }
    for k, task in enumerate(tasks):
        specs = [p.spec.plain() for p in task.points]
        plain = {"runs": specs, "exec": dataclasses.asdict(task.exec), **common}
        _write(folder, f"tasks/{k}.json", plain, sums)
    if follow:
        again = {"action": "run", "format": "text", "watch": False, "prune": False}
        _write(folder, "request.json", {**request.plain(), **again}, sums)
        last = {
            "follow": str(folder / "request.json"),
            "requeues": requeues,
            **dataclasses.asdict(following),
        }
        _write(folder, f"tasks/{len(tasks)}.json", last, sums)
    _write(folder, guard.MANIFEST, dict(sums), sums)
    files.sync_folder(folder / "tasks")
    manifest = folder / guard.MANIFEST
    problem = guard.foreign(map(str, (folder, manifest.parent / "tasks", manifest)))
    if problem:
        raise ClusterError(
            f"{problem}, so others could make your jobs run their code. Choose a run folder on a "
            "file system that keeps permissions: exec.runs_dir=FOLDER."
        )


def _write(folder: Path, name: str, plain: Any, sums: dict[str, str]) -> None:
    """Write a JSON file of the job folder, and add its SHA-256 to `sums`."""
    # not flushed one by one: the submission is recorded later, and an incomplete file is an error
    content = json.dumps(plain).encode()
    (folder / name).write_bytes(content)
    sums[name] = hashlib.sha256(content).hexdigest()
