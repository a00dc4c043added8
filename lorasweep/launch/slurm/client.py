"""Slurm's own commands: what a cluster has, which jobs live, how the others ended.

Knows no run and no submitit.
"""

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
ALREADY_ENDED = ("Invalid job id", "already complet")
"""Complaints of scancel about a job that has ended, which is what was wanted."""
QUERY_BATCH = 200
"""Names or ids in one query: the length of a command line is limited."""
FILTERS = ("SQUEUE_", "SINFO_", "SACCT_", "SCANCEL_")
"""Variables by which users filter what Slurm's commands show. They are left out: jobs that they
hide would seem to be gone."""
TRANSIENT_ERRORS = ("Unable to contact", "timed out", "Connection refused")
"""Complaints that are worth another try, after PAUSES_S."""
PAUSES_S = (1.0, 5.0)
TIMEOUT_S = 60
"""A controller that does not answer for this long is down (its own clients give up later)."""


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
        """Return whether Slurm holds it for ever because its node failed at the start."""
        return self.state == "PENDING" and self.reason.replace("_", " ") in STUCK

    @property
    def live(self) -> bool:
        """Return whether it runs or may still run."""
        return self.state not in ENDED


@dataclass(frozen=True)
class Ended:
    """How a job ended, by Slurm's accounting."""

    state: str
    exit: str
    node: str
    elapsed_s: int

    def cause(self) -> str:
        """Describe it for people."""
        hint = ""
        if self.state == "FAILED" and self.exit in ("0:9", "9:0", "137:0"):
            hint = ": killed, as by a limit of memory"
        if self.state == "OUT_OF_MEMORY":
            hint = ": ask for more memory (cluster.mem_gib) or smaller packs (exec.pack_size)"
        return (
            f"Slurm: {self.state} (exit {self.exit}{f' on {self.node}' if self.node else ''}){hint}"
        )


def run(*command: str) -> str:
    """Return what one of Slurm's commands prints.

    Raises:
        ClusterError: it failed, with its complaint, or gave no answer in a few tries.
    """
    env = {
        k: v for k, v in os.environ.items() if not k.startswith(FILTERS) and k != "SLURM_CLUSTERS"
    }
    for wait in (*PAUSES_S, None):
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
                stdin=subprocess.DEVNULL,
                env=env,
            )
        except FileNotFoundError:
            raise ClusterError(f"no Slurm here: {command[0]} is not on the PATH.") from None
        except subprocess.TimeoutExpired:
            raise ClusterError(
                f"Slurm does not answer: {command[0]} said nothing for {TIMEOUT_S} s."
            ) from None
        if not done.returncode:
            return done.stdout
        complaint = (done.stderr or done.stdout).strip()
        if wait is None or not any(words in complaint for words in TRANSIENT_ERRORS):
            break
        time.sleep(wait)
    raise ClusterError(f"{command[0]} failed: {complaint}")


def require() -> None:
    """Raise ClusterError unless jobs can be submitted from here."""
    conf = os.environ.get("SLURM_CONF")
    if conf and not Path(conf).is_file():  # every client would wait a minute first
        raise ClusterError(
            f"SLURM_CONF={conf}: there is no such file. Start that Slurm, or unset SLURM_CONF."
        )
    lacking = [
        c
        for c in ("sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
        if shutil.which(c) is None
    ]
    if lacking:
        raise ClusterError(
            f"no Slurm here ({', '.join(lacking)} not on the PATH). Give this command on the "
            "cluster's login node, or run on this machine with cluster=local."
        )
    run("scontrol", "ping")


@cache
def setting(name: str) -> str:
    """Return a value of the cluster's configuration, such as MaxArraySize; empty if it has none."""
    for line in run("scontrol", "show", "config").splitlines():
        key, _, value = line.partition("=")
        if key.strip() == name:
            return value.strip()
    return ""


def max_tasks() -> int:
    """Return how many tasks one array may have here; the limit is on the index, from 0."""
    return max(1, int(setting("MaxArraySize") or 1001) - 1)


def queue(names: Sequence[str]) -> list[Job]:
    """Return the jobs and array tasks of these names that Slurm knows, live or lately ended."""
    fields = "JobID:|,ArrayJobID:|,ArrayTaskID:|,State:|,Reason:|,RestartCnt:|,NodeList:|,Name:|"
    found = []
    for k in range(0, len(names), QUERY_BATCH):
        batch = ",".join(names[k : k + QUERY_BATCH])
        listed = run("squeue", "-a", "-h", "-r", "-t", "all", "--name", batch, "-O", fields)
        for line in listed.splitlines():
            cells = (cell.strip() for cell in line.split("|")[:8])
            jid, array, task, state, reason, restarts, node, name = cells
            array = array if array.isdigit() else jid
            n = int(task) if task.isdigit() else None
            found.append(Job(jid, array, n, state, reason, int(restarts or 0), node, name))
    return found


def ended(jobs: Iterable[str]) -> dict[str, Ended]:
    """Return how jobs and array tasks (12, 12_3) ended, by accounting.

    Empty where there is no accounting; incomplete where it is behind.
    """
    jobs = sorted(set(jobs))
    columns = "JobID,State,ExitCode,NodeList,ElapsedRaw"
    found: dict[str, Ended] = {}
    for k in range(0, len(jobs), QUERY_BATCH):
        batch = ",".join(jobs[k : k + QUERY_BATCH])
        try:
            listed = run("sacct", "-n", "-P", "-j", batch, "-o", columns)
        except ClusterError:
            return found
        for line in listed.splitlines():
            jid, state, code, node, elapsed = line.split("|")[:5]
            whole, _, step = jid.partition(".")
            state = state.split(" ")[0]  # "CANCELLED by 0"
            if not step and state in ENDED:
                found[whole] = Ended(state, code, node, int(elapsed or 0))
            elif whole in found and state == "OUT_OF_MEMORY":  # under srun only the step says so
                found[whole] = Ended(state, code, node, found[whole].elapsed_s)
    return found


def by_number(jobs: Iterable[str]) -> dict[str, tuple[str, Ended]]:
    """Return the ids (12, 12_3) of jobs and how they ended, by their numbers (SLURM_JOB_ID)."""
    jobs = sorted(set(jobs))
    labels: dict[str, str] = {}
    for k in range(0, len(jobs), QUERY_BATCH):
        batch = ",".join(jobs[k : k + QUERY_BATCH])
        listed = run("sacct", "-n", "-X", "-P", "-j", batch, "-o", "JobIDRaw,JobID")
        labels |= dict(line.split("|")[:2] for line in listed.splitlines())
    ends = ended(labels.values())
    known = {raw: label for raw, label in labels.items() if label in ends and raw in jobs}
    return {raw: (label, ends[label]) for raw, label in known.items()}


def named(name: str) -> list[str]:
    """Return the ids (12, 12_3) of the jobs that accounting knows by this name.

    Empty where there is no accounting.
    """
    try:
        return run("sacct", "-n", "-X", "-P", "--name", name, "-o", "JobID").split()
    except ClusterError:
        return []


def cancel(jobs: Sequence[str]) -> str | None:
    """Cancel jobs or array tasks (12, 12_3); return Slurm's complaints, None if there are none.

    That a job has ended already is no complaint.
    """
    complaints = []
    for k in range(0, len(jobs), QUERY_BATCH):
        try:
            run("scancel", *jobs[k : k + QUERY_BATCH])
        except ClusterError as error:
            lines = str(error).splitlines()
            complaints += [x for x in lines if not any(words in x for words in ALREADY_ENDED)]
    return "; ".join(dict.fromkeys(complaints)) or None


def release(jobs: Sequence[str]) -> None:
    """Let held jobs start; one that is no longer held is no error."""
    for job in jobs:
        with suppress(ClusterError):
            run("scontrol", "release", job)


def hides_jobs() -> bool:
    """Return whether this Slurm shows users their own jobs only.

    A job of another user that it does not list may then still run.
    """
    return "jobs" in setting("PrivateData").replace(" ", "").split(",") and os.geteuid() != 0
