"""Write plans for people: what would run, how it is packed, what it costs, and what is queued."""

from collections.abc import Sequence
from typing import Any

from lorasweep.cli.progress import duration
from lorasweep.plan import detect
from lorasweep.plan.hardware import Hardware
from lorasweep.plan.packing import Pack, forward_tokens
from lorasweep.plan.placement import MEMORY_ERROR, SPEED_ERROR
from lorasweep.plan.plan import Plan, summary
from lorasweep.plan.throughput import shape_of
from lorasweep.plan.time import TRAINING_SHARE
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.model import ModelSpec
from lorasweep.spec.revision import is_unpinned
from lorasweep.sweep.aligned import aligned
from lorasweep.sweep.grid import Point
from lorasweep.sweep.request import Request

BASIS = {
    "measured": "from finished runs",
    "calibrated": "from measured step times",
    "assumed": "from an assumed speed",
}
"""Where the expected time comes from."""
HEAD = (
    *("sweep", "runs", "packs", "jobs", "GPUs a run", "rows a pass", "GiB a GPU", "tokens"),
    *("FLOPs", "tokens/s a GPU", "GPU-hours", "days", "dollars"),
)


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
    shapes = {shape_of(pack.points[-1].spec): pack for pack in plan.packs}
    lines += dict.fromkeys(  # kinds that differ only in their data have the same line
        _pack_line(request, plan, pack)
        for pack in shapes.values()
        if pack.points[-1].spec.method.MAX_PACK is None
    )
    lines += unpinned_lines(plan.points)
    slow_bf16 = plan.hardware.fast_bf16 is False and request.cluster.name == "local"
    if plan.todo and slow_bf16 and plan.points[0].spec.precision == "bf16":
        lines.append(
            "  this processor has no bf16 instructions: an update takes about 50 times as long as "
            "in fp32; add precision=fp32 (other run ids), or use a processor or a GPU with bf16"
        )
    if request.sweep and request.sweep.replicate.seeds:
        second = request.sweep.replicate
        arms = f" of {', '.join(second.arms)}" if second.arms else ""
        lines.append(
            f"  second stage{arms}, when the first stage of a curve has finished: seeds "
            f"{second.seeds} at the {second.n_lrs} best learning rates"
        )
    return "\n".join(lines)


def _pack_line(request: Request, plan: Plan, pack: Pack) -> str:
    """Return how runs of one kind are packed and why."""
    spec, n = pack.points[-1].spec, len(pack.points)
    rank = f" rank {spec.method.rank}" if hasattr(spec.method, "rank") else ""
    speed = plan.throughputs.of(spec)
    if request.exec.pack_size is not None:
        why = "exec.pack_size"
    elif speed is None:
        why = f"up to {forward_tokens(plan.hardware)} tokens per forward pass; not measured here"
    else:
        times = ", ".join(f"{s * 1e3:.3g} ms in {size}" for size, s in sorted(speed.step_s.items()))
        pays = ": packing does not pay" if speed.measured and speed.best_size() == 1 else ""
        how = "measured" if speed.measured else "recorded"
        why = f"{how} per step and run: {times}{pays}"
    return (
        f"  packs of {spec.method.name}{rank} on {spec.model.name}: {n} run(s), "
        f"{pack.micro_batch_size} rows of each per forward pass ({why})"
    )


def unpinned_lines(points: Sequence[Point]) -> list[str]:
    """Return a line for every model and data set whose content on the hub can change."""
    models = {p.spec.model.name: p.spec.model for p in points}
    datasets = {p.spec.dataset.name: p.spec.dataset for p in points}
    parts: list[tuple[str, ModelSpec | DatasetSpec]] = [
        *(("model", model) for model in models.values()),
        *(("dataset", dataset) for dataset in datasets.values()),
    ]
    return [
        f"  {kind} {part.name} ({part.location}) names no commit of the hub: the newest one is "
        f"taken and recorded with the results; pin it with {kind}.revision=COMMIT"
        for kind, part in parts
        if is_unpinned(part)
    ]


def queue_lines(difference: dict[str, Any]) -> list[str]:
    """Return what a submission would change in the queue, as lines; empty without a cluster."""
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


def forecast_text(
    request: Request,
    hardware: Hardware,
    values: Sequence[dict[str, Any]],
    prices: Sequence[Sequence[dict[str, Any]]],
) -> list[str]:
    """Return the lines of a plan for GPUs.

    Args:
        values: a forecast for each sweep, and last the total (`plans.forecast_plain`).
        prices: what deciding each claim of each sweep costs.
    """
    total = values[-1]
    rows = [_row(v) for v in values]
    if len(rows) == 2:  # one sweep is the total
        rows = rows[:1]
    name = request.sweep_name or "run"
    lines = [f"{name}, scale {request.scale}, on {hardware.gpus} x {hardware.gpu_name}", ""]
    lines += [*aligned([HEAD, *rows], range(1, len(HEAD))), ""]
    for left in total["left_out"]:
        lines.append(
            f"left out, as a run takes {left['gpus_a_run']} GPUs (exec.max_gpus=N allows more): "
            f"{left['kind']}, {left['runs']} runs, {left['gpu_hours']:,.0f} GPU-hours"
            f"{_dollars(left['gpu_hours'], hardware)}"
        )
    for m in total["misfits"]:
        lines.append(f"does not fit: {m['kind']}, {m['runs']} runs: {m['why']}. Give {m['remedy']}")
    points = [p for part in request.parts or [request] for p in part.points]
    lines += [*unpinned_lines(points), *_basis_lines(total, hardware)]
    priced = [
        f"  {v['name']}: {p['claim']}: {_price(p, hardware)}"
        for v, some in zip(values, prices)
        for p in some
    ]
    return [*lines, "", "until an answer is expected, alone:", *priced] if priced else lines


def _row(values: dict[str, Any]) -> tuple[str, ...]:
    def ends(key: str) -> str:
        if values[key] is None:
            return "-"
        low, high = (f"{value:,.0f}" for value in values[key])
        return low if low == high else f"{low} to {high}"

    memory, cost = values["memory_gib"], values["cost_usd"]
    return (
        values["name"],
        *(f"{values[key]:,}" for key in ("runs", "packs", "jobs")),
        *(ends(key) for key in ("gpus_a_run", "micro_batch")),
        "-" if memory is None else f"{memory:.0f}",
        *(f"{values[key]:.2g}" for key in ("tokens", "flops")),
        ends("tokens_s"),
        f"{values['gpu_hours']:,.0f}",
        f"{values['days']:.1f}",
        "-" if cost is None else f"{cost:,.0f}",
    )


def _dollars(hours: float, hardware: Hardware) -> str:
    price = hardware.price_per_gpu_h
    return "" if price is None else f", ${hours * price:,.0f}"


def _price(p: dict[str, Any], hardware: Hardware) -> str:
    """Return what deciding a claim costs, in words."""
    if p["can_decide"] is None:
        return "not known: no spread between seeds stated"
    if "gpu_hours" not in p:
        return "no number of seeds that would fit its margin was found"
    return (
        f"{p['needed']} {p['units']} (planned {p['planned']}): {p['runs']:,} runs, "
        f"{p['gpu_hours']:,.0f} GPU-hours{_dollars(p['gpu_hours'], hardware)}, by the spread at "
        f"{p['spread_from']}"
    )


def _basis_lines(total: dict[str, Any], hardware: Hardware) -> list[str]:
    """Return the price assumed, and what rests on measurements and what on formulas."""
    price = "none stated"
    if hardware.price_per_gpu_h is not None:
        price = f"${hardware.price_per_gpu_h:g} a GPU and hour (hardware.price_per_gpu_h=N)"
    lines = [
        f"price assumed: {price}. Runs that sweeps share are trained once and count once in the "
        "total. Fresh seeds of the second stage are included, further looks are not.",
        f"nothing was measured on {hardware.name}: memory and time are computed from shapes and "
        "its data sheet. Of published measurements of dense models nine in ten lie within "
        f"{MEMORY_ERROR:.0%} of such a memory and {SPEED_ERROR:.0%} of such a speed "
        "(analysis/results/plan); they fix one constant, the share of the attainable speed that "
        f"products reach ({TRAINING_SHARE:g}). Models with experts "
        f"({total['gpu_hours_by_formulas_alone']:,.0f} GPU-hours) and the memory of full "
        "fine-tuning rest on formulas alone.",
    ]
    if total["gpu_hours_of_sampling"]:
        lines.append(
            f"sampling completions takes {total['gpu_hours_of_sampling']:,.0f} of the GPU-hours, "
            "by formulas alone: through transformers' forward pass, a token of all completions at "
            "a time, mostly bound by the launch of kernels. A serving engine would take less; none "
            "is used."
        )
    return lines
