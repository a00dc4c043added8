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
from lorasweep.launch.slurm.planning import Jobs, Work
from lorasweep.launch.slurm.reconcile import Notify, reconcile
from lorasweep.launch.slurm.resources import JobResources
from lorasweep.launch.slurm.sbatch import Description
from lorasweep.launch.slurm.snapshot import Snapshot
from lorasweep.launch.slurm.submissions import FOLLOW, Array, Queue, Submission
from lorasweep.plan.estimate import Plan, make_plan
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
            resources.check_fits(jobs.needed, cluster, partition)
            at_once = jobs.needed.workers * cluster.parallel
            preflight.check_disk(store.root, jobs.packs, at_once)
            notify(f"jobs run {snapshot.describe(code)}")
            _submit(request, jobs, code, queue, outcome, following)
        elif work.covered and wanted:
            none = Jobs([], JobResources(1, 0, 1.0, cluster.follow_min, 1))
            _submit(request, none, code, queue, outcome, following)
        return outcome


def _finished(now: Plan) -> int:
    return sum(s in FINAL for s in now.states.values())


# ---------------------------------------------------------------- submitting


def _submit(
    request: Request,
    jobs: Jobs,
    code: Snapshot,
    queue: Queue,
    outcome: Outcome,
    following: Following,
) -> None:
    """Record the submission, then submit its arrays and the follow-up job."""
    cluster, tasks = request.cluster, jobs.points
    folder = submissions.home(Path(request.exec.runs_dir)) / submissions.new_name(request.title)
    arrays = _arrays(folder.name, len(tasks))
    follow = None
    if cluster.follow and cluster.submit:
        follow = Array(FOLLOW, f"{folder.name}-{FOLLOW}", len(tasks), 1)
    with files.own_only():
        _write_tasks(folder, request, tasks, following, follow is not None)
        submissions.write_record(
            folder,
            request.title,
            [p.id for p in request.points],
            [[p.id for p in runs] for runs in tasks],
            [*arrays, follow] if follow else arrays,
            code=code.folder.name,
            script=not cluster.submit,
            cluster=client.setting("ClusterName"),
            host=socket.gethostname(),
            gpus=jobs.needed.gpus,
            cpus=jobs.needed.cpus,
            workers=jobs.needed.workers,
        )
    described = [Description(folder, array, jobs.needed, cluster, code) for array in arrays]
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
        outcome.n_submitted += sum(len(t) for a in taken for t in tasks[a.first : a.first + a.n])
        submission = submissions.read(folder)
        assert submission is not None
        outcome.submitted.append(submission)


def _arrays(name: str, n_tasks: int) -> list[Array]:
    """Split the tasks into arrays of at most the cluster's limit."""
    longest = client.max_tasks()
    return [
        Array(str(c), f"{name}-{c}", first, min(longest, n_tasks - first))
        for c, first in enumerate(range(0, n_tasks, longest))
    ]


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
    tasks: list[list[Point]],
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
        "exec": dataclasses.asdict(planning.exec_of(request)),
        "requeues": requeues,
        "skip": str(submissions.note(folder, "withdrawn.json")),
        "trainer": following.trainer,
    }
    for k, runs in enumerate(tasks):
        specs = [p.spec.plain() for p in runs]
        _write(folder, f"tasks/{k}.json", {"runs": specs, **common}, sums)
    if follow:
        again = {"action": "run", "format": "text", "watch": False, "prune": False}
        _write(folder, "request.json", {**request.plain(), **again}, sums)
        task = {
            "follow": str(folder / "request.json"),
            "requeues": requeues,
            **dataclasses.asdict(following),
        }
        _write(folder, f"tasks/{len(tasks)}.json", task, sums)
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
