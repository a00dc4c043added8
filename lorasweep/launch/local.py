"""Run packs on this machine: worker processes that claim what is free, until nothing is left to do.

Knows processes and signals. Workers are told what to do by a JSON file and run
`lorasweep.launch.worker`; two commands that ask the same sweep at once share its runs, each waiting
for what the other has claimed.
"""

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

from lorasweep.cli.progress import duration
from lorasweep.errors import StoreError, TrainingError
from lorasweep.launch.worker import StopFlag, Stopped, Trainer, execute, skipped
from lorasweep.plan import hardware as machine
from lorasweep.plan import throughput as calibrate
from lorasweep.plan.packing import Plan, make_plan, to_calibrate
from lorasweep.spec.execution import Exec
from lorasweep.spec.run import canonical
from lorasweep.store import files
from lorasweep.store.claims import Lock
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import Point

POLL_S = 0.5
"""Seconds between looks at runs that another process works on."""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
WAIT_POLICY = {"OMP_WAIT_POLICY": "PASSIVE"}
"""OpenMP threads wait asleep. By default they spin, and hold the core that the thread they wait for
needs: two training processes on two busy cores then run a hundred times slower (LOG.md)."""


def run_points(
    points: Sequence[Point],
    store: RunStore,
    exec_: Exec,
    report: Callable[[dict[str, Any]], None],
    trainer: Trainer | str | None = None,
    patience_s: float = math.inf,
    skip: str | None = None,
) -> None:
    """Bring every run of `points` to an end, or to a recorded failure. Raises Stopped on Ctrl-C.

    With a `trainer` that is callable the packs run in this process (tests); else in worker
    processes, which take the trainer of that name (package.module:object) or the real one.
    `patience_s` bounds the time without any progress while only runs of other processes are left.
    `skip`: a file of run ids that are not to be started.
    """
    tried: set[str] = set()
    quiet_since, held = time.monotonic(), None
    while True:
        unwanted = skipped(skip)
        plan = make_plan([p for p in points if p.id not in unwanted], store, exec_)
        mine = [p for p in plan.todo if plan.states[p.id] != "running" and p.id not in tried]
        elsewhere = [p for p in plan.todo if plan.states[p.id] == "running"]
        if mine:
            if trainer is None or isinstance(trainer, str):
                _run_workers(plan, store, exec_, report, {"trainer": trainer, "skip": skip})
            else:
                for pack in plan.packs:
                    specs = [p.spec for p in pack.points]
                    execute(specs, exec_, store, trainer, report, StopFlag(), pack.micro_batch_size)
            states = store.states(p.id for p in mine)
            # A run that failed here is not tried again by this command; one that went stale (its
            # worker was killed from outside) is, as long as attempts are left.
            tried |= {i for i, s in states.items() if s == "failed"}
            tried |= {
                i
                for i, s in states.items()
                if s == "stale" and store.failures(i) >= exec_.max_attempts
            }
            quiet_since = time.monotonic()
        elif elsewhere:
            now_held = {p.id for p in elsewhere}
            if now_held != held:
                quiet_since, held = time.monotonic(), now_held
            elif time.monotonic() - quiet_since > patience_s:
                return
            time.sleep(POLL_S)
        else:
            return


def measure_shapes(
    points: Sequence[Point], store: RunStore, exec_: Exec, say: Callable[[str], None]
) -> None:
    """Measure the shapes of run that are worth it and not known on this machine; one process at a
    time does so."""
    shapes = to_calibrate(points, store.states(p.id for p in points), exec_)
    if all(calibrate.known(s, exec_) is not None for s in shapes):
        return
    lock = Lock(
        store.root / ".calibration" / f"lock-{calibrate.kind(shapes[0], exec_)}"
    )  # one a kind of machine
    try:
        lock.acquire(
            60 + calibrate.BUDGET_S * len(shapes),
            lambda who: say(f"waiting for the measurement by {who}"),
        )
    except StoreError:
        return say("the measurement by another takes too long; packs are planned by default sizes")
    try:
        shapes = [s for s in shapes if calibrate.known(s, exec_) is None]
        if not shapes:
            return
        bound = duration(len(shapes) * calibrate.BUDGET_S)
        say(f"measuring {len(shapes)} shape(s) of run on this machine, once: at most about {bound}")
        trouble = calibrate.ensure(shapes, exec_)
        if trouble:
            say(f"the measurement failed ({trouble}); packs are planned by default sizes")
    finally:
        lock.release()


def _run_workers(
    plan: Plan,
    store: RunStore,
    exec_: Exec,
    report: Callable[[dict[str, Any]], None],
    more: dict[str, Any],
) -> None:
    """Start the workers on one job file, pass their events on, and wait for all of them."""
    jobs = store.root / ".jobs"
    job = {
        "packs": [
            {
                "runs": [json.loads(canonical(p.spec)) for p in pack.points],
                "micro_batch_size": pack.micro_batch_size,
            }
            for pack in plan.packs
        ],
        "exec": {**asdict(exec_), "threads": plan.threads, "workers": plan.workers},
        # A worker has not watched other machines' heartbeats, so it is told which owners were found
        # dead.
        "dead": {p.id: store.last_attempt(p.id) for p in plan.todo if plan.states[p.id] == "stale"},
        **more,
    }
    path = jobs / f"{os.getpid()}-{os.urandom(3).hex()}.json"
    try:
        jobs.mkdir(exist_ok=True)
        files.write_atomic(path, json.dumps(job).encode())
    except OSError as error:
        raise StoreError(
            f"{path} cannot be written ({error.strerror}). Free some space, then ask again."
        ) from None
    env = _environment(plan.threads)
    events: queue.Queue[dict[str, Any] | None] = queue.Queue()
    workers: list[subprocess.Popen] = []
    error = None
    try:
        with open(path.with_suffix(".log"), "ab") as log:
            for k in range(min(plan.workers, len(plan.packs))):
                command = [sys.executable, "-m", "lorasweep.launch.worker", str(path), str(k)]
                workers.append(
                    subprocess.Popen(
                        command,
                        stdout=subprocess.PIPE,
                        stderr=log,
                        text=True,
                        env={**env, **_devices_of(k, plan.workers)},
                    )
                )
                threading.Thread(target=_read, args=(workers[-1], events), daemon=True).start()
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
    if crashed and all(
        c > 0 for c in crashed
    ):  # a signal (c < 0) leaves stale runs, which are taken up again
        tail = path.with_suffix(".log").read_text(errors="replace").splitlines()[-8:]
        raise TrainingError("a worker ended with an error of its own:\n" + "\n".join(tail))
    path.unlink(missing_ok=True)
    path.with_suffix(".log").unlink(missing_ok=True)


def _environment(threads: int) -> dict[str, str]:
    """Return a worker's environment: it runs this very code, whatever lies in the current folder,
    on so many threads."""
    env = {
        **WAIT_POLICY,
        **os.environ,
        **dict.fromkeys(THREAD_VARIABLES, str(threads)),
        "TOKENIZERS_PARALLELISM": "false",
    }
    root = str(Path(__file__).resolve().parents[2])
    env["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [env.get("PYTHONPATH")])])
    return {**env, "PYTHONSAFEPATH": "1"}


def _devices_of(worker: int, workers: int) -> dict[str, str]:
    """Deal the GPUs to the workers, each a share of its own; nothing where there are none. More
    workers than GPUs share."""
    devices = machine.devices()
    if not devices:
        return {}
    share = max(1, len(devices) // workers)
    mine = [devices[(worker * share + i) % len(devices)] for i in range(share)]
    return {"CUDA_VISIBLE_DEVICES": ",".join(mine)}


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
