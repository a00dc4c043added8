"""What is left of a fleet costs together, in packs, and each run by itself, by base."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lorasweep.cli.progress import duration
from lorasweep.customers.outcome import counts, counts_line, outcome_of
from lorasweep.customers.runs import planned
from lorasweep.launch.measure_packs import BUDGET_S
from lorasweep.plan.estimate import Plan
from lorasweep.plan.flops import run_flops, train_flops
from lorasweep.plan.gpu.forecast import Forecaster
from lorasweep.plan.hardware import Hardware
from lorasweep.plan.throughput import ThroughputTable, shape_of
from lorasweep.store.run_store import FINAL, RunStore
from lorasweep.sweep.aligned import aligned
from lorasweep.sweep.grid import Point
from lorasweep.sweep.question import Replicates
from lorasweep.sweep.request import Request

HEAD = ("base", "customers", "runs", "packs", "together", "alone", "times")
PROCESSES = "; alone, starting a process and loading the base for each run come on top"


def here(request: Request, store: RunStore, now: Plan) -> dict[str, Any]:
    """Return what is left of a fleet costs on this machine, as JSON values.

    `alone_s` is None where no step of runs like these was timed outside of a pack.
    """
    known, wall = now.throughputs, now.hours * 3600
    rows = []
    for base, points in _by_base(now.todo).items():
        mine = {p.id for p in points}
        packs = [p for p in now.packs if p.points[0].id in mine]
        sizes = {p.id: len(pack.points) for pack in packs for p in pack.points}
        together = _sum(points, known, sizes, now.workers)
        alone = _sum(points, known, {}, now.workers)
        if together is None:
            together = wall * sum(run_flops(p.spec) for p in points) / now.flops
        rows.append(_row(base, points, len(packs), together, alone))
    timed = all(row["alone_s"] is not None for row in rows)
    kinds = len({shape_of(p.spec) for p in now.todo})
    return {**_whole(request, store, rows), "timed": timed, "kinds": kinds, "workers": now.workers}


def on_gpus(request: Request, store: RunStore, hardware: Hardware) -> dict[str, Any]:
    """Return what is left of a fleet costs on GPUs, in seconds of one, as JSON values."""
    exec_ = request.exec
    packed, single = (
        Forecaster(hardware, e) for e in (exec_, dataclasses.replace(exec_, pack_size=1))
    )
    states = store.states(p.id for p in request.points)
    rows = []
    for base, points in _by_base(p for p in request.points if states[p.id] not in FINAL).items():
        found = packed.forecast(base, points, Replicates())
        alone = single.forecast(base, points, Replicates())
        hours = found.gpu_hours, alone.gpu_hours
        rows.append(_row(base, points, found.packs, *(3600 * h for h in hours)))
    return {**_whole(request, store, rows), "timed": True, "workers": 1}


def lines(values: dict[str, Any], per: str) -> list[str]:
    """Return the costs as text; `per`: what the times are of."""
    found = [counts_line(values["customers"])]
    if not values["bases"]:
        return [*found, "nothing is left to train"]
    rows = [*values["bases"], *([values["total"]] if len(values["bases"]) > 1 else [])]
    found += [f"what is left, {per}:", "", *aligned([HEAD, *map(_cells, rows)], range(1, 7)), ""]
    if values["timed"]:
        return [*found, f"by the times of steps{PROCESSES}"]
    return [
        *found,
        f"together by the speed assumed of any run. What they take alone is not known, as no step "
        f"of such runs was timed here: add action=measure_packs, which times {values['kinds']} "
        f"kind(s) of run in at most {BUDGET_S * values['kinds']:.0f} s",
    ]


def _whole(request: Request, store: RunStore, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the counts of customers, the rows, and their sum."""
    fleet = planned(request.members, request.points)
    found = counts(outcome_of(m, store) for m in fleet)
    alone = [r["alone_s"] for r in rows]
    sums = {k: sum(r[k] for r in rows) for k in ("customers", "runs", "packs", "together_s")}
    total = {"base": "total", **sums, "alone_s": None if None in alone else sum(alone)}
    return {"customers": found, "bases": rows, "total": _with_ratio(total)}


def _row(
    base: str, points: Sequence[Point], packs: int, together: float, alone: float | None
) -> dict[str, Any]:
    n = {"customers": len({p.arm for p in points}), "runs": len(points), "packs": packs}
    return _with_ratio({"base": base, **n, "together_s": together, "alone_s": alone})


def _with_ratio(row: dict[str, Any]) -> dict[str, Any]:
    known = row["alone_s"] is not None and row["together_s"]
    return {**row, "ratio": row["alone_s"] / row["together_s"] if known else None}


def _cells(row: dict[str, Any]) -> list[str]:
    alone, ratio = row["alone_s"], row["ratio"]
    return [
        row["base"],
        *(f"{row[k]:,}" for k in ("customers", "runs", "packs")),
        duration(row["together_s"]),
        "?" if alone is None else duration(alone),
        "?" if ratio is None else f"{ratio:.1f}",
    ]


def _by_base(points: Iterable[Point]) -> dict[str, list[Point]]:
    """Return the runs of each base by its name; bases of one name are numbered."""
    found: dict[str, list[Point]] = {}
    for p in points:
        found.setdefault(p.spec.model.canonical, []).append(p)
    names: dict[str, list[Point]] = {}
    for runs in found.values():
        name = runs[0].spec.model.name
        names[name if name not in names else f"{name} ({len(names) + 1})"] = runs
    return names


def _sum(
    points: Iterable[Point],
    known: ThroughputTable,
    sizes: Mapping[str, int],
    workers: int,
) -> float | None:
    """Return the seconds of runs on all workers, in packs of these sizes (alone without one).

    None if they are not known.
    """
    total = 0.0
    for p in points:
        found, size = known.of(p.spec), sizes.get(p.id, 1)
        if found is None or (size == 1 and 1 not in found.step_s):
            return None
        with_evaluations = p.spec.steps * run_flops(p.spec) / train_flops(p.spec)
        total += found.at(size) * with_evaluations
    return total / workers
