"""Submit one command of lorasweep as a job, such as `action=check_gpu` on a node with GPUs."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from lorasweep.errors import ClusterError
from lorasweep.launch.slurm import resources, sbatch, submissions, submit
from lorasweep.launch.slurm.container import container_of
from lorasweep.launch.slurm.resources import JobResources
from lorasweep.launch.slurm.sbatch import Description
from lorasweep.launch.slurm.submissions import Array, Notify
from lorasweep.spec.execution import Cluster, Exec
from lorasweep.store.run_store import RunStore


def submit_command(
    cluster: Cluster,
    exec_: Exec,
    arguments: Sequence[str],
    name: str,
    notify: Notify,
    mem_gib: float = 16.0,
    time_min: int = 60,
) -> str:
    """Submit a job that runs `python -m lorasweep ARGUMENTS cluster=local`; return a line to print.

    The line names the job and its log. The function does not wait for the job. The job gets the
    profile's partition, GPUs and CPU cores of one job, and runs a snapshot of this code in the
    current folder. At its time limit it stops the command and queues itself again.

    Args:
        cluster: the profile, of kind slurm.
        exec_: `runs_dir` has the records and the log.
        arguments: options of the command line, such as action=NAME and the folders; no cluster=.
        name: while a job of this name is queued or running, no other one is submitted, whatever its
            arguments. It must not be the name of a sweep.
        notify: prints a line, such as that another command is submitting now.
        mem_gib: memory of the job, if the profile sets none.
        time_min: time limit in minutes, if the profile sets none (at most the partition's).

    Raises:
        ClusterError: no Slurm or partition, no node is large enough or sees the run folder, or
            Slurm refused the job.
        StoreError: another command is submitting and does not end.
    """
    root = Path(exec_.runs_dir)
    RunStore(root).prepare()
    partition, code = submit.prepare(cluster, root)
    workers = resources.workers_of(cluster)
    limit = cluster.time_min or int(min(time_min, partition.time_min))
    memory = cluster.mem_gib or mem_gib
    needed = JobResources(cluster.cpus * workers, cluster.gpus, memory, limit, workers)
    resources.check_fits(needed, cluster, partition)
    with submissions.locked(root, notify):
        queue = submissions.reconcile(root, notify)
        if queue.unavailable:
            raise ClusterError(queue.unavailable)
        same = [(s, j) for s, _, j in queue.live() if s.record["sweep"] == name]
        if same:
            submission, job = same[0]
            state = "running" if job.state in ("RUNNING", "COMPLETING") else "queued"
            return f"{name}: job {job.label} is {state} already; log: {submission.log(job.label)}"
        folder = submissions.home(root) / submissions.new_name(name)
        array = Array("0", f"{folder.name}-0", 0, 1)
        command = ["-u", "-m", "lorasweep", *arguments, "cluster=local"]
        container = container_of(cluster, exec_)
        task = {"arguments": command, "requeues": cluster.requeues}
        task |= {"container": container and dataclasses.asdict(container)}
        contents = {"tasks/0.json": task}
        submit.write_files(folder, contents, name, [], [[]], [array], code)
        described = Description(folder, array, needed, cluster, code)
        try:
            number = sbatch.submit(described)
        except ClusterError:
            submissions.note_array(folder, array.part, None)
            raise
        submissions.note_array(folder, array.part, number)
    log = submissions.Submission(folder, {}, []).log(number)
    return f"{name}: submitted as job {number}; log: {log} (scancel {number} ends it)"
