"""Submit the missing runs of a sweep, or one command, to a cluster, and cancel queued runs.

A run is submitted only if no live job has it. One lock per run folder protects this decision. If
two jobs have a run nevertheless, the first job that claims the run trains it.
"""

import dataclasses
import json
import os
import re
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorasweep.errors import ClusterError, StoreError
from lorasweep.launch.slurm import guard, job, planning, snapshot
from lorasweep.launch.slurm import queue as slurm
from lorasweep.launch.slurm.container import VARIABLE, container_of
from lorasweep.launch.slurm.planning import JobResources, Jobs, Work
from lorasweep.launch.slurm.queue import FOLLOW, RUNNING, Partition
from lorasweep.launch.slurm.snapshot import Snapshot
from lorasweep.plan.load import checkpoint_bytes
from lorasweep.plan.planner import Pack, make_plan
from lorasweep.spec.execution import Cluster, Exec
from lorasweep.store import checkpoint, files
from lorasweep.store.claims import JOB_VARIABLE, SILENCE_S
from lorasweep.store.files import Notify
from lorasweep.store.run_store import FINAL, RunStore
from lorasweep.sweep.grid import Point
from lorasweep.sweep.request import Request

RUN_BYTES, STEP_BYTES = 40_000, 250
"""Measured disk space in bytes: a finished run without its records, and the record of an update."""
LOCAL_FILE_SYSTEMS = ("tmpfs", "ramfs", "overlay", "squashfs")
LOCAL_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm", "/run")
WATCH_POLL_S = 2.0
FOLLOW_COMMAND = ("-u", "-m", "lorasweep", "--follow")
"""Arguments of Python in a follow-up job, before the path of the file with its task."""
FOLLOW_GIB = 2.0
"""Assumed memory of the follow-up job (plans, fits, figures): a few times that after imports."""
COMMAND_GIB, COMMAND_MIN = 16.0, 60
"""Memory and time limit in minutes of a job with one command, if the profile sets none."""


@dataclass
class Outcome:
    """Jobs that a command submitted, and the sweep's work before that."""

    work: Work
    folder: Path = Path()
    """Folder with records and logs of the jobs."""
    sent: dict[str, int] = field(default_factory=dict)
    """Slurm id of an array -> its number of jobs."""
    follow: str | None = None
    """Slurm id of the follow-up job."""
    n_submitted: int = 0
    """Number of runs in the jobs."""
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
        return bool(self.queued or self.work.running or self.work.unknown)


def submit(
    request: Request,
    store: RunStore,
    points: Callable[[], list[Point]],
    notify: Notify,
    trainer: str | None = None,
    idle: int = 0,
) -> Outcome:
    """Submit the sweep's missing runs that are not in a live job, and a follow-up job.

    `idle`: follow-up jobs in a row, so far, before which no update was saved.

    Raises:
        ClusterError: no Slurm or partition, no node is large enough or sees the run folder, or
            Slurm refused the jobs.
        StoreError: the disk is too small, or another command is submitting and does not end.
    """
    cluster = request.cluster
    partition, code = prepare(cluster, store.root)
    watch_others(store, points(), notify)
    with slurm.locked(store.root, notify):
        queue = slurm.settle(store.root, notify)
        now = make_plan(points(), store, request.exec, planning.hardware_of(request))
        outcome = Outcome(planning.work_of(request, store, now, queue))
        work = outcome.work
        if request.prune:
            outcome.pruned = work.n_removed
            for s, runs in work.removed:
                s.withdraw(runs)
            pending = [(s, k, j) for s, k, j in queue.jobs if j.state == "PENDING"]
            runs_of = [(set(s.tasks[k]), s, j) for s, k, j in pending]  # a command has no runs
            empty = [j.label for runs, s, j in runs_of if runs and runs <= s.withdrawn]
            if denied := slurm.cancel(empty):
                notify(f"some jobs could not be cancelled; they will train nothing ({denied})")
        jobs: list[Jobs] = []
        if work.todo:
            jobs = planning.jobs_of(request, store, work.todo, now, partition)
            for same in jobs:
                planning.check_fits(same.needed, cluster, partition)
            at_once = sum(same.needed.workers for same in jobs) * cluster.parallel
            packs = [pack for same in jobs for task in same.tasks for pack in task.packs]
            check_disk(store.root, packs, at_once)
            notify(f"jobs run {snapshot.describe(code)}")
        asked = {s.folder for s in queue.submissions if s.record["sweep"] == request.title}
        mine = os.environ.get("SLURM_JOB_ID")
        follows = [j.id for f, j in queue.follows.items() if f in asked and j.id != mine]
        if jobs or (work.covered and cluster.follow and not follows):
            updates = updates_of(now.points, store)
            last = {"trainer": trainer, "idle": idle, "updates": updates}
            covered = queue.covered()  # also by jobs of another sweep that has the same runs
            after = {covered[p.id].label for p in now.todo if p.id in covered}
            _submit(request, jobs, code, outcome, last, sorted(after))
            if outcome.follow:  # it replaces the others
                slurm.cancel(follows)
        return outcome


def _submit(
    request: Request,
    jobs: list[Jobs],
    code: Snapshot,
    outcome: Outcome,
    last: dict[str, Any],
    live: list[str],
) -> None:
    """Write the tasks, then submit them; raise ClusterError if the first array is refused.

    `last`: values for the follow-up job, which waits for these jobs and the `live` ones.
    """
    cluster, root = request.cluster, Path(request.exec.runs_dir)
    outcome.folder = folder = _new_folder(root, request.title)
    container = container_of(cluster, request.exec)
    common: dict[str, Any] = {"requeues": cluster.requeues, "trainer": last["trainer"]}
    common |= {"container": container and dataclasses.asdict(container)}
    common |= {"skip": str(folder / "withdrawn.json")}
    tasks = [task for same in jobs for task in same.tasks]
    lines = [
        {"runs": [p.spec.plain() for p in t.points], "exec": dataclasses.asdict(t.exec), **common}
        for t in tasks
    ]
    if cluster.follow:
        again = {"action": "run", "format": "text", "watch": False, "prune": False}
        command = [*FOLLOW_COMMAND, str(folder / guard.TASKS)]
        asked: dict[str, Any] = {"follow": {**request.plain(), **again}, "command": command}
        lines.append({**asked, "requeues": cluster.requeues, **last})
    runs = [[p.id for p in task.points] for task in tasks]
    _write(folder, request.title, runs, lines)
    # task indices begin at 0 and must be below MaxArraySize
    first, most = 0, max(1, int(slurm.setting("MaxArraySize") or 1001) - 1)
    arrays = []
    for same in jobs:
        for n in [min(most, len(same.tasks) - k) for k in range(0, len(same.tasks), most)]:
            arrays.append(Array(folder, str(first), first, n, same.needed, cluster, code))
            first += n
    for array in arrays:
        try:
            outcome.sent[array.submit()] = array.n
        except ClusterError as error:
            if not outcome.sent:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            outcome.refused = str(error)
            break  # the follow-up job will submit the rest
        outcome.n_submitted += sum(map(len, runs[array.first : array.first + array.n]))
    if cluster.follow:
        where = cluster.follow_partition or cluster.partition
        small = dataclasses.replace(cluster, gpus=0, partition=where, container=None)
        needed, after = (
            JobResources(1, 0, FOLLOW_GIB, cluster.follow_min, 1),
            {*outcome.sent, *live},
        )
        follow = Array(folder, FOLLOW, len(tasks), 1, needed, small, code, tuple(sorted(after)))
        try:
            outcome.follow = follow.submit()
        except ClusterError as error:
            outcome.refused = f"no follow-up job: {error}"


def _new_folder(root: Path, title: str) -> Path:
    """Return a new folder for a submission; its name is the start of the names of its jobs."""
    return slurm.home(root) / f"{re.sub('[^A-Za-z0-9_.-]', '_', title)}-{os.urandom(4).hex()}"


def _write(folder: Path, title: str, runs: list[list[str]], tasks: Sequence[Any]) -> None:
    """Write the tasks and the record of a submission; `runs`: run ids by task.

    Raises ClusterError if other users could write them.
    """
    folder.mkdir()
    (folder / "jobs").mkdir()
    lines = "".join(json.dumps(task) + "\n" for task in tasks)
    files.write_atomic(folder / guard.TASKS, lines.encode())
    if why := guard.untrusted(map(str, (folder, *folder.iterdir()))):
        raise ClusterError(
            f"{why}. Choose a run folder on a file system that keeps permissions: "
            "exec.runs_dir=FOLDER."
        )
    record = {"sweep": title, "created_s": time.time(), "tasks": runs}
    record["cluster"] = slurm.setting("ClusterName")
    files.write_atomic(folder / "submission.json", json.dumps(record).encode())


def submit_command(
    cluster: Cluster, exec_: Exec, arguments: Sequence[str], name: str, notify: Notify
) -> str:
    """Submit a job that runs `python -m lorasweep ARGUMENTS cluster=local`; return a line to print.

    The line names the job and its log. The function does not wait for the job. The job gets the
    profile's partition, GPUs and CPU cores of one job, and runs a snapshot of this code in the
    current folder. At its time limit it stops the command and queues itself again. While a job of
    this name is queued or running, no other one is submitted, whatever its arguments.

    Raises:
        ClusterError: no Slurm or partition, no node is large enough or sees the run folder, or
            Slurm refused the job.
        StoreError: another command is submitting and does not end.
    """
    root = Path(exec_.runs_dir)
    RunStore(root).prepare()
    partition, code = prepare(cluster, root)
    workers = planning.workers_of(cluster)
    limit = cluster.time_min or int(min(COMMAND_MIN, partition.time_min))
    memory = cluster.mem_gib or COMMAND_GIB
    needed = JobResources(cluster.cpus * workers, cluster.gpus, memory, limit, workers)
    planning.check_fits(needed, cluster, partition)
    with slurm.locked(root, notify):
        for s, _, j in slurm.settle(root, notify).jobs:
            if s.record["sweep"] == name:
                state = "running" if j.state in RUNNING else "queued"
                log = slurm.log_of(s.folder, j.label)
                return f"{name}: job {j.label} is {state} already; log: {log}"
        folder, container = _new_folder(root, name), container_of(cluster, exec_)
        command = ["-u", "-m", "lorasweep", *arguments, "cluster=local"]
        task: dict[str, Any] = {"command": command, "requeues": cluster.requeues}
        task |= {"container": container and dataclasses.asdict(container)}
        _write(folder, name, [[]], [task])
        number = Array(folder, "0", 0, 1, needed, cluster, code).submit()
    log = slurm.log_of(folder, number)
    return f"{name}: submitted as job {number}; log: {log} (scancel {number} ends it)"


@dataclass(frozen=True)
class Array:
    """An array of jobs: the tasks `first` to `first + n - 1` of a submission."""

    folder: Path
    part: str
    """End of the job's name: the number of the first task, or FOLLOW."""
    first: int
    n: int
    needed: JobResources
    cluster: Cluster
    code: Snapshot
    after: tuple[str, ...] = ()
    """Ids of jobs that must end first."""

    def options(self) -> dict[str, str | int | bool]:
        """Return the sbatch options by name without dashes, except name, time and signal."""
        c = self.cluster
        given: dict[str, Any] = {
            **{name: getattr(c, name) for name in ("partition", "account", "qos", "constraint")},
            "nodes": self.needed.nodes,
            "ntasks-per-node": self.needed.tasks,
            "cpus-per-task": self.needed.cpus // self.needed.tasks,
            "gpus-per-node": self.needed.gpus or None,
            "mem": f"{round(self.needed.mem_gib * 1024)}M",
            "requeue": True,
        }
        if self.after:
            after = ":".join(self.after)
            given |= {"dependency": f"afterany:{after}", "kill-on-invalid-dep": "no"}
        given |= {k: True if v.lower() == "true" else v for k, v in c.options.items()}
        return {k: v for k, v in given.items() if v is not None}

    def srun(self) -> tuple[str, ...]:
        """Return srun's options for the job's command: one task, beside the steps of workers."""
        # --overlap: share the cores with the steps of the workers
        first = ("--overlap", "--nodes=1", "--ntasks=1", "--relative=0")
        return first if self.needed.nodes > 1 or self.cluster.container else ()

    def setup(self) -> list[str]:
        """Return the shell lines before the job's command.

        They run the cluster's setup lines, check the files with `guard`, and put the snapshot of
        the code on PYTHONPATH.
        """
        folder, code = str(self.folder), str(self.code.folder)
        check = [sys.executable, "-I", "-c", Path(guard.__file__).read_text(encoding="utf-8")]
        check += [folder, guard.digest(f"{folder}/{guard.TASKS}"), code, self.code.sha256]
        image = self.cluster.container
        return [
            *self.cluster.setup,
            *f"{shlex.join(check)} || exit 1".splitlines(),
            # No bytecode: new files in the snapshot would change its digest.
            f"export PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1 {JOB_VARIABLE}=1",
            # Some releases of Slurm do not pass the job's CPU cores to its steps.
            "export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}",
            f"export PYTHONPATH={shlex.quote(code)}${{PYTHONPATH:+:$PYTHONPATH}}",
            *([f"export {VARIABLE}={shlex.quote(image)}"] if image else []),
        ]

    def submit(self) -> str:
        """Submit through submitit and return Slurm's id; raise ClusterError if refused."""
        import submitit
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        # Inside a job, hide the variables of this job. Otherwise the new job would inherit a second
        # memory limit, and submitit would confuse the job ids.
        names = [k for k in os.environ if k.startswith(("SLURM_", "SUBMITIT_", "SRUN_"))]
        hidden = {k: os.environ.pop(k) for k in names if k != "SLURM_CONF"}
        with ExitStack() as stack:
            stack.callback(os.environ.update, hidden)
            executor = submitit.SlurmExecutor(folder=self.folder / "jobs")
            executor.update_parameters(
                job_name=f"{self.folder.name}-{self.part}",
                time=self.needed.time_min,
                signal_delay_s=self.cluster.warn_s,
                array_parallelism=self.cluster.parallel,
                setup=self.setup(),
                stderr_to_stdout=True,
                additional_parameters=self.options(),
                srun_args=self.srun(),
            )
            tasks, path = range(self.first, self.first + self.n), str(self.folder / guard.TASKS)
            try:
                jobs = executor.map_array(job.run, [path] * self.n, tasks)
            except (FailedJobError, FailedSubmissionError) as error:  # contains sbatch's message
                text = str(error)
                lines = [line.strip() for line in text.splitlines() if "error:" in line.lower()]
                complaint = "; ".join(dict.fromkeys(lines)) or text.strip()
                raise ClusterError(f"Slurm refused the jobs: {complaint}") from None
        return jobs[0].job_id.partition("_")[0]


def cancel(request: Request, store: RunStore, notify: Notify) -> tuple[int, int]:
    """Cancel the sweep's jobs; return the number of jobs and of their unfinished runs.

    Raises ClusterError if there is no Slurm here, or it did not cancel some jobs.
    """
    if files.status(slurm.home(store.root)) is None:  # nothing was submitted
        return 0, 0
    slurm.require()
    with slurm.locked(store.root, notify):
        queue = slurm.settle(store.root, notify)
        mine = {s.folder for s in queue.submissions if s.record["sweep"] == request.title}
        live = [(s, k, j) for s, k, j in queue.jobs if s.folder in mine]
        runs = {r for s, k, _ in live for r in s.tasks[k] if r not in s.withdrawn}
        ending = [r for r in runs if store.state(r) not in FINAL]
        follows = [j.label for folder, j in queue.follows.items() if folder in mine]
        if denied := slurm.cancel([*follows, *(j.label for _, _, j in live)]):
            raise ClusterError(f"some jobs could not be cancelled: {denied}.")
        return len(live), len(ending)


# ---------------------------------------------------------------- before submitting


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
            f"exec.runs_dir={root} has a '{os.pathsep}' in its name, at which the jobs' PYTHONPATH "
            "splits. Choose a folder without it."
        )
    owner = files.status(root)
    if owner and owner.st_uid != os.geteuid():  # root: `jobs_of` would not show its jobs
        raise ClusterError(f"exec.runs_dir={root} is of user {owner.st_uid}: submit as this user.")
    slurm.require()
    partition = slurm.partition_of(cluster, slurm.partitions())
    if not cluster.shared:
        check_visible(root, partition.hosts, mounts())
    home = slurm.home(root)
    (home / "code").mkdir(parents=True, exist_ok=True)
    return partition, snapshot.take(home / "code")


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
    local = [f for f in LOCAL_FOLDERS if folder.is_relative_to(f)]
    local = [f"its {file_system}"] if file_system in LOCAL_FILE_SYSTEMS else local
    if local:
        raise ClusterError(
            f"run folder {folder}: {local[0]} is local to this machine, so the nodes "
            f"({', '.join(sorted(hosts)[:3])}, ...) cannot see it. Set exec.runs_dir=FOLDER (or "
            "LORASWEEP_RUNS) on a shared file system. If it is on one, set cluster.shared=true."
        )


def check_disk(root: Path, packs: Sequence[Pack], at_once: int) -> None:
    """Raise StoreError if the disk is too small for all results, and checkpoints of some packs.

    `at_once`: number of packs that have checkpoints at the same time.
    """
    checkpoints = sorted((checkpoint_bytes(p.spec for p in k.points) for k in packs), reverse=True)
    results = sum(RUN_BYTES + STEP_BYTES * p.spec.steps for pack in packs for p in pack.points)
    need, free = sum(checkpoints[:at_once]) + results, checkpoint.free_bytes(root)
    if free < need:
        raise StoreError(
            f"the disk of {root} has {free / 2**30:.2f} GiB free; results and checkpoints need up "
            f"to {need / 2**30:.2f} GiB. Choose exec.runs_dir=FOLDER, or lower cluster.parallel."
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
