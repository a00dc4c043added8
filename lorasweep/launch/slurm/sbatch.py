"""Hand tasks to Slurm: through submitit, or as scripts for the user to submit. The only importer of
submitit.

Knows what a job asks for and which file it is told to read. A job is given the name of one function
of ours (`lorasweep.launch.slurm.job.run`) and the path of a JSON file; nothing that it returns is
read.
"""

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lorasweep.errors import ClusterError
from lorasweep.launch.slurm import job
from lorasweep.launch.slurm.resources import Ask
from lorasweep.launch.slurm.submissions import Array
from lorasweep.spec.execution import Cluster
from lorasweep.store import files
from lorasweep.store.claims import OUR_JOB


def submit(
    folder: Path, array: Array, ask: Ask, cluster: Cluster, code: Path, after: Sequence[str] = ()
) -> str:
    """Submit an array of a submission and return Slurm's id of it. `after`: ids of jobs that must
    be over first.

    Raises ClusterError with Slurm's complaint.
    """
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    tasks = [str(folder / "tasks" / f"{k}.json") for k in range(array.first, array.first + array.n)]
    with _outside_jobs():
        executor = submitit.AutoExecutor(folder=folder / "jobs", cluster="slurm")
        options = {"requeue": True, **_flags(cluster)}
        if after:
            options |= {"dependency": "afterany:" + ":".join(after), "kill-on-invalid-dep": "no"}
        executor.update_parameters(
            name=array.name,
            timeout_min=ask.time_min,
            mem_gb=ask.mem_gib,
            nodes=1,
            tasks_per_node=1,
            cpus_per_task=ask.cpus,
            gpus_per_node=ask.gpus or None,
            slurm_partition=cluster.partition,
            slurm_account=cluster.account,
            slurm_qos=cluster.qos,
            slurm_constraint=cluster.constraint,
            slurm_array_parallelism=cluster.parallel,
            slurm_signal_delay_s=cluster.warn_s,
            slurm_setup=_setup(cluster, code),
            slurm_stderr_to_stdout=True,
            slurm_additional_parameters=options,
        )
        try:
            jobs = executor.map_array(job.run, tasks)
        except (
            FailedJobError,
            FailedSubmissionError,
        ) as error:  # what sbatch says comes as the first
            raise ClusterError(f"Slurm refused the jobs: {_complaint(str(error))}") from None
    return jobs[0].job_id.partition("_")[0]


def complete(folder: Path, array: Array, number: str) -> bool:
    """Say whether submitit finished with an array that Slurm has: each task has its file. If not,
    they would fail."""
    labels = [number] if array.n == 1 else [f"{number}_{k}" for k in range(array.n)]
    return all((folder / "jobs" / f"{label}_submitted.pkl").exists() for label in labels)


def write_script(folder: Path, array: Array, ask: Ask, cluster: Cluster, code: Path) -> Path:
    """Write an sbatch script that runs the tasks of an array, and return its path."""
    log = "%A_%a" if array.n > 1 else "%j"
    options = {
        "job-name": array.name,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "nodes": 1,
        "ntasks-per-node": 1,
        "cpus-per-task": ask.cpus,
        "gpus-per-node": ask.gpus or None,
        "mem": f"{round(ask.mem_gib * 1024)}M",
        "time": ask.time_min,
        "signal": f"USR2@{cluster.warn_s}",
        "open-mode": "append",
        "output": folder / "jobs" / f"{log}_0_log.out",
        "array": f"0-{array.n - 1}%{cluster.parallel}" if array.n > 1 else None,
        **_flags(cluster),
    }
    lines = [
        f"#SBATCH --{k}" + ("" if v is True else f"={shlex.quote(str(v))}")
        for k, v in options.items()
        if v is not None
    ]
    task = f'"$(({array.first} + ${{SLURM_ARRAY_TASK_ID:-0}}))"'
    place = f"{shlex.quote(str(folder / 'tasks'))}/{task}.json"
    command = (
        f"srun --unbuffered {shlex.quote(sys.executable)} -u -m lorasweep.launch.slurm.job {place}"
    )
    text = ["#!/bin/bash", *lines, "#SBATCH --requeue", "", *_setup(cluster, code), command, ""]
    path = folder / f"array-{array.part}.sh"
    files.write_atomic(path, "\n".join(text).encode())
    return path


def _flags(cluster: Cluster) -> dict[str, str | bool]:
    return {k: True if v.lower() == "true" else v for k, v in cluster.options.items()}


def _setup(cluster: Cluster, code: Path) -> list[str]:
    """Return the shell lines before the job's command: it runs the snapshot, whatever lies in its
    current folder."""
    path = f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}"
    # Some releases of Slurm do not hand the job's processors on to its steps unless they are told.
    srun = "export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}"
    return [*cluster.setup, f"export PYTHONSAFEPATH=1 {OUR_JOB}=1", srun, path]


def _complaint(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if "error:" in line.lower()]
    return "; ".join(dict.fromkeys(lines)) or text.strip()


@contextmanager
def _outside_jobs() -> Iterator[None]:
    """Hide the job that this process may be part of: sbatch would hand its variables on to the new
    one, whose srun then finds two limits of memory, and submitit would take its own for the new
    job's."""
    hidden = {
        k: v
        for k, v in os.environ.items()
        if k.startswith(("SLURM_", "SUBMITIT_", "SRUN_")) and k != "SLURM_CONF"
    }
    for key in hidden:
        del os.environ[key]
    try:
        yield
    finally:
        os.environ.update(hidden)
