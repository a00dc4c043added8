"""Record what was submitted to a cluster, and reconcile the records with Slurm's queue.

    <runs_dir>/.slurm/
        lock/                     one submitting command at a time
        code/<snapshot>/          code that the jobs run
        <name>/submission.json    written before the first sbatch: sweep, and runs of each task
               tasks/<k>.json     runs of task k
               request.json       request, for the follow-up job
               manifest.json      checksums of tasks and request
               jobs/              submitit's files, and logs of the jobs
        notes/<name>/array-<c>.json   written after an sbatch: Slurm id, or abandoned
                     withdrawn.json   runs that no task may start any more
                     ended.json       how the jobs ended, when all have ended

This module must not depend on submitit and planning.
"""

import json
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lorasweep.errors import ClusterError
from lorasweep.launch.slurm import client
from lorasweep.store import files
from lorasweep.store.claims import Lock

GIVE_UP_S = 600.0
"""Seconds after a submission in which accounting records may be late."""
LOCK_S = 600.0
"""Seconds to wait for another command that is submitting."""
FOLLOW = "follow"
"""Value of `part` for the array of the follow-up job."""
Notify = Callable[[str], None]
"""Prints a line for the user."""


@dataclass(frozen=True)
class Array:
    """One sbatch: tasks `first` to `first + n - 1` of a submission, or the follow-up job."""

    part: str
    """Number of the array, or FOLLOW."""
    name: str
    """Unique job name."""
    first: int
    n: int
    job: str | None = None
    """Slurm id; None if not recorded (yet)."""
    abandoned: bool = False
    """Whether the array never reached Slurm, or was cancelled."""


@dataclass
class Submission:
    """One submission, read from its folder."""

    folder: Path
    record: dict[str, Any]
    """Content of submission.json."""
    arrays: list[Array]
    withdrawn: set[str] = field(default_factory=set)

    @property
    def name(self) -> str:
        """Name of the folder: title of the sweep, and a random part."""
        return self.folder.name

    @property
    def tasks(self) -> list[list[str]]:
        """Run ids of each task."""
        return self.record["tasks"]

    def log(self, label: str) -> Path:
        """Return the log file of a job (12, 12_3)."""
        return self.folder / "jobs" / f"{label}_0_log.out"

    def complete(self, array: Array, number: str) -> bool:
        """Return whether submitit has written the files of all tasks of an array."""
        labels = [number] if array.n == 1 else [f"{number}_{k}" for k in range(array.n)]
        there = set(files.names(self.folder / "jobs"))
        return all(f"{label}_submitted.pkl" in there for label in labels)


@dataclass
class Queue:
    """The open submissions, matched with Slurm's jobs."""

    submissions: list[Submission]
    jobs: list[tuple[Submission, int, client.Job]] = field(default_factory=list)
    """(submission, task number, job) of the jobs that are live or have recently ended."""
    follows: dict[str, client.Job] = field(default_factory=dict)
    """Submission name -> follow-up job."""
    strays: list[client.Job] = field(default_factory=list)
    """Live jobs of arrays that are not recorded or were abandoned."""
    unavailable: str | None = None
    """Why Slurm could not be queried; then no run counts as queued."""
    unknown_jobs: list[Submission] = field(default_factory=list)
    """Submissions of another cluster."""

    def live(self) -> list[tuple[Submission, int, client.Job]]:
        """List the tasks that are running or may still run, oldest submission first."""
        live = ((s, k, j) for s, k, j in self.jobs if j.live)
        return sorted(live, key=lambda found: (found[0].record["created_s"], found[1]))

    def unknown_runs(self) -> set[str]:
        """Return the runs of `unknown_jobs`."""
        return {rid for s in self.unknown_jobs for task in s.tasks for rid in task}

    def covered(self) -> dict[str, client.Job]:
        """Map each run in a live task to its job."""
        live = self.live()
        return {rid: j for s, k, j in live for rid in s.tasks[k] if rid not in s.withdrawn}


def home(runs_dir: Path) -> Path:
    """Return the folder of all submissions."""
    return runs_dir / ".slurm"


def new_name(title: str) -> str:
    """Return a unique name for a submission's folder and jobs."""
    return f"{re.sub(r'[^A-Za-z0-9_.-]', '_', title)}-{os.urandom(4).hex()}"


def note(folder: Path, name: str) -> Path:
    """Return the path of a note on the submission in `folder`."""
    return folder.parent / "notes" / folder.name / name


def _read_note(folder: Path, name: str) -> Any:
    return files.read_json(note(folder, name))


def _write_note(folder: Path, name: str, content: Any) -> None:
    path = note(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomic(path, json.dumps(content).encode())


def write_record(
    folder: Path,
    sweep: str,
    asked: Iterable[str],
    tasks: Sequence[Sequence[str]],
    arrays: Iterable[Array],
    **more: Any,
) -> None:
    """Write submission.json. If this command dies, its job names serve to find the jobs.

    `asked`: all runs of the sweep's first stage, submitted now or not.
    """
    content = {
        "sweep": sweep,
        "asked": sorted(asked),
        "created_s": time.time(),
        "tasks": [list(t) for t in tasks],
        "arrays": [{k: getattr(a, k) for k in ("part", "name", "first", "n")} for a in arrays],
        **more,
    }
    files.write_atomic(folder / "submission.json", json.dumps(content).encode())


def note_array(folder: Path, part: str, job: str | None) -> None:
    """Record the Slurm id of an array, or None for an abandoned one."""
    _write_note(folder, f"array-{part}.json", {"job": job, "abandoned": job is None})


def withdraw(submission: Submission, ids: Iterable[str]) -> None:
    """Forbid all tasks of a submission to start these runs."""
    submission.withdrawn |= set(ids)
    _write_note(submission.folder, "withdrawn.json", sorted(submission.withdrawn))


def read(folder: Path) -> Submission | None:
    """Read a submission; None if it was never recorded. Raises ClusterError if it is damaged."""
    if (content := files.read(folder / "submission.json")) is None:
        return None
    damaged = ClusterError(
        f"{folder}/submission.json or a note on it is damaged. Cancel its jobs with scancel, then "
        "delete the folder."
    )
    try:
        record = json.loads(content)
    except ValueError:
        raise damaged from None
    arrays = []
    for plain in record["arrays"]:
        seen = _read_note(folder, f"array-{plain['part']}.json") or {}
        number = seen.get("job")
        if number is not None and not str(number).isdigit():  # an argument of Slurm's commands
            raise damaged
        arrays.append(Array(**plain, job=number, abandoned=seen.get("abandoned", False)))
    return Submission(folder, record, arrays, set(_read_note(folder, "withdrawn.json") or []))


def read_all(runs_dir: Path, over: bool = False) -> list[Submission]:
    """List the submissions, oldest first; with `over`, also those that have ended."""
    names = set(files.names(home(runs_dir))) - {"lock", "code", "notes"}
    folders = [home(runs_dir) / name for name in names]
    found = [read(f) for f in folders if over or _read_note(f, "ended.json") is None]
    return sorted((s for s in found if s), key=lambda s: s.record["created_s"])


def look(runs_dir: Path) -> Queue:
    """Query Slurm once about all open submissions. Writes nothing."""
    open_ = read_all(runs_dir)
    queue = Queue(open_)
    if not open_:
        return queue
    try:
        here = client.setting("ClusterName")
        queue.unknown_jobs = [s for s in open_ if s.record["cluster"] != here]
        queue.submissions = [s for s in open_ if s not in queue.unknown_jobs]
        names = {a.name: (s, a) for s in queue.submissions for a in s.arrays}
        jobs = client.queue(list(names))
    except ClusterError as error:
        queue.unavailable = str(error)
        return queue
    for job in jobs:
        submission, array = names[job.name]
        if array.job != job.array:
            if job.live:
                queue.strays.append(job)
        elif array.part == FOLLOW:
            queue.follows[submission.name] = job
        else:
            queue.jobs.append((submission, array.first + (job.task or 0), job))
    return queue


def locked(runs_dir: Path, notify: Notify) -> AbstractContextManager[None]:
    """Hold the lock of a run folder's submissions in a `with` block."""
    lock = Lock(home(runs_dir) / "lock", client.RunningJobs())
    return lock.held(LOCK_S, lambda who: notify(f"waiting for {who}, which is submitting now"))


def reconcile(runs_dir: Path, notify: Notify) -> Queue:
    """Reconcile the records with Slurm's queue, and return the queue. The lock must be held.

    If a command died while submitting, its complete arrays are recorded and its incomplete arrays
    are cancelled. Jobs that Slurm holds after a failed start are released.
    """
    queue = look(runs_dir)
    if queue.unavailable:
        return queue
    strays = {j.name: j.array for j in queue.strays}
    changed = False
    for s in queue.submissions:
        for array in s.arrays:
            if array.job is None and (not array.abandoned or array.name in strays):
                _settle(s, array, strays.get(array.name), notify)
                changed = True
    live = {s.name for s, _, _ in queue.live()} | {n for n, j in queue.follows.items() if j.live}
    names = {a.name: s.name for s in queue.submissions for a in s.arrays}
    live |= {names[j.name] for j in queue.strays}
    for s in list(queue.submissions):  # if none of its jobs is live, record how they ended
        if s.name in live or not all(a.job or a.abandoned for a in s.arrays):
            continue
        sent = [a for a in s.arrays if a.job]
        ends = client.ended(str(a.job) for a in sent)
        behind = len(ends) < sum(a.n for a in sent) or any(a.abandoned for a in s.arrays)
        if behind and time.time() - s.record["created_s"] < GIVE_UP_S:
            continue  # accounting is still behind
        with suppress(OSError):  # if the disk is full, the next command tries again
            _write_note(s.folder, "ended.json", {k: asdict(end) for k, end in ends.items()})
        queue.submissions.remove(s)
    jobs = [*(j for _, _, j in queue.live()), *queue.follows.values()]
    if stuck := [j.label for j in jobs if j.stuck]:
        notify(f"released {len(stuck)} job(s) that Slurm held after a failed start")
        client.release(stuck)
    return look(runs_dir) if changed else queue


def _settle(s: Submission, array: Array, number: str | None, notify: Notify) -> None:
    """Record the Slurm id of an array, or that it is abandoned.

    `number`: Slurm id of its live job, if there is one.
    """
    if number is None:
        accounted = client.named(array.name)
        number = accounted[0].partition("_")[0] if accounted else None
    # "script": of version 0.2, submitted by the user without submitit's files
    complete = number is not None and (s.record.get("script") or s.complete(array, number))
    if complete and not array.abandoned:
        notify(f"adopted job {number} of {s.name}, from a command that died after submitting it")
    elif number is not None:
        notify(f"cancelled job {number} of {s.name}, from a command that died while submitting it")
        if denied := client.cancel([number]):
            notify(f"  it could not be cancelled, and will fail ({denied})")
        number = None
    note_array(s.folder, array.part, number)


def causes(runs_dir: Path, owners: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return run id -> how the Slurm job that owned the run ended; `owners`: id -> owner.json."""
    jobs = {rid: o["slurm"]["job"] for rid, o in owners.items() if o.get("slurm")}
    ends: dict[str, tuple[str, client.Ended]] = {}
    with suppress(ClusterError):
        ends = client.by_number(jobs.values()) if jobs else {}
    submitted = read_all(runs_dir, over=True) if ends else []
    logs = {a.job: s.log for s in submitted for a in s.arrays if a.job}
    found = {}
    for rid, job in jobs.items():
        if job in ends:
            label, end = ends[job]
            log = logs.get(label.partition("_")[0])
            found[rid] = end.cause() + (f"; log {log(label)}" if log else "")
    return found
