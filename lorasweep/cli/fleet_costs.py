"""Compare the cost of a fleet's unfinished runs in packs and one by one, for each base."""

import math
from collections import Counter
from dataclasses import replace
from typing import Any

from lorasweep.cli.progress import duration
from lorasweep.fleet.outcome import counts, counts_line, outcome_of
from lorasweep.fleet.runs import planned
from lorasweep.launch.measure_packs import BUDGET_S
from lorasweep.plan.hardware import Hardware
from lorasweep.plan.load import run_flops, updates_with_evaluations
from lorasweep.plan.plan import Plan
from lorasweep.plan.planner import Planner, shape_of
from lorasweep.store.run_store import FINAL, RunStore
from lorasweep.sweep.grid import Point
from lorasweep.sweep.names import aligned
from lorasweep.sweep.request import Request

HEAD = ("base", "customers", "runs", "packs", "together", "alone", "times")
Cost = tuple[int, float, float | None]
"""Packs, seconds in packs, and seconds one by one: None if they are not known."""


def customer_counts(request: Request, store: RunStore) -> dict[str, int]:
    """Count a fleet's customers by outcome."""
    return counts([outcome_of(m, store) for m in planned(request.members, request.points)])


def fleet_costs(
    request: Request, store: RunStore, hardware: Hardware, plan: Plan | None = None
) -> dict[str, Any]:
    """Return the cost of the unfinished runs as JSON values.

    Times are those of all workers of this machine with `plan`, else of one GPU of `hardware`.
    """
    packed = Planner(hardware, request.exec)
    single = Planner(hardware, replace(request.exec, pack_size=1))

    def on_gpu(points: list[Point]) -> Cost:
        kinds = Counter(packed.kind(p.spec) for p in points)
        packs = sum(math.ceil(n / kind.pack_size) for kind, n in kinds.items())
        hours = sum(n * kind.hours for kind, n in kinds.items())
        return packs, 3600 * hours, 3600 * sum(single.kind(p.spec).hours for p in points)

    states = plan.states if plan else store.states(p.id for p in request.points)
    todo = plan.todo if plan else [p for p in request.points if states[p.id] not in FINAL]
    names: dict[str, str] = {}  # bases of the same name are numbered
    bases: dict[str, list[Point]] = {}
    for p in todo:
        model = p.spec.model
        same = sum(name.split(" (")[0] == model.name for name in names.values())
        numbered = f"{model.name} ({same + 1})" if same else model.name
        bases.setdefault(names.setdefault(model.canonical, numbered), []).append(p)
    rows, total = [], [0, 0, 0, 0.0, 0.0]
    for base, points in bases.items():
        packs, together, alone = _here(points, plan) if plan else on_gpu(points)
        sums = [len({p.arm for p in points}), len(points), packs, together, alone]
        rows.append(_row(base, *sums))
        total = [None if None in pair else sum(pair) for pair in zip(total, sums)]
    found: dict[str, Any] = {"customers": customer_counts(request, store), "bases": rows}
    found |= {"total": _row("total", *total), "timed": total[-1] is not None, "workers": 1}
    if plan:
        found |= {"kinds": len({shape_of(p.spec) for p in todo}), "workers": plan.workers}
    return found


def _here(points: list[Point], plan: Plan) -> Cost:
    """Return the cost on this machine; alone only if such runs were timed outside of a pack."""
    ids = {p.id for p in points}
    packs = [pack for pack in plan.packs if pack.points[0].id in ids]
    times = [pack.seconds for pack in packs if pack.seconds is not None]
    together = plan.hours * 3600 * sum(run_flops(p.spec) for p in points) / plan.flops
    if times and len(times) == len(packs):
        together = sum(times) / plan.workers
    known = [found for p in points if (found := plan.speeds.of(p.spec)) and 1 in found]
    if len(known) < len(points):
        return len(packs), together, None
    each = (found[1] * updates_with_evaluations(p.spec) for p, found in zip(points, known))
    return len(packs), together, sum(each) / plan.workers


def _row(base: str, customers: Any, runs: Any, packs: Any, together: Any, alone: Any) -> Any:
    ratio = alone / together if alone is not None and together else None
    times = {"together_s": together, "alone_s": alone, "ratio": ratio}
    return {"base": base, "customers": customers, "runs": runs, "packs": packs, **times}


def lines(values: dict[str, Any], per: str) -> list[str]:
    """Return the costs in lines; `per`: unit of the times, such as 'on 2 worker(s)'."""
    found = ["", counts_line(values["customers"])]
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
