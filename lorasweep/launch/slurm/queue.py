"""Ask Slurm about the jobs of a run folder, and read which runs they train.

    <runs_dir>/.slurm/
        submitting                a lock: one submitting command at a time
        code/<snapshot>/          code that the jobs run
        <name>/submission.json    sweep, cluster, and runs of each task
               tasks.jsonl        what each task does, one line a task
               jobs/              submitit's files, and logs of the jobs
               withdrawn.json     runs that no task may start any more
               over               none of its jobs is in the queue any more

A job is named <name>-<its first task> or <name>-follow, so Slurm's queue says which runs wait. Ids
of jobs are recorded nowhere. In a copy of a run folder the names are those of the original's jobs;
the place of a job's script tells the two apart. A job without submitit's file is of a command that
died while it was submitting; such a job fails a minute after its start.
"""

import json
import math
import os
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from lorasweep.errors import ClusterError, unknown
from lorasweep.spec.execution import Cluster
from lorasweep.store import files
from lorasweep.store.files import Notify

ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"}
ENDED |= {"PREEMPTED", "REVOKED", "TIMEOUT"}
"""States of a job that will not run again. In any other state a job may run again; a requeued job
is PENDING."""
RUNNING = {"RUNNING", "COMPLETING", "RESIZING", "SIGNALING", "STOPPED", "SUSPENDED"}
STUCK = ("launch failed requeued held", "JobHoldMaxRequeue")
"""Reasons in squeue if Slurm, and not a person, holds a job, because the job's start failed."""
ALREADY_ENDED = ("Invalid job id", "already complet")
"""Messages of scancel for jobs that have already ended; these messages are ignored."""
QUERY_BATCH = 200
"""Ids per query, because the length of a command line is limited."""
FILTERS = ("SQUEUE_", "SINFO_", "SACCT_", "SCANCEL_", "SLURM_CLUSTERS")
"""Prefixes of environment variables that Slurm's commands must not get: they can hide live jobs."""
TRANSIENT_ERRORS = ("Unable to contact", "timed out", "Connection refused")
"""Messages of failed commands that are tried again, after pauses of PAUSES_S seconds."""
PAUSES_S = (1.0, 5.0)
TIMEOUT_S = 60
FRESH_S = 10.0
"""Seconds for which `RunningJobs` reuses a query's result."""
LOCK_S = 600.0
"""Seconds to wait for another command that is submitting."""
FOLLOW = "follow"
"""End of the name of a follow-up job."""


# ---------------------------------------------------------------- Slurm's commands


def run(*command: str) -> str:
    """Run one of Slurm's commands and return its output; raise ClusterError if it fails."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(FILTERS)}
    for wait in (*PAUSES_S, None):
        how: dict[str, Any] = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
        try:
            done = subprocess.run(command, **how, timeout=TIMEOUT_S, env=env)
        except FileNotFoundError:
            raise _no_slurm(command[0]) from None
        except subprocess.TimeoutExpired:
            raise ClusterError(
                f"Slurm does not answer: no output of {command[0]} for {TIMEOUT_S} s. Try later."
            ) from None
        if not done.returncode:
            return done.stdout
        complaint = (done.stderr or done.stdout).strip()
        if wait is None or not any(words in complaint for words in TRANSIENT_ERRORS):
            break
        time.sleep(wait)
    raise ClusterError(f"{command[0]} failed: {complaint}")


def require() -> None:
    """Check that jobs can be submitted from this machine; raise ClusterError if not."""
    conf = os.environ.get("SLURM_CONF")
    if conf and not Path(conf).is_file():  # each command would fail only after a minute
        raise ClusterError(
            f"SLURM_CONF={conf}: there is no such file. Start that Slurm, or unset SLURM_CONF."
        )
    commands = ("sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
    if lacking := [c for c in commands if shutil.which(c) is None]:
        raise _no_slurm(*lacking)
    try:
        run("scontrol", "ping")
    except ClusterError as error:
        raise ClusterError(
            f"{error}\nSlurm is installed, but does not answer. Run the command on the cluster's "
            "login node, or use this machine with cluster=local. action=plan needs no Slurm."
        ) from None


def _no_slurm(*lacking: str) -> ClusterError:
    return ClusterError(
        f"no Slurm here ({', '.join(lacking)} not on the PATH). Run the command on the cluster's "
        "login node (outside a container), or use this machine with cluster=local."
    )


@cache
def setting(name: str) -> str:
    """Return a setting of the cluster, such as MaxArraySize; empty if it is not set."""
    for line in run("scontrol", "show", "config").splitlines():
        key, _, value = line.partition("=")
        if key.strip() == name:
            return value.strip()
    return ""


def _batches(items: Sequence[str]) -> Iterator[Sequence[str]]:
    return (items[k : k + QUERY_BATCH] for k in range(0, len(items), QUERY_BATCH))


def cancel(jobs: Sequence[str]) -> str | None:
    """Cancel jobs (12, 12_3); return why some could not be cancelled, or None."""
    complaints = []
    for batch in _batches(jobs):
        try:
            run("scancel", *batch)
        except ClusterError as error:
            lines = str(error).splitlines()
            complaints += [x for x in lines if not any(words in x for words in ALREADY_ENDED)]
    return "; ".join(dict.fromkeys(complaints)) or None


def release(jobs: Iterable["Job"]) -> list[str]:
    """Release those of the jobs that Slurm holds after a failed start; return their labels."""
    stuck = [j.label for j in jobs if j.stuck]
    for label in stuck:
        with suppress(ClusterError):  # it is no longer held
            run("scontrol", "release", label)
    return stuck


@dataclass(frozen=True)
class Partition:
    """A partition. cpus, memory_mib and gpus: the maximum over its nodes."""

    name: str
    default: bool
    cpus: int
    memory_mib: int
    gpus: int
    time_min: float
    """Time limit of jobs; inf without one."""
    hosts: frozenset[str]
    nodes: int = 1


def partitions() -> dict[str, Partition]:
    """Return the partitions that are up, by name."""
    fields = "Partition:|,CPUs:|,Memory:|,Gres:|,Time:|,NodeHost:|"
    found: dict[str, Partition] = {}
    for line in run("sinfo", "-a", "-h", "-N", "-O", fields).splitlines():
        name, cpus, memory, gres, limit, host = (cell.strip() for cell in line.split("|")[:6])
        name, default = name.rstrip("*"), name.endswith("*")
        # GPUs are listed as gpu:2, or gpu:a100:4(S:0-1), or gpu:a:1,gpu:b:2
        kinds = [item.partition("(")[0].split(":") for item in gres.split(",")]
        counts = [rest[-1] if rest else "" for kind, *rest in kinds if kind == "gpu"]
        gpus = sum(int(count) if count.isdigit() else 1 for count in counts)
        before = found.get(name, Partition(name, default, 0, 0, 0, 0.0, frozenset(), 0))
        found[name] = replace(
            before,
            cpus=max(int(cpus), before.cpus),
            memory_mib=max(int(memory), before.memory_mib),
            gpus=max(gpus, before.gpus),
            time_min=_minutes(limit),
            hosts=before.hosts | {host},
            nodes=before.nodes + 1,
        )
    return found


def _minutes(limit: str) -> float:
    """Parse a time limit into minutes: minutes, m:s, h:m:s, d-h, d-h:m:s, or a word for none."""
    if not limit[:1].isdigit():
        return float("inf")
    days, _, rest = limit.rpartition("-")
    parts = [float(x) for x in rest.split(":")]
    if not days and len(parts) < 3:
        parts.insert(0, 0.0)  # without hours
    hours, minutes, seconds = (*parts, 0.0, 0.0)[:3]
    return float(days or 0) * 1440 + hours * 60 + minutes + seconds / 60


def partition_of(cluster: Cluster, known: dict[str, Partition]) -> Partition:
    """Return the partition for the jobs; raise ClusterError if there is none."""
    name = cluster.partition or next((p.name for p in known.values() if p.default), "")
    if name not in known:
        raise ClusterError(unknown("partition", name, known) + " Set cluster.partition.")
    return known[name]


# ---------------------------------------------------------------- jobs


@dataclass(frozen=True)
class Job:
    """A job, or one task of an array, that is running or may still run."""

    id: str
    """SLURM_JOB_ID; each task of an array has a different one."""
    label: str
    """Id for users and scancel: 12, or 12_3."""
    task: int
    """Number in its array; 0 without one."""
    state: str
    reason: str
    restarts: int
    node: str
    name: str
    script: str = ""
    """Path of the job's script when it was submitted; empty if Slurm does not say."""

    @property
    def stuck(self) -> bool:
        """Whether Slurm holds the job forever because its start failed."""
        return self.state == "PENDING" and self.reason.replace("_", " ") in STUCK


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


class RunningJobs:
    """Tells which jobs are running; one query serves all jobs (`store.claims.RunningJobs`)."""

    def __init__(self, runs_dir: str | Path) -> None:
        """Ask about the jobs of this run folder's owner."""
        self._runs_dir, self._asked = Path(runs_dir), -math.inf
        self._found: tuple[str, set[tuple[str, int]]] | None = None
        """Name of the cluster, and (id, restarts) of its running jobs; None: Slurm was silent."""

    def __call__(self, cluster: str, job: str, restart: int, begun: float) -> bool | None:
        """Return whether a job is still running in its `restart`-th execution.

        None if Slurm does not answer, or if the job belongs to another cluster. Slurm is asked
        again if the last answer is older than FRESH_S, or than `begun`. A try that fails takes
        seconds, so it is not repeated sooner.
        """
        now = time.monotonic()
        if now - self._asked > FRESH_S or (self._found and self._asked < begun):
            self._asked = now
            try:
                running = {
                    (j.id, j.restarts) for j in jobs_of(self._runs_dir) if j.state in RUNNING
                }
                self._found = setting("ClusterName"), running
            except ClusterError:
                self._found = None
        if self._found is None or self._found[0] != cluster:
            return None
        return (job, restart) in self._found[1]


def causes(runs_dir: Path, owners: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return run id -> how the Slurm job that owned the run ended; `owners`: id -> owner.json.

    Empty without accounting. Jobs of other clusters are left out: their ids name other jobs here.
    """
    jobs: dict[str, str] = {}
    columns = "JobIDRaw,JobID,JobName,State,ExitCode,NodeList"
    ends: dict[str, list[str]] = {}
    with suppress(ClusterError):
        owned = {rid: o["slurm"] for rid, o in owners.items() if o.get("slurm")}
        here = setting("ClusterName") if owned else ""
        jobs = {rid: job["job"] for rid, job in owned.items() if job["cluster"] == here}
        for batch in _batches(sorted(set(jobs.values()))):
            listed = run("sacct", "-n", "-P", "-o", columns, "-j", ",".join(batch))
            for raw, label, name, state, code, node in (x.split("|") for x in listed.splitlines()):
                (whole, _, step), state = raw.partition("."), state.split(" ")[0]
                if not step and state in ENDED:
                    ends[whole] = [label, name, state, code, node]
                elif whole in ends and state == "OUT_OF_MEMORY":  # under srun, only the step has it
                    ends[whole][2:] = state, code, node
    return {rid: _cause(runs_dir, *ends[job]) for rid, job in jobs.items() if job in ends}


def _cause(runs_dir: Path, label: str, name: str, state: str, code: str, node: str) -> str:
    """Describe how a job ended, with a hint if memory may be the cause."""
    hint = ""
    if state == "FAILED" and code in ("0:9", "9:0", "137:0"):
        hint = ": killed, perhaps by a memory limit"
    elif state == "OUT_OF_MEMORY":
        hint = ": set more memory (cluster.mem_gib) or smaller packs (exec.pack_size)"
    path = log_of(home(runs_dir) / name.rpartition("-")[0], label)
    log = f"; log {path}" if path.exists() else ""
    return f"Slurm: {state} (exit {code} on {node}){hint}{log}"


# ---------------------------------------------------------------- submissions


@dataclass
class Submission:
    """One submission, read from its folder."""

    folder: Path
    record: dict[str, Any]
    """Content of submission.json: `sweep` (a title), `tasks` (run ids of each task), `cluster`,
    `created_s`."""
    withdrawn: set[str] = field(default_factory=set)

    @property
    def tasks(self) -> list[list[str]]:
        """Run ids of each task."""
        return self.record["tasks"]

    def withdraw(self, ids: Iterable[str]) -> None:
        """Forbid all tasks to start these runs."""
        self.withdrawn |= set(ids)
        content = json.dumps(sorted(self.withdrawn)).encode()
        files.write_atomic(self.folder / "withdrawn.json", content)


def home(runs_dir: Path) -> Path:
    """Return the folder of all submissions."""
    return runs_dir / ".slurm"


def log_of(folder: Path, label: str) -> Path:
    """Return the log file of a job (12, 12_3) of the submission in `folder`."""
    return folder / "jobs" / f"{label}_0_log.out"


def read(folder: Path) -> Submission | None:
    """Read a submission; None if it was never recorded. Raises ClusterError if it is damaged."""
    if (content := files.read(folder / "submission.json")) is None:
        return None
    try:
        record = json.loads(content)
    except ValueError:
        raise ClusterError(
            f"{folder}/submission.json is damaged. Cancel its jobs with scancel, then delete the "
            "folder."
        ) from None
    return Submission(folder, record, set(files.read_json(folder / "withdrawn.json") or []))


def read_all(runs_dir: Path, over: bool = False) -> list[Submission]:
    """List the submissions, oldest first; with `over`, also those whose jobs have all ended."""
    folders = [home(runs_dir) / name for name in files.names(home(runs_dir))]
    found = [read(f) for f in folders if over or files.status(f / "over") is None]
    return sorted((s for s in found if s), key=lambda s: s.record["created_s"])


@dataclass
class Queue:
    """The open submissions, matched with Slurm's jobs."""

    submissions: list[Submission]
    jobs: list[tuple[Submission, int, Job]] = field(default_factory=list)
    """(submission, task number, job) of the live jobs, oldest submission first."""
    follows: dict[Path, Job] = field(default_factory=dict)
    """Folder of a submission -> its live follow-up job."""
    strays: list[Job] = field(default_factory=list)
    """Jobs that cannot start, of a command that died while submitting."""
    unavailable: str | None = None
    """Why Slurm could not be queried; then no run counts as queued."""
    elsewhere: set[str] = field(default_factory=set)
    """Runs in submissions to another cluster, of which this Slurm knows nothing."""

    def covered(self) -> dict[str, Job]:
        """Map each run in a live task to its job."""
        return {r: j for s, k, j in self.jobs for r in s.tasks[k] if r not in s.withdrawn}


def look(runs_dir: Path) -> Queue:
    """Query Slurm once about all open submissions. Writes nothing."""
    queue = Queue(read_all(runs_dir))
    if not queue.submissions:
        return queue
    try:
        here, jobs = setting("ClusterName"), jobs_of(runs_dir)
    except ClusterError as error:
        queue.unavailable = str(error)
        return queue
    others = [s for s in queue.submissions if s.record["cluster"] != here]
    queue.elsewhere = {rid for s in others for task in s.tasks for rid in task}
    queue.submissions = [s for s in queue.submissions if s not in others]
    by_name = {s.folder.name: s for s in queue.submissions}
    there, in_folder = cache(_submitted), cache(_is_in)
    for job in jobs:
        name, _, part = job.name.rpartition("-")
        if (s := by_name.get(name)) is None or not in_folder(job.script, s.folder / "jobs"):
            continue
        if job.label not in there(s.folder):
            if job.state not in RUNNING:  # a file server may show a new file late
                queue.strays.append(job)
        elif part == FOLLOW:
            queue.follows[s.folder] = job
        else:
            queue.jobs.append((s, int(part) + job.task, job))
    queue.jobs.sort(key=lambda found: (found[0].record["created_s"], found[1]))
    return queue


def _submitted(folder: Path) -> set[str]:
    """Return the labels of jobs for which submitit wrote its file, so that they can start."""
    end = "_submitted.pkl"
    return {n.removesuffix(end) for n in files.names(folder / "jobs") if n.endswith(end)}


def _is_in(script: str, folder: Path) -> bool:
    """Return whether a job's script lies in a folder; True if Slurm does not say where it lies."""
    if "/" not in script:
        return True
    one, other = files.status(Path(script).parent), files.status(folder)
    return one is not None and other is not None and os.path.samestat(one, other)


def locked(runs_dir: Path, notify: Notify) -> AbstractContextManager[None]:
    """Let one command at a time submit jobs of a run folder, in a `with` block."""
    return files.locked(home(runs_dir) / "submitting", LOCK_S, notify)


def settle(runs_dir: Path, notify: Notify) -> Queue:
    """Return the queue, put right; the lock must be held. Raises ClusterError without Slurm.

    Jobs that cannot start are cancelled, jobs that Slurm holds after a failed start are released,
    and submissions whose jobs have all ended are marked as over.
    """
    queue = look(runs_dir)
    if queue.unavailable:
        raise ClusterError(queue.unavailable)
    if queue.strays:
        labels = [j.label for j in queue.strays]
        notify(f"cancelled jobs of a command that died while submitting: {', '.join(labels)}")
        if denied := cancel(labels):
            notify(f"  some could not be cancelled, and will fail ({denied})")
    if held := release([*(j for _, _, j in queue.jobs), *queue.follows.values()]):
        notify(f"released {len(held)} job(s) that Slurm held after a failed start")
    live = {s.folder for s, _, _ in queue.jobs} | queue.follows.keys()
    for s in [s for s in queue.submissions if s.folder not in live]:
        # without any job, perhaps a command is submitting it now, where files have no locks
        with suppress(OSError):  # if the disk is full, the next command tries again
            if _submitted(s.folder):
                (s.folder / "over").touch()
        queue.submissions.remove(s)
    return queue
