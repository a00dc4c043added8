"""Write a plan for people: what would run, how it is packed, what it costs, and what is queued."""

from collections.abc import Sequence
from typing import Any

from lorasweep.cli.progress import duration
from lorasweep.plan import detect
from lorasweep.plan.estimate import Plan, summary
from lorasweep.plan.packing import Pack, forward_tokens
from lorasweep.plan.throughput import shape_of
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.model import ModelSpec
from lorasweep.spec.revision import is_unpinned
from lorasweep.sweep.grid import Point
from lorasweep.sweep.request import Request

BASIS = {
    "measured": "from finished runs",
    "calibrated": "from measured step times",
    "assumed": "from an assumed speed",
}
"""Where the expected time comes from."""


def plan_text(request: Request, now: Plan) -> str:
    """Return the plan as text: a summary, arms, packs, and remarks."""
    values = summary(now)
    lines = [_head(request, now, values)]
    for a in values["arms"]:
        rank = f" rank {a['rank']}" if a["rank"] else ""
        lines.append(
            f"  {a['arm']}{rank} on {a['model']}: {a['runs']} runs, "
            f"{a['n_trainable']:,} trained parameters"
        )
    lines += _pack_lines(request, now)
    lines += unpinned_lines(now.points)
    if now.todo and request.cluster.name == "local" and _bf16_is_slow(now):
        lines.append(
            "  this processor has no bf16 instructions: an update takes about 50 times as long as "
            "in fp32; add precision=fp32 (other run ids), or use a processor or a GPU with bf16"
        )
    if request.sweep and request.sweep.replicate.seeds:
        second = request.sweep.replicate
        arms = f" of {', '.join(second.arms)}" if second.arms else ""
        lines.append(
            f"  second stage{arms}, when the first stage of a curve has finished: seeds "
            f"{second.seeds} at its {second.n_lrs} best rates"
        )
    return "\n".join(lines)


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


def _head(request: Request, now: Plan, values: dict[str, Any]) -> str:
    runs, cost = values["runs"], values["cost"]
    name = "single run"
    if request.sweep_name:
        name = request.sweep_name
        if request.sweep:
            name = f"sweep {name}, scale {request.scale}"
    if now.hardware.name != detect.NAME:
        name += f", on {now.hardware.name}"
    states = ", ".join(f"{n} {s}" for s, n in now.counts().items())
    return (
        f"{name}: {runs['total']} runs ({states}); {runs['todo']} to do in {cost['packs']} packs "
        f"on {cost['workers']} worker(s) x {cost['threads']} thread(s), about "
        f"{duration(cost['hours'] * 3600)} ({BASIS[cost['basis']]}), {cost['flops']:.2g} FLOPs, "
        f"memory up to {cost['memory_gib']:.1f} GiB, checkpoints up to "
        f"{cost['checkpoint_gib']:.1f} GiB"
    )


def _bf16_is_slow(now: Plan) -> bool:
    """Return whether these runs use bf16 and the hardware is known not to support it."""
    precision = now.points[0].spec.precision if now.points else None
    return precision == "bf16" and now.hardware.fast_bf16 is False


def _pack_lines(request: Request, now: Plan) -> list[str]:
    """Return how runs are packed and why, a line per kind of run."""
    shapes = {shape_of(pack.points[-1].spec): pack for pack in now.packs}
    lines = [
        _pack_line(request, now, pack)
        for pack in shapes.values()
        if pack.points[-1].spec.method.MAX_PACK is None
    ]
    return list(dict.fromkeys(lines))  # kinds that differ only in their data have the same line


def _pack_line(request: Request, now: Plan, pack: Pack) -> str:
    spec, n = pack.points[-1].spec, len(pack.points)
    rank = f" rank {spec.method.rank}" if hasattr(spec.method, "rank") else ""
    speed = now.throughputs.of(spec)
    if request.exec.pack_size is not None:
        why = "exec.pack_size"
    elif speed is None:
        why = f"up to {forward_tokens(now.hardware)} tokens per forward pass; not measured here"
    else:
        times = ", ".join(f"{s * 1e3:.3g} ms in {size}" for size, s in sorted(speed.step_s.items()))
        pays = ": packing does not pay" if speed.measured and speed.best_size() == 1 else ""
        how = "measured" if speed.measured else "recorded"
        why = f"{how} per step and run: {times}{pays}"
    return (
        f"  packs of {spec.method.name}{rank} on {spec.model.name}: {n} run(s), "
        f"{pack.micro_batch_size} rows of each per forward pass ({why})"
    )


def queue_lines(difference: dict[str, Any]) -> list[str]:
    """Return what a submission would change in the queue, as lines; empty without a cluster."""
    if not difference:
        return []
    queue = difference["queue"]
    lines = []
    if "jobs" in queue:
        lines.append(f"  to submit: {queue['to_submit']} runs")
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
            f"  {queue['removed']} queued run(s) of this sweep are not asked for by this command "
            "line: prune=true cancels them"
        )
    if "unknown" in queue:
        lines.append(f"  queued runs are unknown: {queue['unknown']}")
    return lines
