"""One worker whose processes are on several nodes of a Slurm job: `srun` starts them.

The job itself is one task, on the first node. It starts these processes beside itself, so that a
process that dies does not end the job. GPUs are not shared out among them: each sees all of its
node and takes the one with the number LOCAL_RANK.
"""

import os
import signal
import socket
from collections.abc import Mapping

HERE = ("--overlap", "--nodes=1", "--ntasks=1", "--relative=0")
"""srun's options for the job's own task: on the first node, beside the processes of runs."""
STOP = signal.SIGUSR2
"""srun passes it on to all processes and waits for them; at SIGTERM it kills them at once."""
RANKS = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID"}
"""torchrun's variables, and those in which Slurm tells each process the same."""
KILLED = 128
"""srun's exit status is this plus the signal's number if a process was killed."""


def step(nodes: int, world_size: int, last_s: float) -> list[str]:
    """Return the command before the one of `world_size` processes, as many on each of `nodes`.

    `last_s`: seconds that the others may take to end after the first one.
    """
    return [
        "srun",
        "--overlap",
        f"--nodes={nodes}",
        f"--ntasks={world_size}",
        f"--ntasks-per-node={world_size // nodes}",
        "--distribution=block",
        f"--wait={last_s:.0f}",
        "--kill-on-bad-exit=0",
        "--export=ALL",
        "--unbuffered",
    ]


def host() -> str:
    """Return the name under which other nodes find this one."""
    return socket.gethostname()


def take_rank() -> None:
    """Set RANK and LOCAL_RANK of a process that srun started; others have them already."""
    for name, given in RANKS.items():
        if name not in os.environ:
            os.environ[name] = os.environ[given]


def nodes_of_job(environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of nodes of the Slurm job that this process is part of; 1 without a job."""
    return int(environment.get("SLURM_JOB_NUM_NODES") or 1)


def status_of(code: int) -> int:
    """Return srun's exit status as that of one process: negative if a signal ended one."""
    return KILLED - code if code > KILLED else code
