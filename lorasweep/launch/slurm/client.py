"""Slurm's own commands: what a cluster has, which jobs live, how the others ended. Knows no run and
no submitit."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lorasweep.errors import ClusterError

ENDED = frozenset(
    (
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
    )
)
"""States of a job that will not run again; everything else may. A requeued job is PENDING."""
STUCK = ("launch failed requeued held", "JobHoldMaxRequeue")
"""Reasons for which Slurm holds a job after a failed start. A job held by its user or an
administrator is left alone."""
GONE = ("Invalid job id", "already complet")
AT_ONCE = 200
"""Names or ids in one question: command lines are finite."""
FILTERS = ("SQUEUE_", "SINFO_", "SACCT_", "SCANCEL_")
PASSING = ("Unable to contact", "timed out", "Connection refused")
"""Complaints that are worth another try, after these pauses."""
PAUSES_S = (1.0, 5.0)
ASK_S = 60
"""A controller that does not answer for this long is down (its own clients give up later)."""


@dataclass(frozen=True)
class Partition:
    """What a partition's nodes have, each the largest of any node."""

    name: str
    default: bool
    cpus: int
    memory_mib: int
    gpus: int
    time_min: float
    """The longest time a job may ask for; inf: no limit."""
    hosts: frozenset[str]


@dataclass(frozen=True)
class Job:
    """A job, or one task of an array, as squeue shows it."""

    id: str
    """Its own number, of a task too."""
    array: str
    """The array's number; that of the job itself if it is none."""
    task: int | None
    state: str
    reason: str
    restarts: int
    node: str
    name: str

    @property
    def label(self) -> str:
        """Return the id that people and scancel use: 12, or 12_3."""
        return self.array if self.task is None else f"{self.array}_{self.task}"

    @property
    def stuck(self) -> bool:
        """Say whether Slurm holds it back because its node failed at the start: nobody's wish, and
        for ever."""
        return self.state == "PENDING" and self.reason.replace("_", " ") in STUCK

    @property
    def live(self) -> bool:
        """Say whether it runs or may still run."""
        return self.state not in ENDED


@dataclass(frozen=True)
class Ended:
    """How a job ended, as accounting tells it."""

    state: str
    exit: str
    node: str
    elapsed_s: int

    def cause(self) -> str:
        """Say it for people."""
        hint = ""
        if self.state == "FAILED" and self.exit in ("0:9", "9:0", "137:0"):
            hint = ": killed, as by a limit of memory"
        if self.state == "OUT_OF_MEMORY":
            hint = ": ask for more memory (cluster.mem_gib) or smaller packs (exec.pack_size)"
        return (
            f"Slurm: {self.state} (exit {self.exit}{f' on {self.node}' if self.node else ''}){hint}"
        )


def ask(*command: str) -> str:
    """Return what one of Slurm's commands prints; ClusterError with its complaint if it fails, or
    does not answer in a few tries. The user's own filters (SQUEUE_USERS ...) are left out: jobs
    that they hide would seem to be gone."""
    env = {
        k: v for k, v in os.environ.items() if not k.startswith(FILTERS) and k != "SLURM_CLUSTERS"
    }
    for wait in (*PAUSES_S, None):
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=ASK_S,
                stdin=subprocess.DEVNULL,
                env=env,
            )
        except FileNotFoundError:
            raise ClusterError(f"no Slurm here: {command[0]} is not on the PATH.") from None
        except subprocess.TimeoutExpired:
            raise ClusterError(
                f"Slurm does not answer: {command[0]} said nothing for {ASK_S} s."
            ) from None
        if not done.returncode:
            return done.stdout
        complaint = (done.stderr or done.stdout).strip()
        if wait is None or not any(words in complaint for words in PASSING):
            break
        time.sleep(wait)
    raise ClusterError(f"{command[0]} failed: {complaint}")


def require() -> None:
    """Raise ClusterError unless jobs can be submitted from here."""
    conf = os.environ.get("SLURM_CONF")
    if conf and not Path(conf).is_file():  # every client would wait a minute first
        raise ClusterError(f"SLURM_CONF={conf} is no file: start that Slurm, or unset SLURM_CONF.")
    lacking = [
        c
        for c in ("sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
        if shutil.which(c) is None
    ]
    if lacking:
        raise ClusterError(
            f"no Slurm here ({', '.join(lacking)} not on the PATH). Give this command on the cluster's login node, "
            "or run on this machine with cluster=local."
        )
    ask("scontrol", "ping")


def partitions() -> dict[str, Partition]:
    """Return the partitions that are up, by name."""
    fields = "Partition:|,CPUs:|,Memory:|,Gres:|,Time:|,NodeHost:|"
    found: dict[str, Partition] = {}
    for line in ask("sinfo", "-a", "-h", "-N", "-O", fields).splitlines():
        name, cpus, memory, gres, limit, host = (cell.strip() for cell in line.split("|")[:6])
        before = found.get(name.rstrip("*"))
        hosts = before.hosts if before else frozenset()
        found[name.rstrip("*")] = Partition(
            name.rstrip("*"),
            name.endswith("*"),
            max(int(cpus), before.cpus if before else 0),
            max(int(memory), before.memory_mib if before else 0),
            max(_gpus(gres), before.gpus if before else 0),
            _minutes(limit),
            hosts | {host},
        )
    return found


def _gpus(gres: str) -> int:
    """Count the GPUs in a node's generic resources: gpu:2, gpu:a100:4(S:0-1), gpu:a:1,gpu:b:2."""
    total = 0
    for item in gres.split(","):
        kind, *rest = item.partition("(")[0].split(":")
        if kind == "gpu":
            total += int(rest[-1]) if rest and rest[-1].isdigit() else 1
    return total


def _minutes(limit: str) -> float:
    """Read a time limit: minutes, h:m:s, d-h, d-h:m:s, infinite."""
    if limit.lower() in ("infinite", "unlimited", "n/a"):
        return float("inf")
    days, _, rest = limit.rpartition("-")
    parts = [float(x) for x in rest.split(":")]
    if days:
        hours, minutes, seconds = (*parts, 0.0, 0.0)[:3]
    else:
        hours, minutes, seconds = (0.0, *parts, 0.0)[:3] if len(parts) < 3 else parts
    return float(days or 0) * 1440 + hours * 60 + minutes + seconds / 60


@cache
def setting(name: str) -> str:
    """Return a value of the cluster's configuration, such as MaxArraySize; empty if it has none."""
    for line in ask("scontrol", "show", "config").splitlines():
        key, _, value = line.partition("=")
        if key.strip() == name:
            return value.strip()
    return ""


def max_tasks() -> int:
    """Return how many tasks one array may have here: the limit is on the index, which starts at 0."""
    return max(1, int(setting("MaxArraySize") or 1001) - 1)


def queue(names: Sequence[str]) -> list[Job]:
    """Return the jobs and array tasks of these names that Slurm still knows, live or lately ended."""
    fields = "JobID:|,ArrayJobID:|,ArrayTaskID:|,State:|,Reason:|,RestartCnt:|,NodeList:|,Name:|"
    found = []
    for k in range(0, len(names), AT_ONCE):
        some = ",".join(names[k : k + AT_ONCE])
        for line in ask(
            "squeue", "-a", "-h", "-r", "-t", "all", "--name", some, "-O", fields
        ).splitlines():
            jid, array, task, state, reason, restarts, node, name = (
                cell.strip() for cell in line.split("|")[:8]
            )
            found.append(
                Job(
                    jid,
                    array if array.isdigit() else jid,
                    int(task) if task.isdigit() else None,
                    state,
                    reason,
                    int(restarts or 0),
                    node,
                    name,
                )
            )
    return found


def ended(jobs: Iterable[str]) -> dict[str, Ended]:
    """Return how jobs and array tasks (12, 12_3) ended, by accounting; nothing where there is no
    accounting, or not yet."""
    jobs = sorted(set(jobs))
    found: dict[str, Ended] = {}
    for k in range(0, len(jobs), AT_ONCE):
        try:
            some = ",".join(jobs[k : k + AT_ONCE])
            told = ask(
                "sacct", "-n", "-P", "-j", some, "-o", "JobID,State,ExitCode,NodeList,ElapsedRaw"
            )
        except ClusterError:
            return found
        for line in told.splitlines():
            jid, state, code, node, elapsed = line.split("|")[:5]
            whole, _, step = jid.partition(".")
            state = state.split(" ")[0]  # "CANCELLED by 0"
            if not step and state in ENDED:
                found[whole] = Ended(state, code, node, int(elapsed or 0))
            elif whole in found and state == "OUT_OF_MEMORY":  # under srun only the step is told so
                found[whole] = Ended(state, code, node, found[whole].elapsed_s)
    return found


def by_number(jobs: Iterable[str]) -> dict[str, tuple[str, Ended]]:
    """Return, by the numbers that jobs have for themselves (SLURM_JOB_ID), their ids (12, 12_3) and
    how they ended."""
    jobs = sorted(set(jobs))
    labels: dict[str, str] = {}
    for k in range(0, len(jobs), AT_ONCE):
        told = ask(
            "sacct", "-n", "-X", "-P", "-j", ",".join(jobs[k : k + AT_ONCE]), "-o", "JobIDRaw,JobID"
        )
        labels |= dict(line.split("|")[:2] for line in told.splitlines())
    ends = ended(labels.values())
    return {
        raw: (label, ends[label]) for raw, label in labels.items() if label in ends and raw in jobs
    }


def named(name: str) -> list[str]:
    """Return the ids (12, 12_3) of the jobs that accounting knows by this name; nothing where there
    is no accounting."""
    try:
        return ask("sacct", "-n", "-X", "-P", "--name", name, "-o", "JobID").split()
    except ClusterError:
        return []


def cancel(jobs: Sequence[str]) -> str | None:
    """Cancel jobs or array tasks (12, 12_3); return Slurm's complaints, None if there are none. One
    that has ended is none."""
    complaints = []
    for k in range(0, len(jobs), AT_ONCE):
        try:
            ask("scancel", *jobs[k : k + AT_ONCE])
        except ClusterError as error:
            lines = [
                line for line in str(error).splitlines() if not any(words in line for words in GONE)
            ]
            complaints += lines
    return "; ".join(dict.fromkeys(complaints)) or None


def release(jobs: Sequence[str]) -> None:
    """Let held jobs start; one that is no longer held is no error."""
    for job in jobs:
        with suppress(ClusterError):
            ask("scontrol", "release", job)


def hides_jobs() -> bool:
    """Say whether this Slurm shows users their own jobs only: then its silence says nothing about
    those of others."""
    return "jobs" in setting("PrivateData").replace(" ", "").split(",") and os.geteuid() != 0


class Executions:
    """Says whether an execution of a job, which began as its n-th restart, still runs. One question
    serves many."""

    def __init__(self) -> None:
        self._running: dict[str, int] | None = None
        self._asked = 0.0
        self._dead: set[tuple[str, int]] = set()

    def refresh(self) -> None:
        """Ask Slurm which jobs run."""
        try:
            told = ask(
                "squeue",
                "-a",
                "-h",
                "-r",
                "-t",
                "RUNNING,COMPLETING,STOPPED,SUSPENDED",
                "-O",
                "JobID:|,RestartCnt:|",
            )
        except ClusterError:
            self._running = None
            return
        cells = (line.split("|") for line in told.splitlines())
        self._running = {c[0].strip(): int(c[1].strip() or 0) for c in cells}
        self._asked = time.monotonic()

    def __call__(
        self, cluster: str, job: str, restart: int, asked_before: bool = False
    ) -> bool | None:
        """Return whether it runs; None if Slurm cannot tell, or it is another cluster's.

        `asked_before`: its owner was known before the last `refresh`, so that its absence there
        counts. Otherwise it may have begun since, and Slurm is asked again.
        """
        if (job, restart) in self._dead:
            return False
        try:
            if cluster != setting("ClusterName"):
                return None
        except ClusterError:
            return None
        fresh = self._running is not None and time.monotonic() - self._asked < 10
        if not (fresh and (self._running.get(job) == restart or asked_before)):
            self.refresh()
        if self._running is None:
            return None
        if self._running.get(job) == restart:
            return True
        if hides_jobs():
            return None
        self._dead.add((job, restart))
        return False
