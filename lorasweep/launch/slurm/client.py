"""Call Slurm's commands about partitions and jobs.

This module must not depend on runs and submitit.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from lorasweep.errors import ClusterError, unknown
from lorasweep.launch.slurm.container import inside
from lorasweep.spec.execution import Cluster

ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
}
"""States of a job that will not run again. In any other state a job may run again; a requeued job
is PENDING."""
STUCK = ("launch failed requeued held", "JobHoldMaxRequeue")
"""Reasons in squeue if Slurm, and not a person, holds a job, because the job's start failed."""
ALREADY_ENDED = ("Invalid job id", "already complet")
"""Messages of scancel for jobs that have already ended; these messages are ignored."""
QUERY_BATCH = 200
"""Names or ids per query, because the length of a command line is limited."""
FILTERS = ("SQUEUE_", "SINFO_", "SACCT_", "SCANCEL_", "SLURM_CLUSTERS")
"""Prefixes of environment variables that Slurm's commands must not get: they can hide live jobs."""
TRANSIENT_ERRORS = ("Unable to contact", "timed out", "Connection refused")
"""Messages of failed commands that are tried again, after pauses of PAUSES_S seconds."""
PAUSES_S = (1.0, 5.0)
TIMEOUT_S = 60
FRESH_S = 10.0
"""Seconds for which `RunningJobs` reuses a query's result."""


@dataclass(frozen=True)
class Job:
    """A job, or one task of an array, as squeue shows it."""

    id: str
    """SLURM_JOB_ID; each task of an array has a different one."""
    array: str
    """SLURM_ARRAY_JOB_ID; the same as `id` without an array."""
    task: int | None
    state: str
    reason: str
    restarts: int
    node: str
    name: str

    @property
    def label(self) -> str:
        """Id for users and scancel: 12, or 12_3."""
        return self.array if self.task is None else f"{self.array}_{self.task}"

    @property
    def stuck(self) -> bool:
        """Whether Slurm holds the job forever because its start failed."""
        return self.state == "PENDING" and self.reason.replace("_", " ") in STUCK

    @property
    def live(self) -> bool:
        """Whether the job is running or may still run."""
        return self.state not in ENDED


@dataclass(frozen=True)
class Ended:
    """How a job ended, from Slurm's accounting."""

    state: str
    exit: str
    node: str
    elapsed_s: int

    def cause(self) -> str:
        """Describe how the job ended, with a hint if memory may be the cause."""
        hint = ""
        if self.state == "FAILED" and self.exit in ("0:9", "9:0", "137:0"):
            hint = ": killed, perhaps by a memory limit"
        elif self.state == "OUT_OF_MEMORY":
            hint = ": set more memory (cluster.mem_gib) or smaller packs (exec.pack_size)"
        node = f" on {self.node}" if self.node else ""
        return f"Slurm: {self.state} (exit {self.exit}{node}){hint}"


def _batches(items: Sequence[str]) -> Iterator[Sequence[str]]:
    return (items[k : k + QUERY_BATCH] for k in range(0, len(items), QUERY_BATCH))


def _lines(items: Sequence[str], *command: str) -> Iterator[str]:
    """Yield the output lines of a command that takes a list of `items` as last argument."""
    for batch in _batches(items):
        yield from run(*command, ",".join(batch)).splitlines()


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
    if found := inside():
        raise ClusterError(
            f"this command runs inside a container ({found}). Jobs and the follow-up job start "
            "outside, with the Python that submits them, and this Python is not there. Run the "
            "command on the login node outside; cluster.container=IMAGE names the image for jobs."
        )
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
    files = [path for path in ("/.dockerenv", "/run/.containerenv") if Path(path).exists()]
    where = f" This is a container ({files[0]}); run the command outside." if files else ""
    return ClusterError(
        f"no Slurm here ({', '.join(lacking)} not on the PATH).{where} Run the command on the "
        "cluster's login node, or use this machine with cluster=local."
    )


@cache
def setting(name: str) -> str:
    """Return a setting of the cluster, such as MaxArraySize; empty if it is not set."""
    for line in run("scontrol", "show", "config").splitlines():
        key, _, value = line.partition("=")
        if key.strip() == name:
            return value.strip()
    return ""


def queue(names: Sequence[str]) -> list[Job]:
    """Return the jobs and array tasks with these names, live or recently ended."""
    fields = "JobID:|,ArrayJobID:|,ArrayTaskID:|,State:|,Reason:|,RestartCnt:|,NodeList:|,Name:|"
    found = []
    for line in _lines(names, "squeue", "-a", "-h", "-r", "-t", "all", "-O", fields, "--name"):
        cells = (cell.strip() for cell in line.split("|")[:8])
        jid, array, task, state, reason, restarts, node, name = cells
        array = array if array.isdigit() else jid
        n = int(task) if task.isdigit() else None
        found.append(Job(jid, array, n, state, reason, int(restarts or 0), node, name))
    return found


def ended(jobs: Iterable[str]) -> dict[str, Ended]:
    """Return job (12, 12_3) -> how it ended, for the ended jobs that accounting has recorded."""
    found: dict[str, Ended] = {}
    columns = "JobID,State,ExitCode,NodeList,ElapsedRaw"
    with suppress(ClusterError):  # the cluster has no accounting
        for line in _lines(sorted(set(jobs)), "sacct", "-n", "-P", "-o", columns, "-j"):
            jid, state, code, node, elapsed = line.split("|")[:5]
            whole, _, step = jid.partition(".")
            state = state.split(" ")[0]  # "CANCELLED by 0"
            if not step and state in ENDED:
                found[whole] = Ended(state, code, node, int(elapsed or 0))
            elif whole in found and state == "OUT_OF_MEMORY":  # under srun, only the step has it
                found[whole] = Ended(state, code, node, found[whole].elapsed_s)
    return found


def by_number(jobs: Iterable[str]) -> dict[str, tuple[str, Ended]]:
    """Return job number (SLURM_JOB_ID) -> job id (12, 12_3), and how the job ended."""
    lines = _lines(sorted(set(jobs)), "sacct", "-n", "-X", "-P", "-o", "JobIDRaw,JobID", "-j")
    labels = dict(line.split("|")[:2] for line in lines)
    ends = ended(labels.values())
    return {number: (label, ends[label]) for number, label in labels.items() if label in ends}


def named(name: str) -> list[str]:
    """Return the ids (12, 12_3) of jobs with this name; empty without accounting."""
    try:
        return run("sacct", "-n", "-X", "-P", "--name", name, "-o", "JobID").split()
    except ClusterError:
        return []


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


def release(jobs: Sequence[str]) -> None:
    """Release held jobs; those that are no longer held are ignored."""
    for job in jobs:
        with suppress(ClusterError):
            run("scontrol", "release", job)


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
    """Parse a time limit into minutes: minutes, h:m:s, d-h, d-h:m:s, infinite."""
    if limit.lower() in ("infinite", "unlimited", "n/a"):
        return float("inf")
    days, _, rest = limit.rpartition("-")
    parts = [float(x) for x in rest.split(":")]
    if not days and len(parts) < 3:
        parts.insert(0, 0.0)  # without hours
    hours, minutes, seconds = (*parts, 0.0, 0.0)[:3]
    return float(days or 0) * 1440 + hours * 60 + minutes + seconds / 60


def partition_of(cluster: Cluster, known: dict[str, Partition]) -> Partition:
    """Return the partition for the jobs; raise ClusterError if there is none."""
    name = cluster.partition
    if name is None:
        name = next((p.name for p in known.values() if p.default), None)
    if name is None:
        raise ClusterError(
            "the cluster has no default partition. Set cluster.partition to: "
            f"{', '.join(sorted(known))}."
        )
    if name not in known:
        raise ClusterError(unknown("partition", name, known) + " Set cluster.partition.")
    return known[name]


class RunningJobs:
    """Tells which jobs are running; one query serves all jobs (see `store.claims.RunningJobs`)."""

    def __init__(self) -> None:
        self._running: dict[str, int] | None = None
        self._asked = 0.0
        self._silent_until = 0.0
        self._dead: set[tuple[str, int]] = set()

    def refresh(self) -> None:
        """Query the running jobs and their restart counts."""
        states = "RUNNING,COMPLETING,STOPPED,SUSPENDED"
        fields = "JobID:|,RestartCnt:|"
        self._running = None
        try:
            listed = run("squeue", "-a", "-h", "-r", "-t", states, "-O", fields)
        except ClusterError:
            self._silent_until = time.monotonic() + FRESH_S
            return
        cells = (line.split("|") for line in listed.splitlines())
        self._running = {c[0].strip(): int(c[1].strip() or 0) for c in cells}
        self._asked = time.monotonic()

    def __call__(
        self, cluster: str, job: str, restart: int, known_before: bool = False
    ) -> bool | None:
        """Return whether a job is still running in its `restart`-th execution.

        None if Slurm does not answer or hides the job, or if the job belongs to another cluster.
        `known_before`: the job is older than the last `refresh`; otherwise Slurm is queried again.
        """
        if (job, restart) in self._dead:
            return False
        if time.monotonic() < self._silent_until:  # a try takes seconds, and each run makes one
            return None
        try:
            if cluster != setting("ClusterName"):
                return None
        except ClusterError:
            self._silent_until = time.monotonic() + FRESH_S
            return None
        running = self._running if time.monotonic() - self._asked < FRESH_S else None
        if running is None or not (running.get(job) == restart or known_before):
            self.refresh()
        if self._running is None:
            return None
        if self._running.get(job) == restart:
            return True
        self._dead.add((job, restart))
        return False
