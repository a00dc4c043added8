"""Show what would run and what it costs, here or on GPUs; what runs train; measure packs; fetch.

Starts nothing but the measurement of packs and downloads.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from lorasweep.cli import answer, fleet_costs
from lorasweep.cli.plan_text import forecast_text, plan_text, queue_lines
from lorasweep.cli.points import all_points
from lorasweep.cli.progress import notifier
from lorasweep.config import preflight
from lorasweep.errors import SpecError
from lorasweep.launch.measure_packs import measure_packs
from lorasweep.launch.slurm import planning
from lorasweep.launch.slurm.planning import hardware_of
from lorasweep.plan import detect
from lorasweep.plan.forecast import Forecast, Forecaster, hours_of, without_too_large
from lorasweep.plan.hardware import Hardware
from lorasweep.plan.placement import MEMORY_ERROR, SPEED_ERROR
from lorasweep.plan.plan import make_plan, refuse_mixing, summary
from lorasweep.store.run_store import FINAL, RunStore
from lorasweep.sweep.question import Replicates
from lorasweep.sweep.request import Request
from lorasweep.sweep.trained import trained_plain, trained_text

OUTLOOK_RUNS = 2000
"""Number of runs above which action=plan does not say what claims can be decided. Loading the
analysis takes a second, longer than planning; the start of the runs says it."""


def show(request: Request, store: RunStore) -> int:
    """Print what would run and what it costs; start nothing."""
    hardware = hardware_of(request)
    if request.hardware and hardware.has_speeds:
        return _show_on_gpus(request, store, hardware)
    points = all_points(request, store)
    refuse_mixing(points, store, request.exec)
    plan = make_plan(points, store, request.exec, hardware)
    queue = planning.difference(request, store, plan)
    outlooks = []
    if len(plan.points) <= OUTLOOK_RUNS:
        outlooks = answer.outlooks(request.points, request.sweep, request.scale)
    fleet = {"fleet": fleet_costs.here(request, store, plan)} if request.members else {}
    if request.format == "json":
        name = {"sweep": request.sweep_name, "scale": request.scale}
        claims = {"claims": [found.plain() for found in outlooks]} if outlooks else {}
        print(json.dumps({**name, **summary(plan), **queue, **claims, **fleet}))
        return 0
    lines = [plan_text(request, plan), *queue_lines(queue)]
    if request.members:
        lines += ["", *fleet_costs.lines(fleet["fleet"], f"on {plan.workers} worker(s)")]
    print("\n".join([*lines, *(found.line() for found in outlooks)]))
    return 0


def layers(request: Request, store: RunStore) -> int:
    """Print what each kind of run trains, by layer set."""
    if request.format == "json":
        print(json.dumps({"sweep": request.sweep_name, "kinds": trained_plain(request.points)}))
    else:
        print(trained_text(request.points))
    return 0


def measure(request: Request, store: RunStore) -> int:
    """Measure the kinds of missing runs on this machine, and print the plan."""
    if request.cluster.kind == "slurm":
        raise SpecError(
            "action=measure_packs measures the machine it runs on. On a cluster, run it inside a "
            "job, with cluster=local: srun python -m lorasweep ... action=measure_packs"
        )
    store.prepare()
    preflight.check_available(request)
    points = all_points(request, store)
    states = store.states(p.id for p in points)
    missing = [p.spec for p in points if states[p.id] == "missing"]
    if missing:
        machine = detect.this_machine()
        measure_packs(missing, store, request.exec, machine, notifier(request))
    return show(request, store)


def fetch(request: Request, store: RunStore) -> int:
    """Download the weights and data of a request's runs, or of those of its parts."""
    preflight.fetch((p.spec for part in request.parts or [request] for p in part.points), print)
    return 0


# ---------------------------------------------------------------- on GPUs with a data sheet


def _show_on_gpus(request: Request, store: RunStore, hardware: Hardware) -> int:
    """Print what sweeps take on GPUs, a line a sweep; never asks about this machine."""
    planner, work_max = Forecaster(hardware, request.exec), request.cluster.work_max
    parts = request.parts or [request]
    found = [_forecast(planner, part, store) for part in parts]
    total = planner.total(found)
    prices = [_prices(part, f) for part, f in zip(parts, found, strict=True)]
    queue = _queue_on_gpus(request, store, hardware)
    fleet = {"fleet": fleet_costs.on_gpus(request, store, hardware)} if request.members else {}
    values = [forecast_plain(f, work_max) for f in [*found, total]]
    if request.format == "json":
        machine = {name: getattr(hardware, name) for name in ("name", "gpus", "price_per_gpu_h")}
        errors = {"memory": MEMORY_ERROR, "speed": SPEED_ERROR}
        about = {"hardware": machine, "error": errors, "scale": request.scale}
        sweeps = [{**v, "claims": p} for v, p in zip(values, prices)]
        print(json.dumps({**about, "sweeps": sweeps, "total": values[-1], **queue, **fleet}))
        return 0
    lines = forecast_text(request, hardware, values, prices) + queue_lines(queue)
    if request.members:
        lines += ["", *fleet_costs.lines(fleet["fleet"], "in time of one GPU")]
    print("\n".join(lines))
    return 0


def _forecast(planner: Forecaster, request: Request, store: RunStore) -> Forecast:
    """Forecast the unfinished runs of one sweep, or the single run."""
    states = store.states(p.id for p in request.points)
    missing = [p for p in request.points if states[p.id] not in FINAL]
    second = request.sweep.replicate if request.sweep else Replicates()
    return planner.forecast(request.sweep_name or "run", missing, second)


def _queue_on_gpus(request: Request, store: RunStore, hardware: Hardware) -> dict[str, Any]:
    """Return what a submission would change in the queue of the cluster.

    Empty for a study of several sweeps, without a cluster, and if runs fit nowhere.
    """
    if request.parts or request.cluster.kind != "slurm":
        return {}
    points = without_too_large(request.points, hardware, request.exec)
    if not points:
        return {}
    try:
        plan = make_plan(points, store, request.exec, hardware)
        return planning.difference(dataclasses.replace(request, points=points), store, plan)
    except SpecError:
        return {}  # the forecast says which runs fit nowhere, and why


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
        price: dict[str, Any] = {"claim": outlook.claim, "spread_from": scale}
        names = ("half_width", "planned", "needed", "units", "can_decide")
        price |= {name: getattr(outlook, name) for name in names}
        if outlook.needed is not None and outlook.units == "seeds" and seeds:
            more = max(0, outlook.needed - 1) / seeds  # one seed is the first stage's
            fresh = runs - len(found.first)
            price["runs"] = len(found.first) + round(more * fresh)
            price["gpu_hours"] = first + more * second
        elif outlook.needed is not None:
            share = outlook.needed / max(1, outlook.planned)
            price["runs"] = round(share * runs)
            price["gpu_hours"] = share * (first + second)
        prices.append(price)
    return prices


def forecast_plain(found: Forecast, work_max_min: float) -> dict[str, Any]:
    """Return a forecast as JSON values. `work_max_min`: longest job in minutes."""
    placed, hardware = found.placed(), found.hardware
    wheres = [where for _, where, _ in placed]
    largest = max((w.layout.gpus for w in wheres), default=1)

    def cost(hours: float) -> float | None:
        return None if hardware.price_per_gpu_h is None else hours * hardware.price_per_gpu_h

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
        # on all GPUs of the hardware, or on those of the largest run if it has more
        "days": found.gpu_hours / 24 / max(hardware.gpus, largest),
        "cost_usd": cost(found.gpu_hours),
        "fits": not found.misfits(),
        "left_out": [
            {
                "kind": kind.label,
                "runs": n,
                "gpus_a_run": where.layout.gpus,
                "gpu_hours": (hours := hours_of(kind, where, n)),
                "cost_usd": cost(hours),
            }
            for kind, where, n in found.placed(left_out=True)
        ],
        "misfits": [
            {"kind": kind.label, "runs": n, "why": misfit.why, "remedy": misfit.remedy}
            for kind, misfit, n in found.misfits()
        ],
    }


def _ends(values: Sequence[float]) -> list[float] | None:
    return [min(values), max(values)] if values else None
