"""Train runs on this machine or in this Slurm job, in worker processes that claim free runs.

A worker is one process of `launch.worker`, or exec.world_size processes that train each run
together. Two commands for the same sweep share the runs: each waits for runs of the other.
"""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict

from lorasweep.errors import TrainingError
from lorasweep.launch.out_of_memory import Limits, Shortage
from lorasweep.launch.pack import execute
from lorasweep.launch.pool import Workers
from lorasweep.launch.process import StopFlag, Stopped
from lorasweep.launch.torch_trainer import Report, Trainer
from lorasweep.launch.worker import STOPPED
from lorasweep.plan import detect
from lorasweep.plan.planner import Plan, make_plan
from lorasweep.spec.execution import Exec
from lorasweep.spec.run import RunSpec
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import Point

POLL_S = 0.5
"""Seconds between checks of runs that other processes train."""


def run_points(
    points: Sequence[Point],
    store: RunStore,
    exec_: Exec,
    report: Report,
    trainer: Trainer | str | None = None,
    plan: Plan | None = None,
    workers: Workers | None = None,
    wait: bool = True,
) -> None:
    """Train every run of `points` until it is finished or has a recorded failure.

    `trainer`: None or a name (package.module:object) of one in worker processes; a callable trains
    in this process (for tests). `plan`: of these points on this machine, if it was just made.
    `workers`: None for new ones. `wait`: for runs that other processes train. Raises Stopped after
    Ctrl-C, or after a signal that stopped the workers.
    """
    hardware = plan.hardware if plan else detect.this_machine()
    limits, tried = Limits(), set[str]()
    with nullcontext(workers) if workers else Workers(store, exec_.world_size) as pool:
        while True:
            now, plan = plan, None
            if now is None:
                now = make_plan([p for p in points if p.id not in tried], store, exec_, hardware)
            mine = [p.id for p in now.todo if now.states[p.id] != "running"]
            if not mine:
                if not now.todo or not wait:
                    return
                time.sleep(POLL_S)
            elif trainer is None or isinstance(trainer, str):
                _run_workers(now, store, exec_, report, limits, pool, trainer)
            else:
                for pack in now.packs:
                    specs, rows = [p.spec for p in pack.points], pack.micro_batch_size
                    execute(specs, exec_, store, trainer, report, StopFlag(), rows, limits)
            for rid, state in store.states(mine).items():
                killed = state == "interrupted" and store.failures(rid) >= exec_.max_attempts
                if state == "failed" or killed:
                    tried.add(rid)


def _run_workers(
    plan: Plan,
    store: RunStore,
    exec_: Exec,
    report: Report,
    limits: Limits,
    workers: Workers,
    trainer: str | None,
) -> None:
    """Train the packs of a plan in workers, and report their events."""
    packs = []
    for pack in plan.packs:
        limit, runs = limits.of(pack.points[0].spec), [p.spec.plain() for p in pack.points]
        sizes = {"most_rows": limit.rows, "forward_parts": limit.forward_parts}
        packs.append({"runs": runs, "micro_batch_size": pack.micro_batch_size, **sizes})
    attempts = {p.id: store.last_attempt(p.id) for p in plan.todo if plan.states[p.id] != "missing"}
    job = {
        "packs": packs,
        "exec": {**asdict(exec_), "threads": plan.threads, "workers": plan.workers},
        # A worker has not watched the heartbeats of other machines.
        "dead": {i: n for i, n in attempts.items() if plan.states[i] == "interrupted"},
        "trainer": trainer,
    }
    try:
        number = min(plan.workers, len(packs))
        error = workers.run(job, number, plan.workers, plan.threads, report)
    except KeyboardInterrupt:
        workers.end(stop=True)
        raise Stopped from None
    codes = workers.codes()
    if error:
        raise TrainingError(error)
    if STOPPED in codes:
        raise Stopped
    crashed = [c for c in codes if c != 0]
    # A worker killed by a signal (code below 0) leaves interrupted runs, which are tried again. One
    # that was killed before it claimed a run would be started again and again.
    killed = any(c < 0 for c in crashed) and any(
        store.last_attempt(p.id) != attempts.get(p.id) for p in plan.todo
    )
    if crashed and not killed and not workers.shortages:
        tail = workers.log.read_text(errors="replace").splitlines()[-8:]
        by = f" (signal {-min(crashed)})" if min(crashed) < 0 else ""
        text = f"a worker crashed{by}. The end of its log, {workers.log}:"
        raise TrainingError("\n".join([text, *tail]))
    for rid, shortage in workers.shortages.items():
        spec = next(p.spec for p in plan.todo if p.id == rid)
        end_shortage(spec, shortage, exec_, store, limits, report)


def end_shortage(
    spec: RunSpec, shortage: Shortage, exec_: Exec, store: RunStore, limits: Limits, report: Report
) -> None:
    """After one process of a run ran out of memory: end the attempt, and lower the size limit."""
    rid, n = spec.id, store.last_attempt(spec.id)
    if n is None or store.state(rid) != "interrupted":
        return  # another worker claimed it
    if instead := limits.of(spec).lower(shortage, 1):
        text = shortage.retry_text(spec, 1, instead)
        store.log(rid, n, text)
        store.write_end(rid, n, "stopped", text)
        report({"note": text})
    else:
        cause = shortage.failure_text(spec, exec_.world_size)
        store.write_end(rid, n, "failed", cause)
        report({"run": rid, "ended": "failed", "cause": cause})
