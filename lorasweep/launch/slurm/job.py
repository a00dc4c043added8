"""The program inside a Slurm job: do one task of a submission.

    python -m lorasweep.launch.slurm.job TASKS.jsonl LINE

    {"runs": [spec, ...], "exec": {...}, "requeues": n, "skip": FILE}      train these runs
    {"command": [...], "requeues": n}                                      run a command
    {"command": [...], "follow": request, "idle": n, "updates": n}         follow up on a sweep

A job may be killed at any time and start again on another node: runs resume from checkpoints. At
its time limit a job requeues itself. After preemption, Slurm decides whether to requeue the job.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from lorasweep.errors import ClusterError, LorasweepError
from lorasweep.launch import local
from lorasweep.launch.process import Stopped
from lorasweep.launch.slurm import queue as slurm
from lorasweep.launch.slurm.container import Container
from lorasweep.launch.worker import skipped
from lorasweep.methods.registry import spec_from
from lorasweep.spec.execution import Exec
from lorasweep.store import claims
from lorasweep.store.run_store import FINAL, RunStore
from lorasweep.sweep.grid import Point

PATIENCE_S = claims.SILENCE_S + 2 * claims.HEARTBEAT_S
"""Seconds that a job waits for runs of another process: enough to see whether that one is dead."""
PAUSES_S = (30.0, 60.0, 120.0, 240.0)
"""Seconds between tries of a command, such as when Slurm refuses or the lock is held."""
TRY_AGAIN, INTERRUPTED = 75, 130
"""Exit statuses of a command: a temporary failure (EX_TEMPFAIL), a signal."""
LISTEN_S = 1.0
"""Seconds within which all signals of one cause arrive. USR2 alone means that the time limit is
near. USR2 with TERM means preemption or cancellation."""
CLOSE_S = 20.0
"""Seconds for the follow-up command to stop: less than Slurm's default KillWait, 30 s."""
REQUEUE_S = 30
"""Seconds within which Slurm ends a job that requeued itself."""
_print = partial(print, flush=True)


class Signals:
    """Turns Slurm's first signal into a KeyboardInterrupt, and records all signals."""

    def __init__(self) -> None:
        self.got: set[int] = set()
        for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._take)
        signal.signal(signal.SIGCONT, lambda number, frame: None)

    def _take(self, number: int, frame: object) -> None:
        first = not self.got
        self.got.add(number)
        if first:
            raise KeyboardInterrupt


def run(path: str, number: int) -> None:
    """Do the task in a line of a file that `guard` has checked. LorasweepError: the job failed."""
    signals = Signals()
    task = json.loads(Path(path).read_text().splitlines()[number])
    try:
        if "command" in task:
            return _command(task["command"], _container(task))
        _train(task)
        with suppress(ClusterError):  # else held jobs would wait until somebody runs the command
            name, jobs = Path(path).parent.name, slurm.jobs_of(Path(task["exec"]["runs_dir"]))
            if held := slurm.release(j for j in jobs if j.name.startswith(name)):
                _print(f"released jobs that Slurm held after a failed start: {', '.join(held)}")
    except (Stopped, KeyboardInterrupt):
        time.sleep(LISTEN_S)
        names = ", ".join(signal.Signals(n).name for n in sorted(signals.got))
        _print(
            f"stopped by {names or 'a signal to its workers'}; finished runs are kept, the others "
            "resume from their checkpoints"
        )
        if signals.got != {signal.SIGUSR2}:
            return
        restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        if restarts >= task["requeues"]:
            return _print(f"not queued again: cluster.requeues={task['requeues']} is reached")
        command = ["scontrol", "requeue", str(os.environ.get("SLURM_JOB_ID"))]
        done = subprocess.run(command, capture_output=True, text=True)
        _print(f"queued again: {done.stderr.strip() or 'yes'}")
        time.sleep(REQUEUE_S)


def _train(task: dict[str, Any]) -> None:
    exec_ = Exec(**task["exec"])
    store = RunStore(exec_.runs_dir, jobs=slurm.RunningJobs(exec_.runs_dir))
    store.prepare()
    points = [Point(s.method.name, s) for s in map(spec_from, task["runs"])]
    unwanted = skipped(task["skip"])
    left = [p for p in points if p.id not in unwanted and store.state(p.id) not in FINAL]
    _print(f"{len(points)} runs, {len(left)} to do, {exec_.workers} worker(s)")
    if not left:
        return  # Slurm ran this job twice, or another process trained the runs

    def report(event: dict[str, Any]) -> None:
        if "ended" in event or "note" in event:
            _print(json.dumps(event))

    n_nodes = int(os.environ.get("SLURM_JOB_NUM_NODES") or 1)
    more = {"skip": task["skip"], "patience_s": PATIENCE_S}
    with local.Workers(store, exec_.world_size, n_nodes, _container(task)) as workers:
        local.run_points(left, store, exec_, report, task["trainer"], workers=workers, **more)
    counts = Counter(store.states(p.id for p in left).values())
    _print("over: " + ", ".join(f"{n} {state}" for state, n in sorted(counts.items())))


def _container(task: dict[str, Any]) -> Container | None:
    return Container(**task["container"]) if task.get("container") else None


def _command(arguments: list[str], container: Container | None) -> None:
    """Run a command of lorasweep, in the container if there is one; again if that may help."""
    words = [sys.executable, *arguments]
    if container:
        srun = ["srun", "--overlap", "--nodes=1", "--ntasks=1", "--unbuffered", *container.srun()]
        python = container.python(os.environ, ("CUDA_VISIBLE_DEVICES",))
        words = [*(srun if container.by_srun else ()), *python, *arguments]
    for pause in (*PAUSES_S, None):
        code = _call(words)
        if code == 0:
            return
        if code != TRY_AGAIN or pause is None:
            raise LorasweepError(f"the command ended with status {code}: see above.")
        _print(f"next try in {pause:.0f} s")
        time.sleep(pause)


def _call(command: list[str]) -> int:
    """Run a command in a separate process, and stop it cleanly after a signal; return its status.

    The command must handle USR2, which srun passes on (see `local.SRUN_STOP`).
    """
    process = subprocess.Popen(command)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGUSR2)  # it may hold a lock, or be in the middle of an sbatch
        try:
            process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            process.kill()
        raise
    if code < 0 or code == INTERRUPTED:
        time.sleep(LISTEN_S)  # the signal also reaches this process, and stops it here
    return code


if __name__ == "__main__":
    try:
        run(sys.argv[1], int(sys.argv[2]))
    except LorasweepError as error:
        sys.exit(f"lorasweep: {error}")
