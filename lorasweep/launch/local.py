"""Run packs on this machine, in worker processes that claim free runs until none are left.

Knows processes and signals. A worker is `lorasweep.launch.worker` with a JSON job file. Two
commands for the same sweep share its runs: each waits for the runs that the other has claimed.
"""

import hashlib
import json
import math
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

from lorasweep.errors import StoreError, TrainingError
from lorasweep.launch.fitting import Limits
from lorasweep.launch.pack import execute
from lorasweep.launch.process import StopFlag, Stopped
from lorasweep.launch.trainer import Trainer
from lorasweep.launch.worker import STOPPED, skipped
from lorasweep.plan import detect
from lorasweep.plan.estimate import Plan, make_plan
from lorasweep.spec.execution import Exec
from lorasweep.store import files
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import Point

Event = dict[str, Any]
Report = Callable[[Event], None]

POLL_S = 0.5
"""Seconds between checks of runs that another process works on."""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
WAIT_POLICY = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Makes waiting OpenMP threads sleep. By default they spin, and block the core that the other
thread needs: two training processes on two busy cores are then a hundred times slower (LOG.md)."""


def run_points(
    points: Sequence[Point],
    store: RunStore,
    exec_: Exec,
    report: Report,
    trainer: Trainer | str | None = None,
    patience_s: float = math.inf,
    skip: str | None = None,
) -> None:
    """Train every run of `points` until it is finished or has a recorded failure.

    `trainer`: a callable runs the packs in this process (for tests); a name
    (package.module:object) or None, for the real trainer, runs them in worker processes.
    `patience_s`: how long to wait without progress when only runs of other processes are left.
    `skip`: a file of run ids that must not be started.

    Raises:
        Stopped: Ctrl-C, or a signal that stopped the workers.
    """
    hardware, limits = detect.this_machine(), Limits()
    tried: set[str] = set()
    quiet_since, held = time.monotonic(), None
    while True:
        unwanted = skipped(skip)
        plan = make_plan([p for p in points if p.id not in unwanted], store, exec_, hardware)
        mine = [p for p in plan.todo if plan.states[p.id] != "running" and p.id not in tried]
        others = {p.id for p in plan.todo if plan.states[p.id] == "running"}
        if mine:
            if trainer is None or isinstance(trainer, str):
                _run_workers(plan, store, exec_, report, {"trainer": trainer, "skip": skip})
            else:
                for pack in plan.packs:
                    specs, rows = [p.spec for p in pack.points], pack.micro_batch_size
                    execute(specs, exec_, store, trainer, report, StopFlag(), rows, limits)
            tried |= _given_up([p.id for p in mine], store, exec_)
            quiet_since = time.monotonic()
        elif others:
            if others != held:
                quiet_since, held = time.monotonic(), others
            elif time.monotonic() - quiet_since > patience_s:
                return
            time.sleep(POLL_S)
        else:
            return


def _given_up(ids: list[str], store: RunStore, exec_: Exec) -> set[str]:
    """Return the runs that this command does not try again.

    These are the failed ones, and runs whose worker was killed exec.max_attempts times.
    """
    states = store.states(ids)
    failed = {i for i, s in states.items() if s == "failed"}
    killed = {i for i, s in states.items() if s == "interrupted"}
    return failed | {i for i in killed if store.failures(i) >= exec_.max_attempts}


def _run_workers(
    plan: Plan, store: RunStore, exec_: Exec, report: Report, settings: dict[str, Any]
) -> None:
    """Start the workers with one job file, report their events, and wait for all of them."""
    path, sha256 = _write_job(plan, store, exec_, settings)
    log = path.with_suffix(".log")
    workers: list[subprocess.Popen] = []
    events: queue.Queue[Event | None] = queue.Queue()
    try:
        _start(workers, [str(path), sha256], log, plan, events)
        error = _pass_on(events, len(workers), report)
        codes = [w.wait() for w in workers]
    except KeyboardInterrupt:
        for w in workers:  # each finishes its update, writes a checkpoint and exits
            if w.poll() is None:
                w.terminate()
        for w in workers:
            w.wait()
        raise Stopped from None
    if error:
        raise TrainingError(error)
    if STOPPED in codes:
        raise Stopped
    crashed = [c for c in codes if c != 0]
    # A worker killed by a signal (code below 0) leaves interrupted runs, which are tried again.
    if crashed and all(c > 0 for c in crashed):
        tail = log.read_text(errors="replace").splitlines()[-8:]
        raise TrainingError("\n".join([f"a worker crashed. The end of its log, {log}:", *tail]))
    path.unlink(missing_ok=True)
    log.unlink(missing_ok=True)


def _write_job(
    plan: Plan, store: RunStore, exec_: Exec, settings: dict[str, Any]
) -> tuple[Path, str]:
    """Write the job file for the workers; return its path and SHA-256."""
    packs = [
        {
            "runs": [p.spec.plain() for p in pack.points],
            "micro_batch_size": pack.micro_batch_size,
        }
        for pack in plan.packs
    ]
    # A worker has not watched the heartbeats of other machines, so it gets the list of dead owners.
    dead = {p.id: store.last_attempt(p.id) for p in plan.todo if plan.states[p.id] == "interrupted"}
    exec_values = {**asdict(exec_), "threads": plan.threads, "workers": plan.workers}
    job = {"packs": packs, "exec": exec_values, "dead": dead, **settings}
    content = json.dumps(job).encode()
    path = store.root / ".jobs" / f"{os.getpid()}-{os.urandom(3).hex()}.json"
    try:
        path.parent.mkdir(exist_ok=True)
        files.write_atomic(path, content)
    except OSError as error:
        raise StoreError(
            f"{path} cannot be written ({error.strerror}). Free some space, then run the command "
            "again."
        ) from None
    return path, hashlib.sha256(content).hexdigest()


def _start(
    workers: list[subprocess.Popen],
    job: list[str],
    log: Path,
    plan: Plan,
    events: "queue.Queue[Event | None]",
) -> None:
    """Start the plan's workers into `workers`, each with a thread that reads its events."""
    env = worker_environment(plan.threads)
    with open(log, "ab") as errors:
        for k in range(min(plan.workers, len(plan.packs))):
            worker = subprocess.Popen(
                [sys.executable, "-m", "lorasweep.launch.worker", *job, str(k)],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**env, **_devices_of(k, plan.workers)},
            )
            workers.append(worker)
            threading.Thread(target=_read, args=(worker, events), daemon=True).start()


def _pass_on(events: "queue.Queue[Event | None]", n_workers: int, report: Report) -> str | None:
    """Report events until every worker has ended; return the last error event, or None."""
    error = None
    while n_workers:
        event = events.get()
        if event is None:
            n_workers -= 1
        elif "error" in event:
            error = event["error"]
        else:
            report(event)
    return error


def worker_environment(threads: int) -> dict[str, str]:
    """Return the environment of a worker: this code, not the current folder's, and its threads."""
    root = str(Path(__file__).resolve().parents[2])
    return {
        **WAIT_POLICY,
        **os.environ,
        **dict.fromkeys(THREAD_VARIABLES, str(threads)),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONSAFEPATH": "1",
    }


def _devices_of(worker: int, workers: int) -> dict[str, str]:
    """Return the GPUs of a worker as an environment variable; empty without GPUs.

    Each worker has its own GPUs; with more workers than GPUs, workers share them.
    """
    devices = detect.devices()
    if not devices:
        return {}
    share = max(1, len(devices) // workers)
    mine = [devices[(worker * share + i) % len(devices)] for i in range(share)]
    return {"CUDA_VISIBLE_DEVICES": ",".join(mine)}


def _read(worker: subprocess.Popen, events: "queue.Queue[Event | None]") -> None:
    assert worker.stdout is not None
    for line in worker.stdout:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            events.put(event)
    worker.wait()
    events.put(None)
