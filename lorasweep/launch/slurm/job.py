"""What runs inside a Slurm job: the runs of one task, side by side on what the job was given.

    python -m lorasweep.launch.slurm.job TASK.json

    {"runs": [spec, ...], "exec": {...}, "requeues": n, "skip": FILE}      train these
    {"follow": REQUEST.json, "command": [...], "idle": n, "finished": n}   ask the sweep again

A job is safe to run twice, to kill at any time, and to start again on another node: it trains what
is free and unfinished, each run from its checkpoint. Warned of its time limit or of preemption it
writes checkpoints. Slurm decides whether it comes back, except at a time limit, where it queues
itself again.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

from lorasweep.errors import ClusterError, LorasweepError
from lorasweep.launch import local
from lorasweep.launch.process import Stopped
from lorasweep.launch.slurm import client, submissions
from lorasweep.launch.slurm.running import RunningJobs
from lorasweep.launch.worker import skipped
from lorasweep.methods.registry import spec_from
from lorasweep.spec.execution import Exec
from lorasweep.store import claims, files
from lorasweep.store.run_store import FINAL, RunStore
from lorasweep.sweep.grid import Point

PATIENCE_S = claims.SILENCE_S + 2 * claims.HEARTBEAT_S
"""How long a job waits for runs that another execution still holds: long enough to see that one
died without a word."""
FOLLOW_PAUSES_S = (30.0, 60.0, 120.0, 240.0)
"""Pauses of the following job between its tries when Slurm does not answer, or refuses, or the lock
is held."""
TRY_AGAIN, INTERRUPTED = 75, 130
"""Exit statuses of the following command: another try may help (EX_TEMPFAIL); a signal came."""
LISTEN_S = 1.0
"""Signals of one cause come within this time: USR2 alone is a time limit, with TERM it is
preemption or a cancellation."""
CLOSE_S = 20.0
"""How long a following command that was asked to stop may take: less than the 30 s (KillWait) after
which Slurm kills the job."""
REQUEUE_S = 30
"""Slurm ends an execution that queued itself again within this time."""


class Signals:
    """Turns the first of Slurm's signals into a KeyboardInterrupt and remembers all of them."""

    def __init__(self) -> None:
        self.got: set[int] = set()
        for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._take)
        signal.signal(signal.SIGCONT, lambda number, frame: None)

    def _take(self, number: int, frame: FrameType | None) -> None:
        first = not self.got
        self.got.add(number)
        if first:
            raise KeyboardInterrupt


def run(path: str) -> None:
    """Do the task in the file at `path`.

    Raises:
        LorasweepError: the job must count as FAILED.
    """
    signals = Signals()
    try:
        task = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise LorasweepError(
            f"{path} is not visible on node {os.environ.get('SLURMD_NODENAME', '?')}: the run "
            "folder must lie on a file system that all nodes share (exec.runs_dir=FOLDER)."
        ) from None
    try:
        if "follow" in task:
            return _follow(path, task)
        _train(task)
        _release_stuck(Path(path).parent.parent)
    except (Stopped, KeyboardInterrupt):
        time.sleep(LISTEN_S)
        names = ", ".join(signal.Signals(n).name for n in sorted(signals.got))
        _print(
            f"stopped by {names or 'a signal to its workers'}; finished runs are kept, the others "
            "go on from their checkpoints"
        )
        if signals.got == {signal.SIGUSR2}:
            _requeue(task)


def _train(task: dict[str, Any]) -> None:
    exec_ = Exec(**task["exec"])
    store = RunStore(exec_.runs_dir, jobs=RunningJobs())
    files.share_as(store.root)
    specs = [spec_from(plain) for plain in task["runs"]]
    points = [Point(s.method.name, s) for s in specs]
    unwanted = skipped(task["skip"])
    left = [p for p in points if p.id not in unwanted and store.state(p.id) not in FINAL]
    _print(f"{len(points)} runs, {len(left)} to do, {exec_.workers} worker(s)")
    if not left:
        return  # Slurm ran this job twice, or others were faster

    def report(event: dict[str, Any]) -> None:
        if "ended" in event:
            _print(json.dumps(event))

    local.run_points(left, store, exec_, report, task.get("trainer"), PATIENCE_S, task["skip"])
    counts = Counter(store.states(p.id for p in left).values())
    _print("over: " + ", ".join(f"{n} {state}" for state, n in sorted(counts.items())))


def _release_stuck(folder: Path) -> None:
    """Let siblings start that Slurm holds after a failed start.

    They would wait until somebody gives the sweep's command.
    """
    submission = submissions.read(folder)
    if submission is None:
        return
    try:
        held = [j.label for j in client.queue([a.name for a in submission.arrays]) if j.stuck]
    except ClusterError:
        return
    if held:
        _print(f"released, as their nodes failed at the start: {', '.join(held)}")
        client.release(held)


def _requeue(task: dict[str, Any]) -> None:
    """Put this job back into the queue, as far as it is allowed to.

    A failure is printed and no more: the job that follows the sweep's jobs, or the same command,
    submits what is left.
    """
    job, before = os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    if before >= task["requeues"]:
        _print(f"not queued again: {before} times are enough (cluster.requeues)")
        return
    done = subprocess.run(
        ["scontrol", "requeue", str(job)], capture_output=True, text=True, check=False
    )
    _print(f"queued again: {done.stderr.strip() or 'yes'}")
    time.sleep(REQUEUE_S)


def _follow(path: str, task: dict[str, Any]) -> None:
    """Ask the sweep again, in a process of its own, which reads this task's file."""
    for pause in (*FOLLOW_PAUSES_S, None):
        code = _status_of([sys.executable, *task["command"], path])
        if code == 0:
            return
        if code < 0 or code == INTERRUPTED:
            time.sleep(LISTEN_S)  # the signal reaches this process as well, and stops it here
        if code != TRY_AGAIN or pause is None:
            raise LorasweepError(f"the command that follows ended with status {code}: see above.")
        _print(f"once more in {pause:.0f} s")
        time.sleep(pause)


def _status_of(command: list[str]) -> int:
    """Run a command and return its exit status; a signal to this process stops the command first.

    It may hold the lock of the run folder, or be between an sbatch and its record.
    """
    process = subprocess.Popen(command)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()
        try:
            process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            process.kill()
        raise


def _print(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    try:
        run(sys.argv[1])
    except LorasweepError as error:
        sys.exit(f"lorasweep: {error}")
