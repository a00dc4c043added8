"""Hand an array of jobs to sbatch, with the files that its jobs read."""

import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorasweep.errors import ClusterError
from lorasweep.launch.container import VARIABLE
from lorasweep.launch.slurm import guard, job
from lorasweep.launch.slurm import queue as slurm
from lorasweep.launch.slurm.queue import FOLLOW
from lorasweep.launch.slurm.resources import JobResources
from lorasweep.launch.slurm.snapshot import Snapshot
from lorasweep.spec.execution import Cluster
from lorasweep.store import files
from lorasweep.store.owners import JOB_VARIABLE


def write(root: Path, title: str, runs: list[list[str]], tasks: Sequence[Any]) -> Path:
    """Write a submission into a new folder, which names its jobs. `runs`: run ids by task.

    Raises ClusterError if other users could write there.
    """
    name = re.sub("[^A-Za-z0-9_.-]", "_", title)
    folder = slurm.home(root) / f"{name}-{os.urandom(4).hex()}"
    folder.mkdir(parents=True)
    lines = "".join(json.dumps(task) + "\n" for task in tasks)
    files.write_atomic(folder / guard.TASKS, lines.encode())
    if why := guard.untrusted(map(str, (folder, *folder.iterdir()))):
        raise ClusterError(
            f"{why}. Choose a run folder on a file system that keeps permissions: "
            "exec.runs_dir=FOLDER."
        )
    record = json.dumps({"sweep": title, "tasks": runs})
    files.write_atomic(folder / "submission.json", record.encode())
    return folder


def setup(folder: Path, cluster: Cluster, code: Snapshot) -> list[str]:
    """Return the shell lines before a job's command.

    They run the cluster's setup lines, check the files with `guard`, and put the snapshot of the
    code on PYTHONPATH.
    """
    check = [sys.executable, "-I", "-c", Path(guard.__file__).read_text(encoding="utf-8")]
    check += [str(folder), guard.digest(str(folder / guard.TASKS)), str(code.folder), code.sha256]
    return [
        *cluster.setup,
        f"{shlex.join(check)} || exit 1",
        # No bytecode: new files in the snapshot would change its digest.
        f"export PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1 {JOB_VARIABLE}=1",
        # Some releases of Slurm do not pass the job's CPU cores to its steps.
        "export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}",
        f"export PYTHONPATH={shlex.quote(str(code.folder))}${{PYTHONPATH:+:$PYTHONPATH}}",
        *([f"export {VARIABLE}={shlex.quote(cluster.container)}"] if cluster.container else []),
    ]


def send(
    folder: Path,
    part: str,
    first: int,
    n: int,
    needed: JobResources,
    cluster: Cluster,
    code: Snapshot,
    after: Sequence[str] = (),
) -> str:
    """Submit the tasks `first` to `first + n - 1` of the submission in `folder`; return Slurm's id.

    `part`: end of the job's name, the number of the first task or FOLLOW. `after`: ids of jobs that
    must end first. Raises ClusterError if Slurm refuses the jobs.
    """
    tasks, path = needed.gpus if needed.nodes > 1 else 1, str(folder / guard.TASKS)
    given: dict[str, Any] = {
        **{name: getattr(cluster, name) for name in ("partition", "account", "qos", "constraint")},
        "nodes": needed.nodes,
        "ntasks-per-node": tasks,
        "cpus-per-task": needed.cpus // tasks,
        "gpus-per-node": needed.gpus or None,
        "mem": f"{round(needed.mem_gib * 1024)}M",
        "requeue": True,
        "dependency": f"afterany:{':'.join(after)}" if after else None,
        "kill-on-invalid-dep": "no" if after else None,
        **{k: True if v.lower() == "true" else v for k, v in cluster.options.items()},
    }
    # in one line: a second line would be a command of the script
    lines = {k: " ".join(v.split()) if isinstance(v, str) else v for k, v in given.items()}
    # Variables of an enclosing job would pass on its memory limit, and its ids to submitit.
    hidden = {k: os.environ.pop(k) for k in [*os.environ] if slurm.is_hidden(k)}
    import submitit

    try:
        executor = submitit.SlurmExecutor(folder=folder)
        executor.update_parameters(
            job_name=f"{folder.name}-{part}",
            time=needed.time_min,
            signal_delay_s=min(cluster.warn_s, 30 * needed.time_min),
            array_parallelism=cluster.parallel,
            setup=setup(folder, cluster, code),
            stderr_to_stdout=True,
            wckey=None,
            additional_parameters={k: v for k, v in lines.items() if v is not None},
            # --overlap: share the cores with the steps of the workers
            srun_args=["--overlap", "--nodes=1", "--ntasks=1", "--relative=0"],
        )
        if part == FOLLOW:
            return executor.submit(job.follow, path).job_id
        jobs = executor.map_array(job.run, [path] * n, range(first, first + n))
        return jobs[0].job_id.partition("_")[0]
    except RuntimeError as error:  # submitit's, with sbatch's message
        raise ClusterError(
            f"Slurm refused the jobs: {' '.join(str(error).split())}. Each asks for {needed.nodes} "
            f"node(s) with {needed.cpus} CPU core(s), {needed.gpus} GPU(s), {needed.mem_gib:g} GiB "
            f"and {needed.time_min} min: lower cluster.gpus, .cpus or .mem_gib, leave out large "
            "runs (exec.max_gpus=N), or choose another cluster.partition."
        ) from None
    finally:
        os.environ.update(hidden)
