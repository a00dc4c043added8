"""What runs inside a Slurm job: the runs of one task, side by side on what the job was given.

    python -m lorasweep.launch.slurm.job TASK.json
    {"runs": [spec, ...], "exec": {...}, "requeues": n, "skip": FILE}      train these
    {"follow": REQUEST.json, "idle": n, "finished": n}                     ask the sweep again

A job is safe to run twice, to kill at any time, and to start again elsewhere: it trains what is
free and unfinished, each run from its checkpoint. Warned of its time limit or of preemption it
writes checkpoints; whether it comes back is Slurm's business, except at a time limit, where it
queues itself again.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lorasweep.errors import ClusterError, GaveUp, LorasweepError, StoreError
from lorasweep.launch import local
from lorasweep.launch.slurm import client as slurm
from lorasweep.launch.slurm import submissions
from lorasweep.launch.worker import Stopped, skipped
from lorasweep.methods.registry import spec_from
from lorasweep.spec.execution import Exec
from lorasweep.store import claims as ownership
from lorasweep.store import files
from lorasweep.store.run_store import FINAL, RunStore
from lorasweep.sweep.grid import Point

PATIENCE_S = ownership.SILENCE_S + 2 * ownership.HEARTBEAT_S
"""How long a job waits for runs that another execution still holds: long enough to see that one
died without a word."""
FOLLOW_PAUSES_S = (30.0, 60.0, 120.0, 240.0)
"""Pauses of the following job between its tries when Slurm does not answer, or refuses, or the lock
is held."""
LISTEN_S = 1.0
"""Signals of one cause come within this time: USR2 alone is a time limit, with TERM it is
preemption or a cancellation."""


class Signals:
    """Turns the first of Slurm's signals into a KeyboardInterrupt and remembers all of them."""

    def __init__(self) -> None:
        self.got: set[int] = set()
        for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._take)
        signal.signal(signal.SIGCONT, lambda number, frame: None)

    def _take(self, number: int, frame: Any) -> None:
        first = not self.got
        self.got.add(number)
        if first:
            raise KeyboardInterrupt


def run(path: str) -> None:
    """Do what the task file at `path` says. Raises what shall make the job FAILED."""
    signals = Signals()
    try:
        task = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise LorasweepError(
            f"{path} is not visible on node {os.environ.get('SLURMD_NODENAME', '?')}: the run folder must lie on a file system "
            "that all nodes share (exec.runs_dir=FOLDER)."
        ) from None
    try:
        if "follow" in task:
            return _follow(task)
        _train(task)
        _release_stuck(Path(path).parent.parent)
    except (Stopped, KeyboardInterrupt):
        time.sleep(LISTEN_S)
        said = (
            ", ".join(signal.Signals(n).name for n in sorted(signals.got))
            or "a signal to its workers"
        )
        print(
            f"stopped by {said}; finished runs are kept, the others go on from their checkpoints",
            flush=True,
        )
        if signals.got == {signal.SIGUSR2}:
            _requeue(task)


def _train(task: dict[str, Any]) -> None:
    exec_ = Exec(**task["exec"])
    store = RunStore(exec_.runs_dir)
    files.share_as(store.root)
    specs = [spec_from(plain) for plain in task["runs"]]
    points = [Point(s.method.name, s, s.id) for s in specs]
    left = [
        p for p in points if p.id not in skipped(task["skip"]) and store.state(p.id) not in FINAL
    ]
    print(f"{len(points)} runs, {len(left)} to do, {exec_.workers} worker(s)", flush=True)
    if not left:
        return  # Slurm ran this job twice, or others were faster

    def report(event: dict[str, Any]) -> None:
        if "ended" in event:
            print(json.dumps(event), flush=True)

    local.run_points(left, store, exec_, report, task.get("trainer"), PATIENCE_S, task["skip"])
    states = store.states(p.id for p in left)
    print(
        "over: "
        + ", ".join(f"{list(states.values()).count(s)} {s}" for s in sorted(set(states.values()))),
        flush=True,
    )


def _release_stuck(folder: Path) -> None:
    """Let siblings start that Slurm holds after a failed start: otherwise they wait until somebody
    asks for the sweep."""
    submission = submissions.read(folder)
    try:
        held = (
            [j.label for j in slurm.queue([a.name for a in submission.arrays]) if j.stuck]
            if submission
            else []
        )
    except ClusterError:
        return
    if held:
        print(f"released, as their nodes failed at the start: {', '.join(held)}", flush=True)
        slurm.release(held)


def _requeue(task: dict[str, Any]) -> None:
    """Put this job back into the queue, as far as it is allowed to; a failure is said and no more:
    the job that follows the sweep's jobs, or the same command, submits what is left."""
    job, before = os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    if before >= task["requeues"]:
        print(f"not queued again: {before} times are enough (cluster.requeues)", flush=True)
        return
    done = subprocess.run(
        ["scontrol", "requeue", str(job)], capture_output=True, text=True, check=False
    )
    print(f"queued again: {done.stderr.strip() or 'yes'}", flush=True)
    time.sleep(30)  # Slurm ends this execution


def _follow(task: dict[str, Any]) -> None:
    from lorasweep.cli.actions import act
    from lorasweep.sweep.request import from_file

    request = from_file(json.loads(Path(task["follow"]).read_bytes()))
    for pause in (*FOLLOW_PAUSES_S, None):
        try:
            act(request, task.get("trainer"), follow=task)
            return
        except (ClusterError, StoreError) as error:
            if pause is None or isinstance(error, GaveUp):
                raise
            print(f"{error}\nonce more in {pause:.0f} s", flush=True)
            time.sleep(pause)


if __name__ == "__main__":
    try:
        run(sys.argv[1])
    except LorasweepError as error:
        sys.exit(f"lorasweep: {error}")
