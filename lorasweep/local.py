"""Run packs on this machine: worker processes that claim what is free, until nothing is left to do.

Knows processes and signals. Workers are told what to do by a JSON file and run `lorasweep.execute`; two commands
that ask the same sweep at once share its runs, each waiting for what the other has claimed.
"""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorasweep import files, machine
from lorasweep.errors import StoreError, TrainingError
from lorasweep.execute import StopFlag, Stopped, Trainer, execute
from lorasweep.grid import Point
from lorasweep.plan import Plan, make_plan
from lorasweep.spec import Exec, canonical
from lorasweep.store import RunStore

POLL_S = 0.5
"""Seconds between looks at runs that another process works on."""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def run_points(
    points: Sequence[Point], store: RunStore, exec_: Exec, report: Callable[[dict[str, Any]], None],
    trainer: Trainer | None = None,
) -> None:  # fmt: skip
    """Bring every run of `points` to an end, or to a recorded failure. Raises Stopped on Ctrl-C.

    With `trainer` the packs run in this process (tests); without, in worker processes.
    """
    tried: set[str] = set()
    while True:
        plan = make_plan(points, store, exec_)
        mine = [p for p in plan.todo if plan.states[p.id] != "running" and p.id not in tried]
        elsewhere = [p for p in plan.todo if plan.states[p.id] == "running"]
        if mine:
            if trainer is None:
                _run_workers(plan, store, exec_, report)
            else:
                for pack in plan.packs:
                    specs = [p.spec for p in pack.points]
                    execute(specs, exec_, store, trainer, report, StopFlag(), pack.micro_batch_size)
            states = store.states(p.id for p in mine)
            # A run that failed here is not tried again by this command; one that went stale (its worker was
            # killed from outside) is, as long as attempts are left.
            tried |= {i for i, s in states.items() if s == "failed"}
            tried |= {i for i, s in states.items() if s == "stale" and store.failures(i) >= exec_.max_attempts}
        elif elsewhere:
            time.sleep(POLL_S)
        else:
            return


def _run_workers(plan: Plan, store: RunStore, exec_: Exec, report: Callable[[dict[str, Any]], None]) -> None:
    """Start the workers on one job file, pass their events on, and wait for all of them."""
    jobs = store.root / ".jobs"
    job = {
        "packs": [
            {"runs": [json.loads(canonical(p.spec)) for p in pack.points], "micro_batch_size": pack.micro_batch_size}
            for pack in plan.packs
        ],
        "exec": {**asdict(exec_), "threads": plan.threads, "workers": plan.workers},
        # A worker has not watched other machines' heartbeats, so it is told which owners were found dead.
        "dead": {p.id: store.last_attempt(p.id) for p in plan.todo if plan.states[p.id] == "stale"},
    }
    path = jobs / f"{os.getpid()}-{os.urandom(3).hex()}.json"
    try:
        jobs.mkdir(exist_ok=True)
        files.write_atomic(path, json.dumps(job).encode())
    except OSError as error:
        raise StoreError(f"{path} cannot be written ({error.strerror}). Free some space, then ask again.") from None
    env = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(plan.threads)), "TOKENIZERS_PARALLELISM": "false"}
    root = str(Path(__file__).resolve().parent.parent)
    env["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [env.get("PYTHONPATH")])])
    events: queue.Queue[dict[str, Any] | None] = queue.Queue()
    with open(path.with_suffix(".log"), "ab") as log:
        workers = [
            subprocess.Popen([sys.executable, "-m", "lorasweep.execute", str(path), str(k)], stdout=subprocess.PIPE,
                             stderr=log, env={**env, **_gpu_of(k)}, text=True)
            for k in range(plan.workers)
        ]  # fmt: skip
    readers = [threading.Thread(target=_read, args=(w, events), daemon=True) for w in workers]
    for reader in readers:
        reader.start()
    error = None
    try:
        open_ends = len(workers)
        while open_ends:
            event = events.get()
            if event is None:
                open_ends -= 1
            elif "error" in event:
                error = event["error"]
            else:
                report(event)
        codes = [w.wait() for w in workers]
    except KeyboardInterrupt:
        for w in workers:  # they finish their update, write a checkpoint and leave
            if w.poll() is None:
                w.terminate()
        for w in workers:
            w.wait()
        raise Stopped from None
    if error:
        raise TrainingError(error)
    if 3 in codes:
        raise Stopped
    crashed = [c for c in codes if c not in (0, 3)]
    if crashed and all(c > 0 for c in crashed):  # a signal (c < 0) leaves stale runs, which are taken up again
        tail = path.with_suffix(".log").read_text(errors="replace").splitlines()[-8:]
        raise TrainingError("a worker ended with an error of its own:\n" + "\n".join(tail))
    path.unlink(missing_ok=True)
    path.with_suffix(".log").unlink(missing_ok=True)


def _gpu_of(worker: int) -> dict[str, str]:
    """Give each worker one GPU, in turn; nothing where there is none."""
    gpus = machine.gpus()
    return {"CUDA_VISIBLE_DEVICES": gpus[worker % len(gpus)].uuid} if gpus else {}


def _read(worker: subprocess.Popen, events: "queue.Queue[dict[str, Any] | None]") -> None:
    assert worker.stdout is not None
    for line in worker.stdout:
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if isinstance(event, dict):
            events.put(event)
    worker.wait()
    events.put(None)
