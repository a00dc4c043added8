"""Plan sweeps for given GPUs: a table with a line a sweep and a total, and what answers cost.

Says nothing about the machine it runs on.
"""

import json
from collections.abc import Sequence
from typing import Any

from lorasweep.cli import answer
from lorasweep.cli.plans import of_fleet
from lorasweep.cli.plans.plan_text import queue_lines, unpinned_lines
from lorasweep.plan.gpu.forecast import Forecast, Forecaster, hours_of
from lorasweep.plan.gpu.placement import MEMORY_ERROR, SPEED_ERROR
from lorasweep.plan.gpu.time import TRAINING_SHARE
from lorasweep.plan.hardware import Hardware
from lorasweep.store.run_store import FINAL, RunStore
from lorasweep.sweep.aligned import aligned
from lorasweep.sweep.question import Replicates
from lorasweep.sweep.request import Request

HEAD = (
    *("sweep", "runs", "packs", "jobs", "GPUs a run", "rows a pass", "GiB a GPU", "tokens"),
    *("FLOPs", "tokens/s a GPU", "GPU-hours", "days", "dollars"),
)


def show(request: Request, store: RunStore, hardware: Hardware, queue: dict[str, Any]) -> int:
    """Print the plan of a request, or of its parts, for `hardware`; start nothing.

    `queue`: what a submission would change in the queue of a cluster.
    """
    planner = Forecaster(hardware, request.exec)
    asked = request.parts or [request]
    parts = [_forecast(planner, part, store) for part in asked]
    total = planner.total(parts)
    prices = [_prices(part, found) for part, found in zip(asked, parts, strict=True)]
    work = request.cluster.work_max
    fleet = {"fleet": of_fleet.on_gpus(request, store, hardware)} if request.members else {}
    if request.format == "json":
        sweeps = [{**_plain(p, work), "claims": c} for p, c in zip(parts, prices, strict=True)]
        machine = {name: getattr(hardware, name) for name in ("name", "gpus", "price_per_gpu_h")}
        errors = {"memory": MEMORY_ERROR, "speed": SPEED_ERROR}
        both = {"hardware": machine, "error": errors, "scale": request.scale}
        print(
            json.dumps({**both, "sweeps": sweeps, "total": _plain(total, work), **queue, **fleet})
        )
        return 0
    lines = [*_text(request, hardware, [*parts, total], prices), *queue_lines(queue)]
    if request.members:
        lines += ["", *of_fleet.lines(fleet["fleet"], "in time of one GPU")]
    print("\n".join(lines))
    return 0


def _forecast(planner: Forecaster, request: Request, store: RunStore) -> Forecast:
    """Forecast the unfinished runs of one sweep, or the single run."""
    states = store.states(p.id for p in request.points)
    missing = [p for p in request.points if states[p.id] not in FINAL]
    second = request.sweep.replicate if request.sweep else Replicates()
    return planner.forecast(request.sweep_name or "run", missing, second)


# ---------------------------------------------------------------- the price of an answer


def _prices(request: Request, found: Forecast) -> list[dict[str, Any]]:
    """Return for each claim the runs and GPU-hours until its interval is expected to fit.

    The spread between seeds is that stated for this scale, or for the next smaller one that has it.
    """
    if request.sweep is None or not found.runs:
        return []
    first, second = found.stage_hours()
    seeds, runs = len(request.sweep.replicate.seeds), len(found.runs)
    prices = []
    for scale, outlook in answer.outlooks_of(request.points, request.sweep, request.scale):
        price: dict[str, Any] = {
            "claim": outlook.claim,
            "spread_from": scale,
            "half_width": outlook.half_width,
            "planned": outlook.planned,
            "needed": outlook.needed,
            "units": outlook.units,
            "can_decide": outlook.can_decide,
        }
        if outlook.needed is not None and outlook.units == "seeds" and seeds:
            more = max(0, outlook.needed - 1) / seeds  # one seed is the first stage's
            fresh = runs - len(found.first)
            price |= {
                "runs": len(found.first) + round(more * fresh),
                "gpu_hours": first + more * second,
            }
        elif outlook.needed is not None:
            share = outlook.needed / max(1, outlook.planned)
            price |= {"runs": round(share * runs), "gpu_hours": share * (first + second)}
        prices.append(price)
    return prices


def _price_lines(name: str, prices: Sequence[dict[str, Any]], hardware: Hardware) -> list[str]:
    lines = []
    for p in prices:
        if p["can_decide"] is None:
            end = "not known: no spread between seeds stated"
        elif "gpu_hours" not in p:
            end = "no number of seeds that would fit its margin was found"
        else:
            dollars = _dollars(p["gpu_hours"], hardware)
            end = (
                f"{p['needed']} {p['units']} (planned {p['planned']}): {p['runs']:,} runs, "
                f"{p['gpu_hours']:,.0f} GPU-hours{dollars}, by the spread at {p['spread_from']}"
            )
        lines.append(f"  {name}: {p['claim']}: {end}")
    return lines


# ---------------------------------------------------------------- text and JSON


def _plain(found: Forecast, work_max_min: float) -> dict[str, Any]:
    """Return a forecast as JSON values."""
    placed = found.placed()
    wheres = [where for _, where, _ in placed]
    return {
        "name": found.name,
        "runs": found.n_runs,
        "packs": found.packs,
        "jobs": found.jobs(work_max_min),
        "gpus_a_run": _ends([w.layout.gpus for w in wheres]),
        "micro_batch": _ends([w.layout.rows for w in wheres]),
        "memory_gib": max((w.memory_gib for w in wheres), default=None),
        "tokens": found.tokens,
        "flops": found.flops,
        "tokens_s": _ends([w.tokens / w.seconds / w.layout.gpus for w in wheres]),
        "gpu_hours": found.gpu_hours,
        "gpu_hours_by_formulas_alone": found.expert_hours,
        "gpu_hours_of_sampling": found.sampling_hours,
        "days": _days(found),
        "cost_usd": _cost(found.gpu_hours, found.hardware),
        "fits": not found.misfits(),
        "left_out": [
            {
                "kind": kind.label,
                "runs": n,
                "gpus_a_run": where.layout.gpus,
                "gpu_hours": hours_of(kind, where, n),
                "cost_usd": _cost(hours_of(kind, where, n), found.hardware),
            }
            for kind, where, n in found.left_out()
        ],
        "misfits": [
            {"kind": kind.label, "runs": n, "why": misfit.why, "remedy": misfit.remedy}
            for kind, misfit, n in found.misfits()
        ],
    }


def _ends(values: Sequence[float]) -> list[float] | None:
    return [min(values), max(values)] if values else None


def _days(found: Forecast) -> float:
    """Days on all GPUs of the hardware, or on those of the largest run if it has more."""
    largest = max((w.layout.gpus for _, w, _ in found.placed()), default=1)
    return found.gpu_hours / 24 / max(found.hardware.gpus, largest)


def _cost(hours: float, hardware: Hardware) -> float | None:
    return None if hardware.price_per_gpu_h is None else hours * hardware.price_per_gpu_h


def _dollars(hours: float, hardware: Hardware) -> str:
    cost = _cost(hours, hardware)
    return "" if cost is None else f", ${cost:,.0f}"


def _text(
    request: Request,
    hardware: Hardware,
    found: Sequence[Forecast],
    prices: Sequence[Sequence[dict[str, Any]]],
) -> list[str]:
    rows = [_row(f, request.cluster.work_max) for f in found]
    if len(rows) == 2:  # one sweep is its own total
        rows = rows[:1]
    name = request.sweep_name or "run"
    lines = [f"{name}, scale {request.scale}, on {hardware.gpus} x {hardware.gpu_name}", ""]
    lines += aligned([HEAD, *rows], range(1, len(HEAD)))
    points = [p for part in request.parts or [request] for p in part.points]
    lines += ["", *_left_lines(found[-1]), *unpinned_lines(points), *_basis_lines(found[-1])]
    priced = [
        line
        for f, p in zip(found[:-1], prices, strict=True)
        for line in _price_lines(f.name, p, hardware)
    ]
    if priced:
        lines += ["", "until an answer is expected, alone:", *priced]
    return lines


def _row(found: Forecast, work_max_min: float) -> tuple[str, ...]:
    values = _plain(found, work_max_min)
    cost = values["cost_usd"]
    return (
        found.name,
        f"{values['runs']:,}",
        f"{values['packs']:,}",
        f"{values['jobs']:,}",
        _range(values["gpus_a_run"]),
        _range(values["micro_batch"]),
        "-" if values["memory_gib"] is None else f"{values['memory_gib']:.0f}",
        f"{values['tokens']:.2g}",
        f"{values['flops']:.2g}",
        _range(values["tokens_s"]),
        f"{values['gpu_hours']:,.0f}",
        f"{values['days']:.1f}",
        "-" if cost is None else f"{cost:,.0f}",
    )


def _range(ends: Sequence[float] | None) -> str:
    if ends is None:
        return "-"
    low, high = (f"{value:,.0f}" for value in ends)
    return low if low == high else f"{low} to {high}"


def _left_lines(total: Forecast) -> list[str]:
    """Return what is left out and what does not fit, each with its price or its remedy."""
    lines = []
    for kind, where, n in total.left_out():
        hours = hours_of(kind, where, n)
        lines.append(
            f"left out, as a run takes {where.layout.gpus} GPUs (exec.max_gpus=N allows more): "
            f"{kind.label}, {n} runs, {hours:,.0f} GPU-hours{_dollars(hours, total.hardware)}"
        )
    for kind, misfit, n in total.misfits():
        lines.append(f"does not fit: {kind.label}, {n} runs: {misfit.why}. Give {misfit.remedy}")
    return lines


def _basis_lines(total: Forecast) -> list[str]:
    """Return the price assumed, and what rests on measurements and what on formulas."""
    hardware = total.hardware
    price = "none stated"
    if hardware.price_per_gpu_h is not None:
        price = f"${hardware.price_per_gpu_h:g} a GPU and hour (hardware.price_per_gpu_h=N)"
    return [
        f"price assumed: {price}. Runs that sweeps share are trained once and count once in the "
        "total. Fresh seeds of the second stage are in it, further looks are not.",
        f"nothing was measured on {hardware.name}: memory and time are computed from shapes and "
        "its data sheet. Of published measurements of dense models nine in ten lie within "
        f"{MEMORY_ERROR:.0%} of such a memory and {SPEED_ERROR:.0%} of such a speed "
        "(analysis/results/plan); they fix one constant, the share of the attainable speed that "
        f"products reach ({TRAINING_SHARE:g}). Models with experts "
        f"({total.expert_hours:,.0f} GPU-hours) and the memory of full fine-tuning rest on "
        "formulas alone.",
        *_sampling_lines(total),
    ]


def _sampling_lines(total: Forecast) -> list[str]:
    """Return what sampling answers takes; nothing where none are."""
    if not total.sampling_hours:
        return []
    return [
        f"sampling answers takes {total.sampling_hours:,.0f} of the GPU-hours, by formulas alone: "
        "through transformers' forward pass, a token of all answers at a time, mostly bound by "
        "the launch of its kernels. A serving engine would take less; none is used."
    ]
