"""What submitit runs inside a Slurm job: train the runs of one task, a line of tasks.jsonl.

    {"runs": [spec, ...], "exec": {...}, "requeues": n, "container": ..., "trainer": ...}

A job may be killed at any time and start again on another node: runs resume from checkpoints. At
its time limit a job requeues itself. After preemption, Slurm decides whether to requeue the job.
What the follow-up job does: lorasweep/follow_up.py.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from lorasweep.errors import ClusterError, LorasweepError
from lorasweep.launch import local
from lorasweep.launch.container import Container
from lorasweep.launch.pool import Workers
from lorasweep.launch.process import Stopped
from lorasweep.launch.slurm import queue as slurm
from lorasweep.methods.registry import spec_from
from lorasweep.spec.execution import Exec
from lorasweep.store.run_store import FINISHED, RunStore
from lorasweep.sweep.grid import Point

LISTEN_S = 1.0
"""Seconds within which all signals of one cause arrive. USR2 alone means that the time limit is
near. USR2 with TERM means preemption or cancellation."""
_print = partial(print, flush=True)


@contextmanager
def stoppable(requeues: int) -> Iterator[None]:
    """Stop the block at Slurm's first signal, by a KeyboardInterrupt, and end it without an error.

    If the time limit was the cause, queue this job again, up to `requeues` times.
    """
    got: list[int] = []

    def take(number: int, frame: object) -> None:
        got.append(number)
        if len(got) == 1:
            raise KeyboardInterrupt

    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, take)
    signal.signal(signal.SIGCONT, lambda number, frame: None)
    try:
        yield
    except (Stopped, KeyboardInterrupt):
        time.sleep(LISTEN_S)
        names = ", ".join(sorted({signal.Signals(n).name for n in got}))
        _print(
            f"stopped by {names or 'a signal to its workers'}; finished runs are kept, the others "
            "resume from their checkpoints"
        )
        if set(got) != {signal.SIGUSR2}:
            return
        if int(os.environ.get("SLURM_RESTART_COUNT") or 0) >= requeues:
            return _print(f"not queued again: cluster.requeues={requeues} is reached")
        command = ["scontrol", "requeue", str(os.environ.get("SLURM_JOB_ID"))]
        done = subprocess.run(command, capture_output=True, text=True)
        _print(f"queued again: {done.stderr.strip() or 'yes'}")
        time.sleep(30)  # within which Slurm ends this job


def train(task: dict[str, Any], submission: str) -> None:
    """Train the runs of a task, then help the other jobs of the submission to start."""
    exec_ = Exec(**task["exec"])
    store = RunStore(exec_.runs_dir, jobs=slurm.RunningJobs(exec_.runs_dir))
    store.prepare()
    points = [Point(s.method.name, s) for s in map(spec_from, task["runs"])]
    left = [p for p in points if store.state(p.id) not in FINISHED]
    _print(f"{len(points)} runs, {len(left)} to do, {exec_.workers} worker(s)")

    def report(event: dict[str, Any]) -> None:
        if "ended" in event or "note" in event:
            _print(json.dumps(event))

    container = task["container"] and Container(**task["container"])
    nodes, trainer = int(os.environ.get("SLURM_JOB_NUM_NODES") or 1), task["trainer"]
    if left:  # else Slurm ran this job twice, or another process trained the runs
        with Workers(store, exec_.world_size, nodes, container) as workers:
            local.run_points(left, store, exec_, report, trainer, workers=workers, wait=False)
        counts = Counter(store.states(p.id for p in left).values())
        _print("over: " + ", ".join(f"{n} {state}" for state, n in sorted(counts.items())))
    with suppress(ClusterError):  # else held jobs would wait until somebody runs the command
        jobs = slurm.jobs_of(store.root)
        slurm.release((j for j in jobs if j.name.startswith(submission)), _print)


def run(path: str, number: int) -> None:
    """Do the task in a line of a file that `guard` has checked: the function of a job."""
    task = json.loads(Path(path).read_text().splitlines()[number])
    try:
        with stoppable(task["requeues"]):
            train(task, Path(path).parent.name)
    except LorasweepError as error:
        sys.exit(f"lorasweep: {error}")


def follow(path: str) -> None:
    """Become the command of a follow-up job, `python -m lorasweep --follow PATH`."""
    os.execv(sys.executable, [sys.executable, "-u", "-m", "lorasweep", "--follow", path])
