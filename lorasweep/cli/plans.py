"""The actions plan, layers, measure_packs and fetch: none starts a run."""

import dataclasses
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from lorasweep.advise.pages import render
from lorasweep.cli import answer, claim_costs, fleet_costs, tuned, understood
from lorasweep.cli.points import all_points, is_search
from lorasweep.cli.printed import Answer
from lorasweep.cli.progress import duration, notifier
from lorasweep.config import preflight
from lorasweep.errors import SpecError
from lorasweep.launch.measure_packs import measure_packs
from lorasweep.launch.slurm import planning
from lorasweep.launch.slurm.planning import hardware_of
from lorasweep.plan import detect
from lorasweep.plan.hardware import Hardware
from lorasweep.plan.load import TRAINING_SHARE
from lorasweep.plan.plan import Plan, make_plan, summary
from lorasweep.plan.planner import (
    FORWARD_TOKENS,
    MEMORY_ERROR,
    PACK_TOKENS,
    SPEED_ERROR,
    Kind,
    Planner,
    best_size,
    costs,
    shape_of,
)
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.model import ModelSpec
from lorasweep.spec.run import is_unpinned
from lorasweep.store.run_store import FINAL, STATES, RunStore
from lorasweep.sweep.grid import Point
from lorasweep.sweep.names import aligned
from lorasweep.sweep.question import Replicates
from lorasweep.sweep.request import Request
from lorasweep.sweep.trained import trained_plain, trained_text

OUTLOOK_RUNS = 2000
"""With more runs, action=plan does not say which claims can be decided, because loading the
analysis takes longer than planning. The command that starts the runs does say it."""
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


def show(request: Request, store: RunStore) -> Answer:
    """Show the runs that would be trained and their cost; start none."""
    hardware = hardware_of(request)
    about: dict[str, Any] = {"scale": request.scale}
    if request.described:
        about["understood"] = understood.lines(request)
    if request.hardware and hardware.has_speeds:
        return _on_gpus(request, store, hardware, about)
    plan = make_plan(all_points(request, store), store, request.exec, hardware)
    queue, outlooks = planning.difference(request, store, plan), []
    if len(plan.points) <= OUTLOOK_RUNS:
        outlooks = [o for _, o in answer.outlooks(request.points, request.sweep, request.scale)]
    found = {"sweep": request.sweep_name, **about, **summary(plan), **queue}
    if outlooks:
        found["claims"] = [o.plain() for o in outlooks]
    if request.members:
        found["fleet"] = fleet_costs.fleet_costs(request, store, hardware, plan)

    def text() -> list[str]:
        lines = [*understood.lines(request), plan_text(request, plan), *queue_lines(queue)]
        if is_search(request):
            lines += tuned.outlook_here(request, store)
        if request.members:
            lines += fleet_costs.lines(found["fleet"], f"on {plan.workers} worker(s)")
        return [*lines, *(o.line() for o in outlooks)]

    return Answer(found, text)


def layers(request: Request, store: RunStore) -> Answer:
    """Show the matrices that each kind of run trains, by layer set."""
    plain = {"sweep": request.sweep_name, "kinds": trained_plain(request.points)}
    return Answer(plain, partial(trained_text, request.points))


def measure(request: Request, store: RunStore) -> Answer:
    """Measure step times of the missing runs on this machine, per kind of run; show the plan."""
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


def fetch(request: Request, store: RunStore) -> Answer:
    """Download the weights and data of a request's runs."""
    lines: list[str] = []
    specs = (p.spec for part in request.parts or [request] for p in part.points)
    preflight.fetch(specs, lines.append)
    return Answer(text=lines)


def plan_text(request: Request, plan: Plan) -> str:
    """Return the plan as text: a summary, arms, packs, and remarks."""
    values = summary(plan)
    runs, cost = values["runs"], values["cost"]
    name = request.sweep_name or "single run"
    if request.sweep_name and request.sweep:
        name = f"sweep {name}, scale {request.scale}"
    if plan.hardware.name != detect.NAME:
        name += f", on {plan.hardware.name}"
    states = ", ".join(f"{runs[s]} {s}" for s in STATES if s in runs)
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
        rank, speed = getattr(spec.method, "rank", None), plan.speeds.of(spec)
        named = f"{spec.method.name}{f' rank {rank}' if rank else ''} on {spec.model.name}"
        if request.exec.pack_size is not None:
            why = "exec.pack_size"
        elif not speed:
            most = FORWARD_TOKENS if plan.hardware.gpus else PACK_TOKENS
            why = f"up to {most} tokens per update; not measured here"
        else:
            ms = ", ".join(f"{s * 1e3:.3g} ms in {k}" for k, s in sorted(speed.items()))
            pays = ": packing does not pay" if best_size(speed) == 1 else ""
            why = f"measured per step and run: {ms}{pays}"
        packs.append(
            f"  packs of {named}: {n} run(s), {pack.micro_batch_size} rows of each per forward "
            f"pass ({why})"
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


def _on_gpus(
    request: Request, store: RunStore, hardware: Hardware, about: dict[str, Any]
) -> Answer:
    """Show the cost of sweeps on GPUs, a row for each, without looking at this machine."""
    planner, parts, every = Planner(hardware, request.exec), request.parts or [request], []
    sweeps: list[dict[str, Any]] = []
    total: dict[str, Kind] = {}  # runs that sweeps share count once
    for part in parts:
        states = store.states(p.id for p in part.points)
        missing = [p for p in part.points if states[p.id] not in FINAL]
        second = part.sweep.replicate if part.sweep else Replicates()
        runs = {i: k for s in planner.forecast(missing, second) for i, k in s.items()}
        total |= runs
        claims = claim_costs.claim_costs(part, missing, planner)
        every += claims
        row = costs(part.sweep_name or "run", runs, hardware, request.cluster.work_max)
        sweeps.append({**row, "claims": [c.plain for c in claims]})
    names = ("name", "gpus", "price_per_gpu_h")
    found: dict[str, Any] = {
        "hardware": {name: getattr(hardware, name) for name in names},
        "error": {"memory": MEMORY_ERROR, "speed": SPEED_ERROR},
        **about,
        "sweeps": sweeps,
        "total": costs("total", total, hardware, request.cluster.work_max),
    }
    if request.budget and not is_search(request):
        found["budget"] = claim_costs.within_budget(request, every)
    queue: dict[str, Any] = {}
    if request.cluster.kind == "slurm" and not request.parts:
        points = planner.without_too_large(request.points)
        # the table says which runs fit nowhere, and why
        with suppress(SpecError):
            if points:
                plan = make_plan(points, store, request.exec, hardware)
                asked = dataclasses.replace(request, points=points)
                queue = planning.difference(asked, store, plan)
    if request.members:
        found["fleet"] = fleet_costs.fleet_costs(request, store, hardware)

    def text() -> list[str]:
        shown = [*sweeps, found["total"]] if len(sweeps) > 1 else sweeps  # one has no total
        rows = [row for values in shown for row in _rows(values)]
        table = render(
            "forecast.txt",
            name=request.sweep_name or "run",
            scale=request.scale,
            hardware=hardware,
            usd=hardware.price_per_gpu_h,
            table="\n".join(aligned([HEAD, *rows], range(1, len(HEAD)))),
            total=found["total"],
            unpinned=unpinned_lines([p for part in parts for p in part.points]),
            memory_error=f"{MEMORY_ERROR:.0%}",
            speed_error=f"{SPEED_ERROR:.0%}",
            training_share=TRAINING_SHARE,
            verdicts=[(c.request.sweep_name, c.plain) for c in every],
            stays_open=claim_costs.stays_open,
        )
        lines = [*understood.lines(request), table.rstrip(), *queue_lines(queue)]
        lines += claim_costs.budget_lines(found["budget"]) if "budget" in found else []
        if is_search(request):
            busy_s = 3600 * found["total"]["gpu_hours"] / len(total) if total else None
            lines += ["", "one run of each arm, above; the search goes on from there:"]
            lines += tuned.outlook(request, busy_s, max(1, hardware.gpus))
        return lines + (
            fleet_costs.lines(found["fleet"], "in time of one GPU") if request.members else []
        )

    return Answer(found | queue, text)


def _rows(v: dict[str, Any]) -> list[list[str]]:
    """Return the row of a sweep's costs, and if it samples one with a serving engine."""

    def ends(key: str) -> str:
        low, high = ("-", "-") if v[key] is None else (f"{value:,.0f}" for value in v[key])
        return low if low == high else f"{low} to {high}"

    def spent(share: float) -> list[str]:
        dollars = "-" if v["cost_usd"] is None else f"{share * v['cost_usd']:,.0f}"
        return [f"{share * v['gpu_hours']:,.0f}", f"{share * v['days']:.1f}", dollars]

    row = [
        v["name"],
        *(f"{v[key]:,}" for key in ("runs", "packs", "jobs")),
        *(ends(key) for key in ("gpus_a_run", "micro_batch")),
        "-" if v["memory_gib"] is None else f"{v['memory_gib']:.0f}",
        *(f"{v[key]:.2g}" for key in ("tokens", "flops")),
        ends("tokens_s"),
        *spent(1),
    ]
    if v["name"] == "total" or not v["gpu_hours_of_sampling"]:
        return [row]
    served = spent(v["gpu_hours_with_serving_engine"] / v["gpu_hours"])
    name = f"{v['name']} with a serving engine*"  # not in the total
    return [row, [name, *[""] * (len(HEAD) - 1 - len(served)), *served]]
