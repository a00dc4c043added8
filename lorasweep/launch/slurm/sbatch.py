"""Submit an array of jobs with submitit (used only here)."""

import os
import shlex
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasweep.errors import ClusterError
from lorasweep.launch.slurm import guard, job
from lorasweep.launch.slurm.container import VARIABLE
from lorasweep.launch.slurm.resources import JobResources
from lorasweep.launch.slurm.snapshot import Snapshot
from lorasweep.launch.slurm.submissions import Array
from lorasweep.spec.execution import Cluster
from lorasweep.store.claims import JOB_VARIABLE


@dataclass(frozen=True)
class Description:
    """An array of jobs."""

    folder: Path
    """Folder of the submission, with tasks/<k>.json and logs in jobs/."""
    array: Array
    needed: JobResources
    cluster: Cluster
    code: Snapshot
    after: tuple[str, ...] = ()
    """Ids of jobs that must end first."""

    def options(self) -> dict[str, str | int | bool]:
        """Return the sbatch options by name without dashes, except name, time and signal."""
        c = self.cluster
        given: dict[str, Any] = {
            "partition": c.partition,
            "account": c.account,
            "qos": c.qos,
            "constraint": c.constraint,
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
        code = shlex.quote(str(self.code.folder))
        path = f"export PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}}"
        # No bytecode: new files in the snapshot would change its digest.
        python = f"export PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1 {JOB_VARIABLE}=1"
        # Some releases of Slurm do not pass the job's CPU cores to its steps.
        srun = "export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}"
        manifest = guard.sha256(str(self.folder / guard.MANIFEST))
        check = [sys.executable, "-I", "-c", Path(guard.__file__).read_text(encoding="utf-8")]
        check += [str(self.folder), manifest, str(self.array.first)]
        check += [str(self.code.folder), self.code.sha256]
        checked = f"{shlex.join(check)} || exit 1".splitlines()
        image = self.cluster.container
        container = [f"export {VARIABLE}={shlex.quote(image)}"] if image else []
        return [*self.cluster.setup, *checked, python, srun, path, *container]


def submit(described: Description) -> str:
    """Submit an array through submitit and return its id; raise ClusterError if refused."""
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    array, folder = described.array, described.folder
    tasks = [str(folder / "tasks" / f"{k}.json") for k in range(array.first, array.first + array.n)]
    # Inside a job, hide the variables of this job. Otherwise the new job would inherit a second
    # memory limit, and submitit would confuse the job ids.
    names = [k for k in os.environ if k.startswith(("SLURM_", "SUBMITIT_", "SRUN_"))]
    hidden = {k: os.environ.pop(k) for k in names if k != "SLURM_CONF"}
    with ExitStack() as stack:
        stack.callback(os.environ.update, hidden)
        executor = submitit.SlurmExecutor(folder=folder / "jobs")
        executor.update_parameters(
            job_name=array.name,
            time=described.needed.time_min,
            signal_delay_s=described.cluster.warn_s,
            array_parallelism=described.cluster.parallel,
            setup=described.setup(),
            stderr_to_stdout=True,
            additional_parameters=described.options(),
            srun_args=described.srun(),
        )
        try:
            jobs = executor.map_array(job.run, tasks)
        except (FailedJobError, FailedSubmissionError) as error:  # contains sbatch's message
            text = str(error)
            lines = [line.strip() for line in text.splitlines() if "error:" in line.lower()]
            complaint = "; ".join(dict.fromkeys(lines)) or text.strip()
            raise ClusterError(f"Slurm refused the jobs: {complaint}") from None
    return jobs[0].job_id.partition("_")[0]
