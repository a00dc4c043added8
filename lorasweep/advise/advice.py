"""The advice for one customer, and for a table of customers, with the costs of both methods."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

from lorasweep.advise import rules
from lorasweep.advise.read import Customer, RowError, shape_of
from lorasweep.advise.rules import FULL, ROOM, Advice, Arm, Known, shown
from lorasweep.errors import SpecError, unknown
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.plan.detect import Hardware
from lorasweep.plan.needs import load_of, served_s, step_parts, step_seconds
from lorasweep.plan.planner import MEMORY_ERROR, MOST_GPUS, SPEED_ERROR, Placement, place
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.method import Method, parse_layers
from lorasweep.spec.model import ModelSpec
from lorasweep.spec.recommended import LAYERS
from lorasweep.spec.run import RunSpec

PAPER_RANK, HUGE_BATCH = 64, 512
FULL_RATE = 3.0
"""Planned learning rates below the advised one by this factor or more suit full fine-tuning."""
EXCESS = 4
"""A planned rank above the advised one by this factor or more is excessive."""
WORD = 2
"""Bytes of a weight in served and shipped models, which are in bf16."""
NOT_FASTER = 0.95
"""LoRA counts as not faster above this share of full fine-tuning's GPU time."""


def plain_of(a: Advice | RowError) -> dict[str, Any]:
    """Return an answer as JSON values."""
    if isinstance(a, RowError):
        return {"name": a.name, "error": a.error}
    arms = {"lora": a.lora, "full": a.full}
    of_arm = ("gpus", "fits", "peak_gib", "hours", "cost_usd", "serving_gib")
    return {
        "name": a.name,
        "model": a.model.name,
        "task": a.customer.task,
        **{key: getattr(a, key) for key in ("method", "rank", "load", "by", "why")},
        "layers": a.known.layers,
        "alpha": rules.ALPHA,
        **dict(zip(("lr", "lr_low", "lr_high", "lr_source"), a.rate, strict=True)),
        **{key: getattr(a, key) for key in ("batch_size", "steps")},
        "bits": a.bits and a.bits[0],
        "batch_size_max": a.largest_batch,
        "steps_min": rules.UPDATES[a.customer.task],
        "gpu": a.hardware.name,
        **{k: getattr(a.chosen, k) for k in ("gpus", "hours", "cost_usd", "serving_gib")},
        "adapter_mib": a.lora.file_mib,
        "model_gib": a.full.file_mib / 1024,
        **{f"{key}_{name}": getattr(arm, key) for name, arm in arms.items() for key in of_arm},
        "regime": a.conditions,
        "warnings": a.warnings,
        "error": None,
    }


def advise(c: Customer, known: Known) -> Advice:
    """Advise one customer.

    Raises:
        RowError: model, hardware or data are not known, or the model cannot have the planned rank
            or layers.
    """
    a = Advice(c, shape_of(c, known.models), known, _hardware_of(c, known))
    if c.rank is not None or c.layers is not None:
        layers = c.layers or known.layers
        smallest = max(1, a.model.n_active_experts) if "mlp" in parse_layers(layers) else 1
        try:
            LoRA(rank=c.rank or smallest, layers=layers).check(a.model)
        except SpecError as error:
            text = str(error).replace("method.", "")
            raise RowError(f"column {'rank' if c.rank else 'layers'}: {text}") from None
    rules.count_data(a)
    rules.choose(a)
    a.lora_rate = a.rate = rules.rate_of(a, "lora")
    if a.method == "full":
        a.rate = rules.rate_of(a, "full")
    rules.limit_batch(a)
    a.lora, a.full = _arm(a, a.rank), _arm(a, 0)
    gpu_s = [arm.step_s * arm.gpus if arm.step_s and arm.gpus else 0 for arm in (a.lora, a.full)]
    if gpu_s[1] and gpu_s[0] > NOT_FASTER * gpu_s[1]:
        a.warn("not_faster", times=gpu_s[0] / gpu_s[1])
    if c.task == "rl" and (a.lora.hours or a.full.hours):
        a.warn("with_sampling")
    a.conditions = _conditions(a)
    _judge_habits(a)
    return a


# ---------------------------------------------------------------- costs


def _hardware_of(c: Customer, known: Known) -> Hardware:
    """Return a customer's hardware; RowError: it is unknown, or no speed of a GPU is known."""
    name = (c.hardware or "h100").lower()
    if c.hardware is None and known.hardware is not None:
        found = known.hardware
    elif name in known.machines:
        found = known.machines[name]()
    else:
        raise RowError(
            f"column hardware: {unknown('hardware', name, known.machines)} Your own card is a file "
            "in DIR/hardware with --config-dir DIR."
        )
    if not found.has_speeds:
        raise RowError(f"column hardware: {found.name} has no GPU whose speed is known.")
    return replace(found, price_per_gpu_h=c.price_per_gpu_h or found.price_per_gpu_h)


def _arm(a: Advice, rank: int) -> Arm:
    """Return the costs of LoRA at a rank (0: full fine-tuning); record reasons and warnings."""
    c, base, hardware = a.customer, a.model.n_params, a.hardware
    model = replace(a.model, weights_dtype="bf16")  # frozen weights on GPUs
    n = a.trained(rank) if rank else base
    served = base * bool(rank) + c.adapters_served * n
    arm = Arm(WORD * n / 2**20, WORD * served / 2**30)
    price, unpriced = hardware.price_per_gpu_h, replace(hardware, price_per_gpu_h=None)
    place_on = partial(_place, model, a.batch_size, a.max_length, unpriced, _method(a, rank))
    found = place_on(None)
    if not found.why:  # use all available GPUs if they hold the run
        gpus = found.layout.gpus
        while 2 * gpus <= (c.gpus or 1) and a.batch_size % (2 * gpus) == 0:
            gpus *= 2
        found = place_on(gpus)
    name, method = ("lora", "LoRA") if rank else ("full", "full fine-tuning")
    if found.why:
        remedy = found.remedy.replace("dataset.", "")
        a.warn("no_fit", method=method, why=f"{found.why}. Give {remedy}")
    else:
        arm.gpus = gpus = found.layout.gpus
        arm.fits, arm.peak_gib = gpus <= (c.gpus or MOST_GPUS), found.memory_gib
        parts = step_parts(load_of(model, _method(a, rank)), found.layout, a.row_tokens, hardware)
        arm.step_s = step_seconds(parts)
        if c.task == "rl":  # a serving engine on the same GPUs samples an update's completions
            group = min(rules.GROUP, a.batch_size)
            lengths = (a.row_tokens - a.tokens, a.tokens)
            arm.step_s += served_s(model, hardware, gpus, a.batch_size, group, *lengths)
        if a.steps is not None:
            arm.hours = arm.step_s * a.steps / 3600
            arm.cost_usd = None if price is None else arm.hours * gpus * price
        if not arm.fits:
            available = f"{c.gpus} {'is' if c.gpus == 1 else 'are'}"
            words = {"gpus": gpus, "card": hardware.name, "available": available}
            a.warn("too_few_gpus", method=method, **words)
    batch = {"trained": n, "rows_an_update": a.batch_size, "max_length": a.max_length}
    steps = {"updates": a.steps, "seconds": arm.step_s, "tokens_a_row": a.row_tokens}
    sampled = "; and sampling by a serving engine, at best" if c.task == "rl" else ""
    words = {"card": hardware.name, "error": SPEED_ERROR, "sampled": sampled}
    shipped = {"adapters_served": c.adapters_served, "mib_each": arm.file_mib}
    a.note(f"peak_gib_{name}", arm.peak_gib, name, batch, error=MEMORY_ERROR)
    a.note(f"hours_{name}", arm.hours, "", {**steps, "gpus": arm.gpus}, **words)
    a.note(f"cost_usd_{name}", arm.cost_usd, "", {"price_per_gpu_h": price}, **words)
    a.note(f"serving_gib_{name}", arm.serving_gib, name, shipped)
    return arm


def _method(a: Advice, rank: int) -> Method:
    """Return LoRA at a rank; rank 0 stands for full fine-tuning."""
    return LoRA(rank=rank, layers=a.known.layers) if rank else FullFT()


@lru_cache(maxsize=4096)
def _place(
    model: ModelSpec, batch: int, length: int, hardware: Hardware, method: Method, gpus: int | None
) -> Placement:
    """Place one method on `gpus` GPUs; None: on the fewest that hold the run."""
    dataset = DatasetSpec(name="customer", source="jsonl", location="customer", max_length=length)
    spec = RunSpec(model=model, dataset=dataset, method=method, batch_size=batch, precision="bf16")
    return place(spec, hardware, gpus=gpus, checkpointing=(False, True))


# ---------------------------------------------------------------- conditions and habits


def _conditions(a: Advice) -> list[dict[str, str]]:
    """Judge the study's conditions by the plan, else by the advice."""
    c, rate, batch, most = a.customer, a.lora_rate, a.batch_size, a.largest_batch
    rank, layers, least = c.rank or a.rank, c.layers or a.known.layers, rules.UPDATES[c.task]
    loads, load, fits = a.load_at(rank), "not known, as the amount of data is not stated", None
    if loads is not None:
        _, low, high = loads
        load = f"{low:.2g} to {high:.2g}; up to {ROOM} surely fits, above {FULL:g} does not"
        fits = True if high <= ROOM else False if low > FULL else None
    within = None if c.lr is None else rate.low <= c.lr <= rate.high
    rates = "no sweep was run" if c.lr is None else f"planned {c.lr:.2g}"
    rates += f"; the sources: {rate.low:.2g} to {rate.high:.2g}"
    adapted = f"{'planned' if c.layers else 'as advised'}: {layers}"
    mlp = "mlp" in parse_layers(layers)
    small = False if batch > most else True if batch <= rules.SAFE or c.task == "rl" else None
    size = f"{'planned' if c.batch_size else 'as advised'}: {batch:,}, at most {most:,}"
    size += " by results on small models only" * (small is None)
    enough = None if a.steps is None else a.steps >= least
    found = (
        ("capacity for the data", fits, f"load of rank {rank}: {load}"),
        ("adapters on all matrices, the MLP's above all", mlp, adapted),
        ("LoRA's own learning rate", within, rates),
        ("a small batch", small, size),
        ("enough updates", enough, f"{shown(a.steps)}, at least {least} needed"),
    )
    states = {True: "met", False: "missed", None: "unknown"}
    return [{"condition": name, "state": states[met], "why": why} for name, met, why in found]


def _judge_habits(a: Advice) -> None:
    """Warn of habits in a customer's plan that the study calls wrong, with their expected cost."""
    c, model, published, rate = a.customer, a.model, a.known.published, a.lora_rate
    if "mlp" not in parse_layers(c.layers or LAYERS):
        gaps = [e["nats"] for e in published["attention_gaps"]] or [float("nan")]
        cost = f"{min(gaps):.3f} to {max(gaps):.3f} nats on 4B and 8B models, published"
        share = a.trained(a.rank, c.layers or "") / a.trained(a.rank, LAYERS)
        a.warn("attention_only", layers=c.layers, cost=cost, share=share)
    if c.rank is not None and c.rank != a.rank:
        loads = a.load_at(c.rank)
        lacks = loads is not None and loads[2] > ROOM and c.rank < a.rank
        extra_mib = 2 * (a.trained(c.rank) - a.trained(a.rank)) / 2**20
        more = _method(a, c.rank).step_flops(model, 1) / _method(a, a.rank).step_flops(model, 1) - 1
        price = cost = f"{extra_mib:+,.0f} MiB per adapter, {more:+.1%} of operations"
        if loads is not None and lacks:
            cost = f"capacity: its load is up to {loads[2]:.2g}, above {ROOM}"
        if c.rank == PAPER_RANK:
            wanted = "full fine-tuning" if a.method == "full" else f"rank {a.rank}"
            a.warn("paper_rank", rank=c.rank, wanted=wanted, cost=cost)
        elif lacks:
            a.warn("low_capacity", rank=c.rank, cost=cost)
        if c.rank >= EXCESS * a.rank:
            gain = "; ".join(
                f"{e['model']}: rank 16 to 128 gained {e['gaps'][16]:.4f} nats"
                for e in published["rank_gaps"]
            )
            words = {"times": c.rank / a.rank, "cost": price, "gain": gain or "not known"}
            a.warn(f"high_rank.{c.task}", rank=c.rank, **words)
    if c.lr is not None and c.lr < rate.low and c.lr <= rate.rate / FULL_RATE:
        entries = published["low_rate_gaps"] if c.task == "sft" else []
        cost = "; ".join(f"{e['nats']:.3f} nats on {e['model']} at 4e-5" for e in entries)
        words = {"times": rate.rate / c.lr, "advised": rate.rate, "cost": cost or "not known"}
        a.warn("full_rate", lr=c.lr, **words)
    elif c.lr is not None and c.lr > rate.high:
        a.warn("high_rate", lr=c.lr, advised=rate.rate, high=rate.high)
    if c.task == "sft" and c.batch_size and c.batch_size >= HUGE_BATCH:
        regret = rules.regret_of_batch(c.batch_size, a.rows or 1000.0 * c.batch_size, a.effect)
        a.warn("large_batch", batch=c.batch_size, cost=regret)


# ---------------------------------------------------------------- a table


def answers(customers: Iterable[Customer | RowError], known: Known) -> list[Advice | RowError]:
    """Advise every customer; an error does not affect other customers."""
    found: list[Advice | RowError] = []
    for c in customers:
        try:
            found.append(c if isinstance(c, RowError) else advise(c, known))
        except RowError as error:
            found.append(RowError(*error.problems, where=c.where, name=c.name))
    return found


def totals(found: Sequence[Advice | RowError]) -> dict[str, Any]:
    """Count customers by method, and add up the costs as advised, with LoRA and with FullFT."""
    good = [a for a in found if isinstance(a, Advice)]
    counts = Counter(a.method for a in good)
    both = [a for a in good if None not in (a.lora.cost_usd, a.full.cost_usd)]
    bases = {a.model: a.full.file_mib for a in good}
    adapters = sum(a.customer.adapters_served * a.lora.file_mib for a in good)
    return {
        "customers": len(found),
        **{method: counts[method] for method in ("lora", "full", "open")},
        "errors": len(found) - len(good),
        "cost_usd": sum((a.chosen.cost_usd or 0.0 for a in good), 0.0),
        "comparable": len(both),
        "cost_usd_of_these": sum((a.chosen.cost_usd or 0.0 for a in both), 0.0),
        "cost_usd_lora": sum((a.lora.cost_usd or 0.0 for a in both), 0.0),
        "cost_usd_full": sum((a.full.cost_usd or 0.0 for a in both), 0.0),
        "serving_gib_lora": (sum(bases.values()) + adapters) / 1024,
        "serving_gib_full": sum(a.full.serving_gib for a in good),
    }
