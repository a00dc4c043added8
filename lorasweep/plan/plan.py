"""Plan a sweep: list finished and missing runs, and estimate the cost. No run is started."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorasweep.plan.hardware import Hardware
from lorasweep.plan.load import run_flops
from lorasweep.plan.memory import checkpoint_bytes
from lorasweep.plan.packing import Pack, make_packs, workers_and_threads
from lorasweep.plan.throughput import ThroughputTable
from lorasweep.plan.time import assumed_flops
from lorasweep.spec.execution import Exec
from lorasweep.spec.run import RunSpec
from lorasweep.store.run_store import FINAL, STATES, RunStore
from lorasweep.sweep.grid import Point

RATED_RUNS = 16
"""Finished runs per method and precision from which its measured speed is computed."""


@dataclass(frozen=True)
class Plan:
    """The runs of a sweep by state, and the work that is left."""

    points: list[Point]
    states: dict[str, str]
    todo: list[Point]
    packs: list[Pack]
    workers: int
    threads: int
    flops: float
    hours: float
    basis: str
    """Source of `hours`: 'measured' (finished runs of this store), 'calibrated' (step times of
    these shapes), or 'assumed'."""
    measured_flops_s: float | None
    """Operations per second of one worker; None: no run of this store has finished."""
    checkpoint_gib: float
    """Disk space for the packs that train at the same time."""
    memory_gib: float
    """Expected peak memory of all workers together."""
    hardware: Hardware
    throughputs: ThroughputTable

    def counts(self) -> dict[str, int]:
        """Count the runs by state."""
        values = list(self.states.values())
        return {s: values.count(s) for s in STATES if s in values}


def make_plan(points: Sequence[Point], store: RunStore, exec_: Exec, hardware: Hardware) -> Plan:
    """Read the store and plan the missing runs, and with exec.retry failed ones, for `hardware`."""
    points = list(points)
    states = store.states(p.id for p in points)
    todo = _runs_to_do(points, states, store, exec_)
    begun = [p for p in points if states[p.id] != "missing"]
    known = ThroughputTable(store, hardware, exec_, begun)
    free = [p for p in todo if states[p.id] != "running"]
    packs = make_packs(free, states, store, exec_, hardware, known)
    workers, threads = workers_and_threads(packs, exec_, hardware)
    flops = sum(run_flops(p.spec) for p in todo)
    timed = _timed_runs(points, states, store)
    times = [pack.seconds for pack in packs if pack.seconds is not None]
    if timed and hardware.processor is not None:  # else the plan is for another machine
        seconds, basis = measured_seconds((p.spec for p in todo), timed) / workers, "measured"
    elif packs and len(times) == len(packs):
        seconds, basis = max(sum(times) / workers, max(times)), "calibrated"
    else:
        precision = points[0].spec.precision if points else "fp32"
        seconds, basis = flops / assumed_flops(precision, hardware), "assumed"
    largest = sorted(packs, key=lambda pack: -pack.memory_bytes)[:workers]
    return Plan(
        points=points,
        states=states,
        todo=todo,
        packs=packs,
        workers=workers,
        threads=threads,
        flops=flops,
        hours=seconds / 3600,
        basis=basis,
        measured_flops_s=_flops_s([run for some in timed.values() for run in some]),
        checkpoint_gib=checkpoint_bytes(p.spec for k in largest for p in k.points) / 2**30,
        memory_gib=sum(pack.memory_bytes for pack in largest) / 2**30,
        hardware=hardware,
        throughputs=known,
    )


def _runs_to_do(
    points: Sequence[Point], states: dict[str, str], store: RunStore, exec_: Exec
) -> list[Point]:
    """Return unfinished runs; failed ones only with exec.retry and attempts left."""
    failed = [p.id for p in points if states[p.id] == "failed"] if exec_.retry else []
    again = {i for i in failed if store.failures(i) < exec_.max_attempts}
    return [p for p in points if p.id in again or states[p.id] not in (*FINAL, "failed")]


Timed = tuple[RunSpec, float]
"""A finished run, and the seconds it took."""


def _timed_runs(
    points: Sequence[Point], states: dict[str, str], store: RunStore
) -> dict[tuple[str, str], list[Timed]]:
    """Return finished runs of this store by method and precision, at most RATED_RUNS of each."""
    done: dict[tuple[str, str], list[Point]] = {}
    for p in points:
        if states[p.id] == "done":
            done.setdefault((p.spec.method.name, p.spec.precision), []).append(p)
    found: dict[tuple[str, str], list[Timed]] = {}
    for key, runs in done.items():
        for p in runs[:: -(-len(runs) // RATED_RUNS)]:  # spread over the grid
            result = store.result(p.id) or {}
            if result.get("wall_s") and not result.get("imported"):
                found.setdefault(key, []).append((p.spec, result["wall_s"]))
    return found


def _flops_s(runs: Sequence[Timed]) -> float | None:
    """Return the operations per second of one worker; None without runs."""
    seconds = sum(s for _, s in runs)
    return sum(run_flops(spec) for spec, _ in runs) / seconds if runs else None


def measured_seconds(
    todo: Iterable[RunSpec], timed: Mapping[tuple[str, str], Sequence[Timed]]
) -> float:
    """Return the expected seconds of `todo` on one worker, at the speeds of finished runs.

    `timed`: finished runs by method and precision. Runs of other methods or precisions are expected
    at the mean speed of all finished runs.
    """
    overall = _flops_s([run for some in timed.values() for run in some])
    speeds = {key: _flops_s(some) for key, some in timed.items()}
    found = ((s, speeds.get((s.method.name, s.precision)) or overall) for s in todo)
    return sum(run_flops(spec) / speed for spec, speed in found if speed)


def summary(plan: Plan) -> dict[str, Any]:
    """Return the plan as JSON values: counts by state, arms, packs, and cost."""
    arms: dict[tuple[str, str, int], dict[str, Any]] = {}
    for p in plan.points:
        method, model = p.spec.method, p.spec.model
        trained = method.n_trainable(model)
        arm = {
            "arm": p.arm,
            "model": model.name,
            "method": method.name,
            "rank": getattr(method, "rank", None),
            "n_trainable": trained,
            "runs": 0,
        }
        arms.setdefault((p.arm, model.name, trained), arm)["runs"] += 1
    packs = [
        {
            "runs": len(p.points),
            "method": p.points[0].spec.method.name,
            "micro_batch_size": p.micro_batch_size,
            "expected_s": p.seconds,
        }
        for p in plan.packs
    ]
    cost = {
        "flops": plan.flops,
        "hours": plan.hours,
        "basis": plan.basis,
        "packs": len(plan.packs),
        "workers": plan.workers,
        "threads": plan.threads,
        "checkpoint_gib": plan.checkpoint_gib,
        "memory_gib": plan.memory_gib,
    }
    runs = {"total": len(plan.points), "todo": len(plan.todo), **plan.counts()}
    return {"runs": runs, "arms": list(arms.values()), "packs": packs, "cost": cost}
