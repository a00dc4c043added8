"""The actions plan, layers, measure_packs and fetch: none starts a run."""

import dataclasses
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lorasweep.cli import answer, claim_costs, fleet_costs, tuned, understood
from lorasweep.cli.points import all_points, is_search
from lorasweep.cli.progress import duration, notifier
from lorasweep.config import preflight
from lorasweep.errors import SpecError, check_installed
from lorasweep.launch.measure_packs import measure_packs
from lorasweep.launch.slurm import planning
from lorasweep.launch.slurm.planning import hardware_of
from lorasweep.plan import detect
from lorasweep.plan.forecast import Forecast, Forecaster, hours_of, without_too_large
from lorasweep.plan.hardware import Hardware
from lorasweep.plan.load import run_flops
from lorasweep.plan.packing import pack_tokens
from lorasweep.plan.placement import MEMORY_ERROR, SPEED_ERROR
from lorasweep.plan.plan import Plan, make_plan, summary
from lorasweep.plan.throughput import shape_of
from lorasweep.plan.time import TRAINING_SHARE
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.model import ModelSpec
from lorasweep.spec.run import is_unpinned
from lorasweep.store.run_store import FINAL, RunStore
from lorasweep.sweep.grid import Point
from lorasweep.sweep.names import aligned
from lorasweep.sweep.question import Replicates
from lorasweep.sweep.request import Request
from lorasweep.sweep.trained import trained_plain, trained_text

OUTLOOK_RUNS = 2000
"""With more runs, action=plan does not say which claims can be decided, because loading the
analysis takes longer than planning. The command that starts the runs does say it."""
ENGINE = " with a serving engine*"
"""End of the name of a row that is not in the total."""
BASIS = {
    "measured": "from finished runs",
    "calibrated": "from measured step times",
    "assumed": "from an assumed speed",
}
"""Basis of the expected time."""
HEAD = (
    *("sweep", "runs", "packs", "jobs", "GPUs per run", "rows per pass", "GiB per GPU", "tokens"),
    *("FLOPs", "tokens/s per GPU", "GPU-hours", "days", "dollars"),
)


def show(request: Request, store: RunStore) -> int:
    """Print the runs that would be trained and their cost; start none."""
    hardware = hardware_of(request)
    if request.hardware and hardware.has_speeds:
        return _show_on_gpus(request, store, hardware)
    points = all_points(request, store)
    plan = make_plan(points, store, request.exec, hardware)
    queue = planning.difference(request, store, plan)
    outlooks = []
    if len(plan.points) <= OUTLOOK_RUNS:
        outlooks = [o for _, o in answer.outlooks(request.points, request.sweep, request.scale)]
    fleet = {"fleet": fleet_costs.here(request, store, plan)} if request.members else {}
    if request.format == "json":
        name: dict[str, Any] = {"sweep": request.sweep_name, "scale": request.scale}
        claims = {"claims": [o.plain() for o in outlooks]} if outlooks else {}
        if request.described:
            name["understood"] = understood.lines(request)
        print(json.dumps({**name, **summary(plan), **queue, **claims, **fleet}))
        return 0
    lines = [*understood.lines(request), plan_text(request, plan), *queue_lines(queue)]
    if is_search(request):
        lines += tuned.outlook_here(request, store)
    if request.members:
        lines += ["", *fleet_costs.lines(fleet["fleet"], f"on {plan.workers} worker(s)")]
    print("\n".join([*lines, *(o.line() for o in outlooks)]))
    return 0


def layers(request: Request, store: RunStore) -> int:
    """Print the matrices that each kind of run trains, by layer set."""
    plain = {"sweep": request.sweep_name, "kinds": trained_plain(request.points)}
    print(json.dumps(plain) if request.format == "json" else trained_text(request.points))
    return 0


def measure(request: Request, store: RunStore) -> int:
    """Measure step times of the missing runs on this machine, per kind of run; print the plan."""
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
        measure_packs(missing, store, request.exec, detect.this_machine(), notifier(request))
    return show(request, store)


def fetch(request: Request, store: RunStore) -> int:
    """Download the weights and data of a request's runs."""
    preflight.fetch((p.spec for part in request.parts or [request] for p in part.points), print)
    return 0


def plan_text(request: Request, plan: Plan) -> str:
    """Return the plan as text: a summary, arms, packs, and remarks."""
    values = summary(plan)
    runs, cost = values["runs"], values["cost"]
    name = request.sweep_name or "single run"
    if request.sweep_name and request.sweep:
        name = f"sweep {name}, scale {request.scale}"
    if plan.hardware.name != detect.NAME:
        name += f", on {plan.hardware.name}"
    states = ", ".join(f"{n} {s}" for s, n in plan.counts().items())
    lines = [
        f"{name}: {runs['total']} runs ({states}); {runs['todo']} to do in {cost['packs']} packs "
        f"on {cost['workers']} worker(s) x {cost['threads']} thread(s), about "
        f"{duration(cost['hours'] * 3600)} ({BASIS[cost['basis']]}), {cost['flops']:.2g} FLOPs, "
        f"memory up to {cost['memory_gib']:.1f} GiB, checkpoints up to "
        f"{cost['checkpoint_gib']:.1f} GiB"
    ]
    for a in values["arms"]:
        rank = f" rank {a['rank']}" if a["rank"] else ""
        lines.append(
            f"  {a['arm']}{rank} on {a['model']}: {a['runs']} runs, "
            f"{a['n_trainable']:,} trained parameters"
        )
    packs = []
    for pack in {shape_of(pack.points[-1].spec): pack for pack in plan.packs}.values():
        spec, n = pack.points[-1].spec, len(pack.points)
        if spec.method.MAX_PACK is not None:
            continue
        rank = f" rank {spec.method.rank}" if hasattr(spec.method, "rank") else ""
        speed = plan.throughputs.of(spec)
        if request.exec.pack_size is not None:
            why = "exec.pack_size"
        elif speed is None:
            why = f"up to {pack_tokens(plan.hardware)} tokens per update; not measured here"
        else:
            ms = ", ".join(f"{s * 1e3:.3g} ms in {k}" for k, s in sorted(speed.step_s.items()))
            pays = ": packing does not pay" if speed.measured and speed.best_size() == 1 else ""
            why = f"{'measured' if speed.measured else 'recorded'} per step and run: {ms}{pays}"
        packs.append(
            f"  packs of {spec.method.name}{rank} on {spec.model.name}: {n} run(s), "
            f"{pack.micro_batch_size} rows of each per forward pass ({why})"
        )
    # kinds that differ only in their data have the same line
    lines += [*dict.fromkeys(packs), *unpinned_lines(plan.points)]
    slow_bf16 = plan.hardware.fast_bf16 is False and request.cluster.name == "local"
    if plan.todo and slow_bf16 and plan.points[0].spec.precision == "bf16":
        lines.append(
            "  this processor has no bf16 instructions: an update takes about 50 times as long as "
            "in fp32. Add precision=fp32 (which changes the run ids), or use a processor or a GPU "
            "with bf16"
        )
    if request.sweep and request.sweep.replicate.seeds:
        second = request.sweep.replicate
        arms = f" of {', '.join(second.arms)}" if second.arms else ""
        lines.append(
            f"  second stage{arms}, when the first stage of a curve has finished: seeds "
            f"{second.seeds} at the {second.n_lrs} best learning rates"
        )
    return "\n".join(lines)


def unpinned_lines(points: Sequence[Point]) -> list[str]:
    """Return a line for each model and data set whose content on the hub can change."""
    models = {p.spec.model.name: p.spec.model for p in points}
    datasets = {p.spec.dataset.name: p.spec.dataset for p in points}
    parts: list[ModelSpec | DatasetSpec] = [*models.values(), *datasets.values()]
    return [
        f"  {part.WHERE[:-1]} {part.name} ({part.location}) names no commit of the hub: the newest "
        f"one is taken and recorded with the results; pin it with {part.WHERE}revision=COMMIT"
        for part in parts
        if is_unpinned(part)
    ]


def queue_lines(difference: dict[str, Any]) -> list[str]:
    """Return lines with the queue's changes by a submission; empty without a cluster."""
    if not difference:
        return []
    queue = difference["queue"]
    lines = [f"  to submit: {queue['to_submit']} runs"] if "jobs" in queue else []
    for job in queue.get("jobs", ()):
        nodes = f"{job['nodes']} nodes, on each " if job["nodes"] > 1 else ""
        gpus = f", {job['gpus']} GPU(s)" if job["gpus"] else ""
        lines.append(
            f"    {job['jobs']} job(s), each with {nodes}{job['cpus']} CPU core(s){gpus}, "
            f"{job['mem_gib']:g} GiB and at most {job['time_min']} min"
        )
    if queue["queued"]:
        lines.append(f"  {queue['queued']} runs are already queued")
    if queue["removed"]:
        lines.append(
            f"  {queue['removed']} queued run(s) of this sweep are no longer part of this command "
            "line: prune=true cancels them"
        )
    if "unknown" in queue:
        lines.append(f"  queued runs are unknown: {queue['unknown']}")
    return lines


# ---------------------------------------------------------------- on GPUs with a data sheet


def _show_on_gpus(request: Request, store: RunStore, hardware: Hardware) -> int:
    """Print the cost of sweeps on GPUs, a line for each, without looking at this machine."""
    planner, found, costs = Forecaster(hardware, request.exec), [], []
    for part in request.parts or [request]:
        states = store.states(p.id for p in part.points)
        missing = [p for p in part.points if states[p.id] not in FINAL]
        second = part.sweep.replicate if part.sweep else Replicates()
        found.append(planner.forecast(part.sweep_name or "run", missing, second))
        costs.append(claim_costs.claim_costs(part, missing, planner))
    found.append(planner.total(found))
    values = [forecast_plain(f, request.cluster.work_max) for f in found]
    budget = {}
    if request.budget and not is_search(request):
        every = [cost for some in costs for cost in some]
        budget = {"budget": claim_costs.within_budget(request, every)}
    queue: dict[str, Any] = {}
    if request.cluster.kind == "slurm" and not request.parts:
        points = without_too_large(request.points, hardware, request.exec)
        # the forecast says which runs fit nowhere, and why
        with suppress(SpecError):
            if points:
                plan = make_plan(points, store, request.exec, hardware)
                asked = dataclasses.replace(request, points=points)
                queue = planning.difference(asked, store, plan)
    fleet = {"fleet": fleet_costs.on_gpus(request, store, hardware)} if request.members else {}
    if request.format == "json":
        machine = {name: getattr(hardware, name) for name in ("name", "gpus", "price_per_gpu_h")}
        errors = {"memory": MEMORY_ERROR, "speed": SPEED_ERROR}
        about: dict[str, Any] = {"hardware": machine, "error": errors, "scale": request.scale}
        sweeps = [{**v, "claims": [c.plain() for c in some]} for v, some in zip(values, costs)]
        if request.described:
            about["understood"] = understood.lines(request)
        total = {"total": values[-1]}
        print(json.dumps({**about, "sweeps": sweeps, **total, **budget, **queue, **fleet}))
        return 0
    check_installed("jinja2", "a plan with hardware=NAME")
    from jinja2 import StrictUndefined, Template  # takes a moment to load

    shown = values if len(values) > 2 else values[:1]  # one sweep has no total
    rows = [row for v in shown for row in _rows(v, v is not values[-1])]
    form = Path(__file__).with_name("templates") / "forecast.txt"
    options: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True}
    text = Template(form.read_text(), undefined=StrictUndefined, **options).render(
        name=request.sweep_name or "run",
        scale=request.scale,
        hardware=hardware,
        usd=hardware.price_per_gpu_h,
        table="\n".join(aligned([HEAD, *rows], range(1, len(HEAD)))),
        total=values[-1],
        unpinned=unpinned_lines([p for part in request.parts or [request] for p in part.points]),
        memory_error=f"{MEMORY_ERROR:.0%}",
        speed_error=f"{SPEED_ERROR:.0%}",
        training_share=TRAINING_SHARE,
        verdicts=[(v["name"], c) for v, some in zip(values, costs) for c in some],
    )
    lines = [*understood.lines(request), text.rstrip(), *queue_lines(queue)]
    lines += claim_costs.budget_lines(budget["budget"]) if budget else []
    if is_search(request):
        n = len(found[0].runs)
        busy_s = 3600 * found[0].gpu_hours / n if n else None
        lines += ["", "one run of each arm, above; the search goes on from there:"]
        lines += tuned.outlook(request, busy_s, max(1, hardware.gpus))
    if request.members:
        lines += ["", *fleet_costs.lines(fleet["fleet"], "in time of one GPU")]
    print("\n".join(lines))
    return 0


def forecast_plain(found: Forecast, work_max_min: float) -> dict[str, Any]:
    """Return a forecast as JSON values; `work_max_min`: the longest job in minutes."""
    placed, hardware = found.placed(), found.hardware
    wheres = [where for _, where, _ in placed]
    largest = max((w.layout.gpus for w in wheres), default=1)

    def cost(hours: float) -> float | None:
        return None if hardware.price_per_gpu_h is None else hours * hardware.price_per_gpu_h

    def ends(values: Sequence[float]) -> list[float] | None:
        return [min(values), max(values)] if values else None

    return {
        "name": found.name,
        "runs": found.n_runs,
        "packs": found.packs,
        "jobs": found.jobs(work_max_min),
        "gpus_a_run": ends([w.layout.gpus for w in wheres]),
        "micro_batch": ends([w.layout.rows for w in wheres]),
        "memory_gib": max((w.memory_gib for w in wheres), default=None),
        "tokens": found.tokens,
        "flops": sum(n * run_flops(kind.spec) for kind, _, n in placed),
        "tokens_s": ends([w.tokens / w.seconds / w.layout.gpus for w in wheres]),
        "gpu_hours": found.gpu_hours,
        # no published measurement covers models with experts or sampling
        "gpu_hours_by_formulas_alone": sum(
            hours_of(*entry) for entry in placed if entry[0].spec.model.n_experts
        ),
        "gpu_hours_of_sampling": sum(
            hours_of(k, where, n) * where.sampling_s / where.seconds for k, where, n in placed
        ),
        "gpu_hours_with_serving_engine": found.served_hours(),
        # on all GPUs of the hardware, or on the GPUs of the largest run if these are more
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


def _rows(values: dict[str, Any], with_engine: bool) -> list[tuple[str, ...]]:
    """Return a forecast's row, and if it samples one with a serving engine."""

    def ends(key: str) -> str:
        if values[key] is None:
            return "-"
        low, high = (f"{value:,.0f}" for value in values[key])
        return low if low == high else f"{low} to {high}"

    def costs(share: float) -> tuple[str, str, str]:
        hours, days, usd = (values[key] for key in ("gpu_hours", "days", "cost_usd"))
        dollars = "-" if usd is None else f"{share * usd:,.0f}"
        return f"{share * hours:,.0f}", f"{share * days:.1f}", dollars

    memory, hours = values["memory_gib"], values["gpu_hours"]
    row = (
        values["name"],
        *(f"{values[key]:,}" for key in ("runs", "packs", "jobs")),
        *(ends(key) for key in ("gpus_a_run", "micro_batch")),
        "-" if memory is None else f"{memory:.0f}",
        *(f"{values[key]:.2g}" for key in ("tokens", "flops")),
        ends("tokens_s"),
        *costs(1),
    )
    if not with_engine or not values["gpu_hours_of_sampling"]:
        return [row]
    served = costs(values["gpu_hours_with_serving_engine"] / hours)
    blank = ("",) * (len(HEAD) - 1 - len(served))
    return [row, (f"{values['name']}{ENGINE}", *blank, *served)]
