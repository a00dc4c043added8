"""Ask Slurm about the jobs of a run folder, and read which runs they train.

    <runs_dir>/.slurm/
        submitting                a lock: one submitting command at a time
        code/<snapshot>/          code that the jobs run
        <name>/submission.json    title of the sweep, and the run ids of each task
               tasks.jsonl        what each task does, one line a task
               <job>_0_log.out    log of a job (12, 12_3); submitit's scripts and pickles

A job is named <name>-<its first task> or <name>-follow. So Slurm's queue alone says which runs
wait, even after the submitting command was killed. In a copy of a run folder the names are those of
the original's jobs; the place of a job's script tells the two apart. A job whose command died
before submitit's pickle fails a minute after its start; then its runs no longer wait.
"""

import math
import os
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from lorasweep.errors import ClusterError, unknown
from lorasweep.spec.execution import Cluster
from lorasweep.store import files
from lorasweep.store.files import Notify

ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"}
ENDED |= {"PREEMPTED", "REVOKED", "TIMEOUT"}
"""States of a job that will not run again; in any other state, such as PENDING, it may."""
RUNNING = {"RUNNING", "COMPLETING", "RESIZING", "SIGNALING", "STOPPED", "SUSPENDED"}
STUCK = ("launch failed requeued held", "JobHoldMaxRequeue")
"""Reasons in squeue if Slurm, and not a person, holds a job, because the job's start failed."""
HIDDEN = ("SLURM_", "SUBMITIT_", "SRUN_", "SQUEUE_", "SINFO_", "SACCT_", "SCANCEL_")
"""Prefixes of environment variables that Slurm's commands must not get, except SLURM_CONF. They can
hide live jobs; and a job submitted inside a job would inherit a second memory limit."""
MORE_MEMORY = "; perhaps more memory helps (cluster.mem_gib, or a smaller exec.pack_size)"
FRESH_S = 10.0
"""Seconds for which `RunningJobs` reuses a query's result."""
FOLLOW = "follow"  # end of the name of a follow-up job


# ---------------------------------------------------------------- Slurm's commands


def is_hidden(name: str) -> bool:
    """Return whether Slurm's commands must not get this environment variable."""
    return name.startswith(HIDDEN) and name != "SLURM_CONF"


def run(*command: str) -> str:
    """Run one of Slurm's commands and return its output; raise ClusterError if it fails."""
    env = {k: v for k, v in os.environ.items() if not is_hidden(k)}
    how: dict[str, Any] = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    try:
        done = subprocess.run(command, **how, timeout=60, env=env)
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        raise ClusterError(
            f"no Slurm here ({error}). Run the command on the cluster's login node (outside a "
            "container), or use this machine with cluster=local. action=plan needs no Slurm."
        ) from None
    if done.returncode:
        raise ClusterError(f"{command[0]} failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout


@cache
def setting(name: str) -> str:
    """Return a setting of the cluster, such as MaxArraySize; empty if it is not set."""
    pairs = (line.partition("=") for line in run("scontrol", "show", "config").splitlines())
    return next((value.strip() for key, _, value in pairs if key.strip() == name), "")


def cancel(jobs: Sequence[str]) -> None:
    """Cancel jobs (12, 12_3), except those that have ended; raise ClusterError like `run`."""
    if jobs:
        run("scancel", "--quiet", *jobs)


@dataclass(frozen=True)
class Partition:
    """A partition: the maximum of GPUs over its nodes, and the time limit of jobs in minutes."""

    gpus: int = 0
    time_min: float = math.inf


def partition_of(cluster: Cluster) -> Partition:
    """Return the partition for the jobs; raise ClusterError if there is none."""
    found: dict[str, Partition] = {}
    default = ""
    for line in run("sinfo", "-a", "-h", "-N", "-O", "Partition:|,Gres:|,Time:|").splitlines():
        name, gres, limit = (cell.strip() for cell in line.split("|")[:3])
        if name.endswith("*"):
            default = name = name.rstrip("*")
        # GPUs are listed as gpu:2, or gpu:a100:4(S:0-1), or gpu:a:1,gpu:b:2
        kinds = [item.partition("(")[0].split(":") for item in gres.split(",")]
        counts = [rest[-1] if rest else "" for kind, *rest in kinds if kind == "gpu"]
        gpus = sum(int(count) if count.isdigit() else 1 for count in counts)
        minutes = math.inf  # "infinite"
        if limit[:1].isdigit():  # m:s, h:m:s or d-h:m:s
            days, _, rest_of_day = limit.rpartition("-")
            parts = zip((1 / 60, 1, 60), reversed(rest_of_day.split(":")), strict=False)
            minutes = 1440 * int(days or 0) + sum(unit * int(n) for unit, n in parts)
        most = max(gpus, found.get(name, Partition()).gpus)
        found[name] = Partition(most, minutes)
    name = cluster.partition or default
    if name not in found:
        raise ClusterError(unknown("partition", name, found) + " Set cluster.partition.")
    return found[name]


# ---------------------------------------------------------------- jobs


@dataclass(frozen=True)
class Job:
    """A job, or one task of an array, that is running or may still run.

    `id`: SLURM_JOB_ID, another for each task. `label`: for users and scancel, 12 or 12_3. `task`:
    number in the array; 0 without one. `script`: path of the job's script when it was submitted.
    """

    id: str
    label: str
    task: int
    state: str
    reason: str
    restarts: int
    node: str
    name: str
    script: str


def jobs_of(runs_dir: Path) -> list[Job]:
    """Return the live jobs of the user who owns a run folder; raise ClusterError like `run`."""
    owner = files.status(runs_dir)
    user = str(owner.st_uid if owner else os.geteuid())
    columns = ("JobID", "ArrayJobID", "ArrayTaskID", "State", "Reason", "RestartCnt", "NodeList")
    fields = ",".join(f"{name}:|" for name in (*columns, "Name", "Command"))
    found = []
    for line in run("squeue", "-a", "-h", "-r", "-t", "all", "-u", user, "-O", fields).splitlines():
        cells = (cell.strip() for cell in line.strip().removesuffix("|").split("|", 8))
        jid, array, task, state, reason, restarts, node, name, script = cells
        if state not in ENDED:
            label, n = (f"{array}_{task}", int(task)) if task.isdigit() else (jid, 0)
            found.append(Job(jid, label, n, state, reason, int(restarts or 0), node, name, script))
    return found


def release(jobs: Iterable[Job], notify: Notify) -> None:
    """Release those of the jobs that Slurm holds for ever, because their start failed."""
    for job in jobs:
        if job.state == "PENDING" and job.reason.replace("_", " ") in STUCK:
            with suppress(ClusterError):  # it is no longer held
                run("scontrol", "release", job.label)
                notify(f"released job {job.label}, which Slurm held after a failed start")


class RunningJobs:
    """Tells which jobs are running; one query serves all jobs (`store.owners.RunningJobs`)."""

    def __init__(self, runs_dir: str | Path) -> None:
        """Ask about the jobs of this run folder's owner."""
        self._runs_dir, self._asked = Path(runs_dir), -math.inf
        self._found: tuple[str, set[tuple[str, int]]] | None = None
        """Name of the cluster, and (id, restarts) of its running jobs; None: Slurm was silent."""

    def __call__(self, cluster: str, job: str, restart: int, begun: float) -> bool | None:
        """Return whether a job is still running in its `restart`-th execution.

        None if Slurm does not answer, or if the job is of another cluster. An answer is kept for
        FRESH_S, but not if it is older than `begun`; a failure takes seconds and is kept, too.
        """
        now = time.monotonic()
        if now - self._asked > FRESH_S or (self._found and self._asked < begun):
            self._asked, self._found = now, None
            with suppress(ClusterError):
                running = (j for j in jobs_of(self._runs_dir) if j.state in RUNNING)
                self._found = setting("ClusterName"), {(j.id, j.restarts) for j in running}
        if self._found is None or self._found[0] != cluster:
            return None
        return (job, restart) in self._found[1]


def causes(runs_dir: Path, owners: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return run id -> how its job on this cluster ended, if known; `owners`: id -> owner.json."""
    owned = {rid: o["slurm"] for rid, o in owners.items() if o.get("slurm")}
    ends: dict[str, str] = {}
    with suppress(ClusterError):
        here = setting("ClusterName") if owned else ""
        owned = {rid: job for rid, job in owned.items() if job["cluster"] == here}
        ids = ",".join({job["job"] for job in owned.values()})
        columns = "JobIDRaw,JobID,JobName,State,ExitCode,NodeList"
        lines = run("sacct", "-n", "-P", "-o", columns, "-j", ids).splitlines() if ids else []
        for raw, label, name, state, code, node in (line.split("|") for line in lines):
            whole, _, step = raw.partition(".")
            of_memory = state == "OUT_OF_MEMORY" or code in ("0:9", "9:0", "137:0")
            if not step and state.split(" ")[0] in ENDED:
                log = log_of(home(runs_dir) / name.rpartition("-")[0], label)
                at = f"; log {log}" if log.exists() else ""
                ends[whole] = f"Slurm: {state} (exit {code} on {node}){at}"
            if whole in ends and of_memory and MORE_MEMORY not in ends[whole]:
                ends[whole] += MORE_MEMORY  # under srun, only the step is OUT_OF_MEMORY
    return {rid: ends[job["job"]] for rid, job in owned.items() if job["job"] in ends}


# ---------------------------------------------------------------- submissions


@dataclass(frozen=True)
class Submission:
    """One submission: the title of its sweep, and the run ids of each task."""

    folder: Path
    sweep: str
    tasks: list[list[str]]


@dataclass
class Queue:
    """The live jobs of a run folder, oldest first: their submissions, run ids, and jobs.

    `follows`: follow-up jobs. `unavailable`: why Slurm could not be queried; no run then counts as
    queued.
    """

    jobs: list[tuple[Submission, list[str], Job]] = field(default_factory=list)
    follows: list[tuple[Submission, Job]] = field(default_factory=list)
    unavailable: str | None = None

    def covered(self) -> dict[str, Job]:
        """Map each run in a live job to the job."""
        return {rid: job for _, runs, job in self.jobs for rid in runs}


def home(runs_dir: Path) -> Path:
    """Return the folder of all submissions."""
    return runs_dir / ".slurm"


def log_of(folder: Path, label: str) -> Path:
    """Return the log file of a job (12, 12_3) of the submission in `folder`."""
    return folder / f"{label}_0_log.out"


def read(folder: Path) -> Submission | None:
    """Read a submission; None if it was never recorded."""
    record = files.read_json(folder / "submission.json")
    return record and Submission(folder, record["sweep"], record["tasks"])


def look(runs_dir: Path) -> Queue:
    """Query Slurm once about the jobs of the run folder. Writes nothing."""
    queue, root, known = Queue(), home(runs_dir), cache(read)
    names = set(files.names(root)) - {"submitting", "code"}
    try:
        jobs = jobs_of(runs_dir) if names else []
    except ClusterError as error:
        queue.unavailable = str(error)
        return queue
    for job in sorted(jobs, key=lambda job: int(job.id)):
        name, _, part = job.name.rpartition("-")
        if name not in names or Path(job.script).parent.resolve() != (root / name).resolve():
            continue
        if s := known(root / name):
            if part == FOLLOW:
                queue.follows.append((s, job))
            else:
                queue.jobs.append((s, s.tasks[int(part) + job.task], job))
    return queue


@contextmanager
def settled(runs_dir: Path, notify: Notify) -> Iterator[Queue]:
    """Let one command at a time submit or cancel jobs of a run folder, and give it the queue.

    Jobs that Slurm holds after a failed start are released. StoreError: another does not end.
    """
    with files.locked(home(runs_dir) / "submitting", 600, notify):
        queue = look(runs_dir)
        if queue.unavailable:
            raise ClusterError(queue.unavailable)
        release((*(job for _, _, job in queue.jobs), *(job for _, job in queue.follows)), notify)
        yield queue
