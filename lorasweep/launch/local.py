"""Run packs on this machine, in worker processes that claim free runs until none are left.

Knows processes and signals. A worker is `lorasweep.launch.worker` with a JSON job file. Two
commands for the same sweep share its runs: each waits for the runs that the other has claimed.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorasweep.errors import StoreError, TrainingError
from lorasweep.launch.fitting import Limits
from lorasweep.launch.out_of_memory import does_not_fit, goes_on
from lorasweep.launch.pack import execute
from lorasweep.launch.process import StopFlag, Stopped
from lorasweep.launch.trainer import Trainer
from lorasweep.launch.worker import STOPPED, skipped
from lorasweep.launch.workers import Event, Report, Workers
from lorasweep.plan import detect
from lorasweep.plan.plan import Plan, make_plan
from lorasweep.spec.execution import Exec
from lorasweep.spec.run import RunSpec
from lorasweep.store import files
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import Point
from lorasweep.train.events import Phase

POLL_S = 0.5
"""Seconds between checks of runs that another process works on."""


def run_points(
    points: Sequence[Point],
    store: RunStore,
    exec_: Exec,
    report: Report,
    trainer: Trainer | str | None = None,
    patience_s: float = math.inf,
    skip: str | None = None,
    n_nodes: int = 1,
    plan: Plan | None = None,
) -> None:
    """Train every run of `points` until it is finished or has a recorded failure.

    `trainer`: a callable runs the packs in this process (for tests); a name
    (package.module:object) or None, for the real trainer, runs them in worker processes.
    `patience_s`: how long to wait without progress when only runs of other processes are left.
    `skip`: a file of run ids that must not be started.
    `n_nodes`: nodes of this Slurm job, over which the processes of a run are spread.
    `plan`: that of these points on this machine, if it was just made.

    Raises:
        Stopped: Ctrl-C, or a signal that stopped the workers.
    """
    hardware, limits = detect.this_machine(), Limits()
    tried: set[str] = set()
    quiet_since, held = time.monotonic(), None
    while True:
        unwanted = skipped(skip) | tried
        now, plan = plan, None
        if now is None:
            now = make_plan([p for p in points if p.id not in unwanted], store, exec_, hardware)
        mine = [p for p in now.todo if now.states[p.id] != "running"]
        others = {p.id for p in now.todo if now.states[p.id] == "running"}
        if mine:
            if trainer is None or isinstance(trainer, str):
                given = {"trainer": trainer, "skip": skip}
                ended = _run_workers(now, store, exec_, report, given, n_nodes, limits)
                for event in ended:
                    spec = next(p.spec for p in mine if p.id == event["run"])
                    _take_less(spec, event, exec_, store, limits, report)
            else:
                for pack in now.packs:
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
    plan: Plan,
    store: RunStore,
    exec_: Exec,
    report: Report,
    settings: dict[str, Any],
    n_nodes: int,
    limits: Limits,
) -> list[Event]:
    """Start the workers with one job file, report their events, and wait for all of them.

    Returns what those reported whose memory ran out, each of several processes.
    """
    path, sha256 = _write_job(plan, store, exec_, settings, limits)
    log = path.with_suffix(".log")
    workers = Workers([str(path), sha256], log, plan.threads, exec_.world_size, n_nodes)
    try:
        workers.start(min(plan.workers, len(plan.packs)), plan.workers)
        error = workers.pass_on(report)
        codes = workers.wait()
    except KeyboardInterrupt:
        workers.stop()
        raise Stopped from None
    if error:
        raise TrainingError(error)
    if STOPPED in codes:
        raise Stopped
    crashed = [c for c in codes if c != 0]
    # A worker killed by a signal (code below 0) leaves interrupted runs, which are tried again.
    if crashed and all(c > 0 for c in crashed) and not workers.out_of_memory:
        tail = log.read_text(errors="replace").splitlines()[-8:]
        raise TrainingError("\n".join([f"a worker crashed. The end of its log, {log}:", *tail]))
    path.unlink(missing_ok=True)
    log.unlink(missing_ok=True)
    return list(workers.out_of_memory.values())


def _take_less(
    spec: RunSpec, event: Event, exec_: Exec, store: RunStore, limits: Limits, report: Report
) -> None:
    """Let a run that did not fit into the memory of one of its processes hold less at once.

    Where it cannot it has failed. Its processes are gone, so its attempt is ended here.
    """
    limit, rows, n = limits.of(spec), event["rows"], store.last_attempt(spec.id)
    if n is None or store.state(spec.id) != "interrupted" or not store.owns(spec.id, n):
        return  # somebody else has it now
    phase = Phase(event["phase"], event["divisible"])
    instead = limit.lower(rows, 1, event["forward_parts"], phase)
    if instead:
        text = goes_on(spec, 1, rows, event["asked"], instead, phase.name)
        store.log(spec.id, n, text)
        store.write_end(spec.id, n, "stopped", text)
        report({"note": text})
        return
    cause = does_not_fit(spec, event["asked"], exec_.world_size)
    store.write_end(spec.id, n, "failed", cause)
    report({"run": spec.id, "ended": "failed", "cause": cause})


def _write_job(
    plan: Plan, store: RunStore, exec_: Exec, settings: dict[str, Any], limits: Limits
) -> tuple[Path, str]:
    """Write the job file for the workers; return its path and SHA-256."""
    packs = [
        {
            "runs": [p.spec.plain() for p in pack.points],
            "micro_batch_size": pack.micro_batch_size,
            "most_rows": limits.of(pack.points[0].spec).rows,
            "forward_parts": limits.of(pack.points[0].spec).forward_parts,
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
