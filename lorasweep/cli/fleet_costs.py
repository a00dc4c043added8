"""Compare the cost of a fleet's unfinished runs in packs and one by one, for each base."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from lorasweep.cli.progress import duration
from lorasweep.fleet.outcome import counts, counts_line, outcome_of
from lorasweep.fleet.runs import planned
from lorasweep.launch.measure_packs import BUDGET_S
from lorasweep.plan.forecast import Forecaster
from lorasweep.plan.hardware import Hardware
from lorasweep.plan.load import run_flops, updates_with_evaluations
from lorasweep.plan.plan import Plan
from lorasweep.plan.throughput import shape_of
from lorasweep.store.run_store import FINAL, RunStore
from lorasweep.sweep.grid import Point
from lorasweep.sweep.names import aligned
from lorasweep.sweep.question import Replicates
from lorasweep.sweep.request import Request

HEAD = ("base", "customers", "runs", "packs", "together", "alone", "times")


def customer_counts(request: Request, store: RunStore) -> dict[str, int]:
    """Count a fleet's customers by outcome."""
    return counts([outcome_of(m, store) for m in planned(request.members, request.points)])


def here(request: Request, store: RunStore, plan: Plan) -> dict[str, Any]:
    """Return the cost of the unfinished runs on this machine, as JSON values.

    `alone_s` is None if no step of such runs was timed outside of a pack.
    """
    rows = []
    for base, points in _by_base(plan.todo).items():
        ids = {p.id for p in points}
        packs = [p for p in plan.packs if p.points[0].id in ids]
        sizes = {p.id: len(pack.points) for pack in packs for p in pack.points}
        together, alone = _timed_s(points, plan, sizes), _timed_s(points, plan, {})
        if together is None:
            share = sum(run_flops(p.spec) for p in points) / plan.flops
            together = plan.hours * 3600 * share
        customers = len({p.arm for p in points})
        rows.append(_row(base, customers, len(points), len(packs), together, alone))
    timed = all(row["alone_s"] is not None for row in rows)
    kinds = len({shape_of(p.spec) for p in plan.todo})
    return {**_whole(request, store, rows), "timed": timed, "kinds": kinds, "workers": plan.workers}


def on_gpus(request: Request, store: RunStore, hardware: Hardware) -> dict[str, Any]:
    """Return the cost of the unfinished runs in seconds of one GPU, as JSON values."""
    packed = Forecaster(hardware, request.exec)
    single = Forecaster(hardware, dataclasses.replace(request.exec, pack_size=1))
    states = store.states(p.id for p in request.points)
    rows = []
    for base, points in _by_base(p for p in request.points if states[p.id] not in FINAL).items():
        found = packed.forecast(base, points, Replicates())
        alone = single.forecast(base, points, Replicates())
        seconds = [3600 * hours for hours in (found.gpu_hours, alone.gpu_hours)]
        customers = len({p.arm for p in points})
        rows.append(_row(base, customers, len(points), found.packs, *seconds))
    return {**_whole(request, store, rows), "timed": True, "workers": 1}


def lines(values: dict[str, Any], per: str) -> list[str]:
    """Return the costs in lines; `per`: unit of the times, such as 'on 2 worker(s)'."""
    found = [counts_line(values["customers"])]
    if not values["bases"]:
        return [*found, "nothing is left to train"]
    rows = [*values["bases"], *([values["total"]] if len(values["bases"]) > 1 else [])]
    cells = [
        [
            row["base"],
            *(f"{row[k]:,}" for k in ("customers", "runs", "packs")),
            duration(row["together_s"]),
            "?" if row["alone_s"] is None else duration(row["alone_s"]),
            "?" if row["ratio"] is None else f"{row['ratio']:.1f}",
        ]
        for row in rows
    ]
    found += [f"unfinished runs, {per}:", "", *aligned([HEAD, *cells], range(1, 7)), ""]
    if values["timed"]:
        found.append(
            "computed from step times; alone, each run also starts a process and loads the base"
        )
    else:
        found.append(
            "together: from an assumed speed. Alone: not known, as no step of such runs was timed "
            f"here. action=measure_packs times the {values['kinds']} kind(s) of run in at most "
            f"{BUDGET_S * values['kinds']:.0f} s"
        )
    return found


def _whole(request: Request, store: RunStore, rows: list[dict[str, Any]]) -> dict[str, Any]:
    keys, alone = ("customers", "runs", "packs", "together_s"), [r["alone_s"] for r in rows]
    customers, runs, packs, together = (sum(r[k] for r in rows) for k in keys)
    alone_s = None if None in alone else sum(alone)
    total = _row("total", customers, runs, packs, together, alone_s)
    return {"customers": customer_counts(request, store), "bases": rows, "total": total}


def _row(
    base: str, customers: int, runs: int, packs: int, together: float, alone: float | None
) -> dict[str, Any]:
    ratio = alone / together if alone is not None and together else None
    times = {"together_s": together, "alone_s": alone, "ratio": ratio}
    return {"base": base, "customers": customers, "runs": runs, "packs": packs, **times}


def _by_base(points: Iterable[Point]) -> dict[str, list[Point]]:
    """Group runs by the name of their base; bases of the same name are numbered."""
    found: dict[str, list[Point]] = {}
    for p in points:
        found.setdefault(p.spec.model.canonical, []).append(p)
    names: dict[str, list[Point]] = {}
    for runs in found.values():
        name = runs[0].spec.model.name
        names[name if name not in names else f"{name} ({len(names) + 1})"] = runs
    return names


def _timed_s(points: Iterable[Point], plan: Plan, sizes: Mapping[str, int]) -> float | None:
    """Return the seconds of runs on all workers; None if their steps were not timed.

    `sizes`: run id -> size of the run's pack; a run that is not in it trains alone.
    """
    total = 0.0
    for p in points:
        found, size = plan.throughputs.of(p.spec), sizes.get(p.id, 1)
        if found is None or (size == 1 and 1 not in found.step_s):
            return None
        total += found.at(size) * updates_with_evaluations(p.spec)
    return total / plan.workers
