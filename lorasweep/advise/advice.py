"""The advice for one customer, and for a table of customers."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lorasweep.advise.evidence import Case, Known, Row, Sure, line_of, shown
from lorasweep.advise.read import Customer, Failed, RowError, shape_of
from lorasweep.advise.rules.capacity import FULL, LAYERS, ROOM, Choice, choose, load_at, trained
from lorasweep.advise.rules.costs import Arm, Costs, costs_of, hardware_of
from lorasweep.advise.rules.rates import ALPHA, Rate, rate_of
from lorasweep.advise.rules.workload import (
    SAFE,
    Batches,
    Workload,
    batches_of,
    regret_of_batch,
    workload_of,
)
from lorasweep.errors import SpecError
from lorasweep.methods.lora import LoRA
from lorasweep.spec.method import parse_layers

KEYS = (
    *("name", "method", "layers", "rank", "lr", "lr_low", "lr_high", "lr_source"),
    *("batch_size_max", "steps_min", "load", "gpu", "gpus", "peak_gib_lora", "peak_gib_full"),
    *("flops_ratio", "hours", "cost_usd", "adapter_mib", "serving_gib", "regime", "warnings"),
    *("evidence", "error"),
)
"""Keys of every answer as JSON, also of the answer for a wrong row."""
SURE_OF = (
    *("method", "rank", "layers", "lr", "batch_size_max", "load", "hours_lora", "peak_gib_lora"),
)
"""Fields reported with confidence and source."""
OF_ARM = ("gpus", "fits", "peak_gib", "hours", "cost_usd", "serving_gib")
"""Fields of both methods, such as gpus_lora and gpus_full."""

PAPER_RANK = 64
HUGE_BATCH = 512
FULL_RATE = 3.0
"""Planned learning rates below the advised one by this factor or more suit full fine-tuning."""
EXCESS = 4
"""A planned rank above the advised one by this factor or more is excessive."""
STATES = {True: "met", False: "missed", None: "unknown"}


@dataclass(frozen=True)
class Condition:
    """One condition of the regime without regret; `state`: met, missed or unknown."""

    name: str
    state: str
    why: str
    evidence: tuple[str, ...]
    sure: Sure


@dataclass(frozen=True, kw_only=True)
class Advice(Case):
    """The advice for one customer. If the method is undecided, rate and costs are those of LoRA."""

    work: Workload
    choice: Choice
    lora: Rate
    """LoRA's learning rate."""
    rate: Rate
    """The learning rate of the advised method."""
    batches: Batches
    costs: Costs

    @property
    def name(self) -> str:
        """The customer's name."""
        return self.customer.name

    @property
    def chosen(self) -> Arm:
        """The costs of the advised method."""
        return self.costs.full if self.choice.method == "full" else self.costs.lora

    @cached_property
    def conditions(self) -> list[Condition]:
        """The conditions for LoRA without regret, judged by the plan, else by the advice."""
        return _conditions(self)

    def plain(self) -> dict[str, Any]:
        """Return the advice as JSON values."""
        costs, choice, rate, work = self.costs, self.choice, self.rate, self.work
        arms = {"lora": costs.lora, "full": costs.full}
        both = {f"{key}_{name}": getattr(arm, key) for name, arm in arms.items() for key in OF_ARM}
        reasons = [r for name, r in self.reasons.items() if name in SURE_OF]
        regime = [{**vars(c), "sure": c.sure.name.lower()} for c in self.conditions]
        return {
            "name": self.name,
            "model": self.model.name,
            "task": self.customer.task,
            **vars(choice),
            "layers": LAYERS,
            "alpha": ALPHA,
            **{"lr": rate.rate, "lr_low": rate.low, "lr_high": rate.high, "lr_source": rate.source},
            **{key: getattr(work, key) for key in ("batch_size", "steps", "bits")},
            "batch_size_max": self.batches.largest,
            "steps_min": self.batches.steps_min,
            "gpu": costs.hardware.name,
            **{key: getattr(self.chosen, key) for key in ("gpus", "hours", "cost_usd")},
            "serving_gib": self.chosen.serving_gib,
            "flops_ratio": costs.flops_ratio,
            "adapter_mib": costs.lora.file_mib,
            "model_gib": costs.full.file_mib / 1024,
            **both,
            "regime": [
                {("condition" if k == "name" else k): v for k, v in c.items()} for c in regime
            ],
            "warnings": self.warnings,
            "evidence": list(dict.fromkeys(f"{r.name}: {r.source}" for r in reasons)),
            "sure": {r.name: r.sure.name.lower() for r in reasons},
            "error": None,
        }


def _conditions(a: Advice) -> list[Condition]:
    c, kept, work, rate = a.customer, a.known.kept, a.work, a.lora
    steps, most = work.steps, a.batches.largest
    if c.task == "rl":
        regime = kept.about("rl", "rank_1", "top_rank")
    else:
        regime = kept.about("regime", "low", "fits", "beyond")
    layers = kept.about("layers", "attention_worse", "mlp_is_enough")
    rates = kept.about("lr_ratio", "ratio", "ten_times")
    sizes = kept.about("batch_size", "penalty", "below_256")
    found: list[Condition] = []

    def judge(name: str, met: bool | None, why: str, cited: list[Row], sure: Sure) -> None:
        found.append(Condition(name, STATES[met], why, tuple(map(line_of, cited)), sure))

    rank, load, fits = (
        c.rank or a.choice.rank,
        "not known, as the amount of data is not stated",
        None,
    )
    low, high = (load_at(b, a.model, rank) for b in (work.bits_low, work.bits_high))
    if low is not None and high is not None:
        load = f"{low:.2g} to {high:.2g}; up to {ROOM} surely fits, above {FULL:g} does not"
        fits = True if high <= ROOM else False if low > FULL else None
    sure = Sure.WEAK if regime else Sure.ONCE
    judge("capacity for the data", fits, f"load of rank {rank}: {load}", regime, sure)
    has_mlp = "mlp" in parse_layers(c.layers or LAYERS)
    why = f"{'planned' if c.layers else 'as advised'}: {c.layers or LAYERS}"
    name = "adapters on all matrices, the MLP's above all"
    judge(name, has_mlp, why, layers, Sure.PUBLISHED)
    within = None if c.lr is None else rate.low <= c.lr <= rate.high
    why = "no sweep was run" if c.lr is None else f"planned {c.lr:.2g}"
    why += f"; the sources: {rate.low:.2g} to {rate.high:.2g}"
    judge("LoRA's own learning rate", within, why, rates, Sure.ONCE)
    batch, why = work.batch_size, "planned" if c.batch_size else "as advised"
    small = False if batch > most else True if batch <= SAFE or c.task == "rl" else None
    why += f": {batch:,}, at most {most:,}{' by results on small models only' * (small is None)}"
    judge("a small batch", small, why, sizes, Sure.WEAK)
    enough = None if steps is None else steps >= a.batches.steps_min
    why = f"{shown(steps)}, at least {a.batches.steps_min} needed"
    judge("enough updates", enough, why, [], Sure.ONCE)
    return found


def plain_of(found: Advice | Failed) -> dict[str, Any]:
    """Return an answer as JSON values; the answer for a wrong row has only KEYS."""
    if isinstance(found, Advice):
        return found.plain()
    return {**dict.fromkeys(KEYS), "name": found.name, "warnings": [], "error": found.error}


def advise(c: Customer, known: Known) -> Advice:
    """Advise one customer.

    Raises:
        RowError: model, hardware or data are not known, or the model cannot have the planned rank
            or layers.
    """
    case = Case(c, shape_of(c, known.models), known)
    if c.rank is not None or c.layers is not None:
        layers = c.layers or LAYERS
        smallest = max(1, case.model.n_active_experts) if "mlp" in parse_layers(layers) else 1
        try:
            LoRA(rank=c.rank or smallest, layers=layers).check(case.model)
        except SpecError as error:
            text = str(error).replace("method.", "")
            raise RowError(f"column {'rank' if c.rank else 'layers'}: {text}") from None
    hardware = hardware_of(case)
    work = workload_of(case)
    choice = choose(case, work)
    lora = rate_of(case, "lora", choice.rank, work)
    rate = rate_of(case, "full", choice.rank, work) if choice.method == "full" else lora
    batches = batches_of(case, work)
    costs = costs_of(case, choice.rank, work, hardware)
    found: dict[str, Any] = {"work": work, "choice": choice, "lora": lora, "rate": rate}
    advice = Advice(**vars(case), **found, batches=batches, costs=costs)
    note_habits(advice)
    return advice


def note_habits(a: Advice) -> None:
    """Warn of habits in a customer's plan that the study calls wrong, with their expected cost."""
    c, model, published, work = a.customer, a.model, a.known.published, a.work
    choice, rate = a.choice, a.lora

    def cited(sweep: str, *claims: str) -> str:
        return "; ".join(map(line_of, a.known.kept.about(sweep, *claims))) or "nothing kept"

    if "mlp" not in parse_layers(c.layers or LAYERS):
        gaps = [e["nats"] for e in published.entries("attention_gaps")] or [float("nan")]
        cost = f"{min(gaps):.3f} to {max(gaps):.3f} nats on 4B and 8B models, published"
        share = trained(model, choice.rank, c.layers) / trained(model, choice.rank)
        here = cited("layers", "attention_worse")
        a.warn("attention_only", layers=c.layers, cost=cost, share=share, here=here)
    if c.rank is not None and c.rank != choice.rank:
        load = load_at(work.bits_high, model, c.rank) or 0.0
        lacks = load > ROOM and c.rank < choice.rank
        extra_mib = 2 * (trained(model, c.rank) - trained(model, choice.rank)) / 2**20
        flops = [LoRA(rank=r, layers=LAYERS).step_flops(model, 1) for r in (c.rank, choice.rank)]
        more = f"{flops[0] / flops[1] - 1:+.1%} of operations"
        price = cost = f"{extra_mib:+,.0f} MiB per adapter, {more}"
        if lacks:
            cost = f"capacity: its load is up to {load:.2g}, above {ROOM}"
        if c.rank == PAPER_RANK:
            wanted = "full fine-tuning" if choice.method == "full" else f"rank {choice.rank}"
            a.warn("paper_rank", rank=c.rank, wanted=wanted, cost=cost)
        elif lacks:
            a.warn("low_capacity", rank=c.rank, cost=cost)
        if c.rank >= EXCESS * choice.rank:
            gain = "; ".join(
                f"{e['model']}: rank 16 to 128 gained {e['gaps'][16]:.4f} nats"
                for e in published.entries("rank_gaps")
            )
            words = {"times": c.rank / choice.rank, "cost": price, "gain": gain or "not known"}
            a.warn(f"high_rank.{c.task}", rank=c.rank, **words)
    if c.lr is not None and c.lr < rate.low and c.lr <= rate.rate / FULL_RATE:
        entries = published.entries("low_rate_gaps") if c.task == "sft" else []
        cost = "; ".join(f"{e['nats']:.3f} nats on {e['model']} at 4e-5" for e in entries)
        here = cited("recipes", "attention_at_full_lr", "original")
        words = {"times": rate.rate / c.lr, "advised": rate.rate, "cost": cost or "not known"}
        a.warn("full_rate", lr=c.lr, here=here, **words)
    elif c.lr is not None and c.lr > rate.high:
        a.warn("high_rate", lr=c.lr, advised=rate.rate, high=rate.high)
    batch = work.batch_size
    if c.task == "sft" and c.batch_size and batch >= HUGE_BATCH:
        regret = regret_of_batch(batch, work.rows or 1000.0 * batch, a.batches.per_doubling)
        a.warn("large_batch", batch=batch, cost=regret)


def answers(customers: Iterable[Customer | Failed], known: Known) -> list[Advice | Failed]:
    """Advise every customer; an error does not affect other customers."""
    found: list[Advice | Failed] = []
    for c in customers:
        try:
            found.append(c if isinstance(c, Failed) else advise(c, known))
        except RowError as error:
            found.append(Failed(c.where, c.name, error.problems))
    return found


def totals(found: Sequence[Advice | Failed]) -> dict[str, Any]:
    """Count customers by method, and add up the costs as advised, with LoRA and with FullFT."""
    good = [a for a in found if isinstance(a, Advice)]
    counts = Counter(a.choice.method for a in good)
    both = [a for a in good if None not in (a.costs.lora.cost_usd, a.costs.full.cost_usd)]
    bases = {a.model: a.costs.full.file_mib for a in good}
    adapters = sum(a.customer.adapters_served * a.costs.lora.file_mib for a in good)
    return {
        "customers": len(found),
        **{method: counts[method] for method in ("lora", "full", "open")},
        "errors": len(found) - len(good),
        "cost_usd": sum((a.chosen.cost_usd or 0.0 for a in good), 0.0),
        "comparable": len(both),
        "cost_usd_of_these": sum((a.chosen.cost_usd or 0.0 for a in both), 0.0),
        "cost_usd_lora": sum((a.costs.lora.cost_usd or 0.0 for a in both), 0.0),
        "cost_usd_full": sum((a.costs.full.cost_usd or 0.0 for a in both), 0.0),
        "serving_gib_lora": (sum(bases.values()) + adapters) / 1024,
        "serving_gib_full": sum(a.costs.full.serving_gib for a in good),
    }
