"""The conditions under which LoRA loses nothing, and five habits that the study calls wrong."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lorasweep.advise.customer import Customer
from lorasweep.advise.kept import Kept, Verdict
from lorasweep.advise.published import Published
from lorasweep.advise.rules.batches import SAFE, Batches, regret_of_batch
from lorasweep.advise.rules.capacity import FULL, LAYERS, ROOM, Choice, load_at, trained
from lorasweep.advise.rules.rates import Rate
from lorasweep.advise.rules.workload import Workload
from lorasweep.advise.trace import Sure
from lorasweep.methods.lora import LoRA
from lorasweep.spec.method import parse_layers
from lorasweep.spec.model import ModelSpec

PAPER_RANK = 64
HUGE_BATCH = 512
FULL_RATE = 3.0
"""A planned rate this many times below the advised one or more is full fine-tuning's."""
EXCESS = 4
"""A planned rank this many times the recommended one or more is higher than is of use."""


@dataclass(frozen=True)
class Condition:
    """One condition of the regime in which LoRA gives up nothing."""

    name: str
    state: str
    """met, missed, or unknown."""
    why: str
    evidence: tuple[str, ...]
    sure: Sure

    def plain(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "condition": self.name,
            "state": self.state,
            "why": self.why,
            "evidence": list(self.evidence),
            "sure": self.sure.name.lower(),
        }


@dataclass(frozen=True)
class Case:
    """All that was found of one customer, as conditions and habits need it."""

    customer: Customer
    model: ModelSpec
    work: Workload
    choice: Choice
    rate: Rate
    """LoRA's."""
    batches: Batches


def conditions_of(case: Case, kept: Kept, published: Published) -> list[Condition]:
    """Return every condition with its state in the customer's plan, or in what is advised."""
    c, work = case.customer, case.work
    rank = c.rank or case.choice.rank
    low, high = (load_at(b, case.model, rank) for b in (work.bits_low, work.bits_high))
    if low is None or high is None:
        capacity = "unknown", "how much is new is not stated"
    elif high <= ROOM:
        capacity = "met", f"load of rank {rank} at most {high:.2g}, at or below {ROOM}"
    elif low > FULL:
        capacity = "missed", f"load of rank {rank} at least {low:.2g}, above {FULL:g}"
    else:
        capacity = "unknown", f"load of rank {rank} between {low:.2g} and {high:.2g}"
    regime = kept.about("regime", "low", "fits", "beyond")
    if c.task == "rl":
        regime = kept.about("rl", "rank_1", "top_rank") + kept.about("rl_bits", "tie", "behind")
    weak, once = Sure.WEAK, Sure.ONCE
    return [
        Condition("room for what is new", *capacity, _lines(regime), weak if regime else once),
        Condition(
            "adapters on all matrices, the MLP's above all",
            *_layers_state(c),
            _lines(kept.about("layers", "attention_worse", "mlp_is_enough")),
            Sure.PUBLISHED,
        ),
        Condition(
            "LoRA's own learning rate",
            *_rate_state(c, case.rate),
            _lines(kept.about("lr_ratio", "ratio", "ten_times")),
            once,
        ),
        Condition(
            "a small batch",
            *_batch_state(case),
            _lines(kept.about("batch_size", "penalty", "below_256")),
            weak,
        ),
        Condition("enough updates", *_updates_state(case), (), once),
    ]


def _lines(verdicts: list[Verdict]) -> tuple[str, ...]:
    return tuple(v.line for v in verdicts)


def _layers_state(c: Customer) -> tuple[str, str]:
    if c.layers is None:
        return "met", f"as advised: {LAYERS}"
    sets = parse_layers(c.layers)
    if "mlp" not in sets:
        return "missed", f"planned: {c.layers}"
    return "met", f"planned: {c.layers}"


def _rate_state(c: Customer, rate: Rate) -> tuple[str, str]:
    span = f"{rate.low:.2g} to {rate.high:.2g}"
    if c.lr is None:
        return "unknown", f"no sweep was run; start within {span}"
    if rate.low <= c.lr <= rate.high:
        return "met", f"planned {c.lr:.2g}, within {span}"
    return "missed", f"planned {c.lr:.2g}, outside {span}"


def _batch_state(case: Case) -> tuple[str, str]:
    batch, most = case.work.batch_size, case.batches.largest
    what = "planned" if case.customer.batch_size else "as advised"
    if batch > most:
        return "missed", f"{what}: {batch:,}, above {most:,}"
    if batch <= SAFE or case.customer.task == "rl":
        return "met", f"{what}: {batch:,}, at most {most:,}"
    return "unknown", f"{what}: {batch:,}, within {most:,} by small models' answers alone"


def _updates_state(case: Case) -> tuple[str, str]:
    steps, least = case.work.steps, case.batches.steps_min
    if steps is None:
        return "unknown", "how many updates there are is not stated"
    return ("met" if steps >= least else "missed"), f"{steps:,} updates, least {least}"


# ---------------------------------------------------------------- habits


def habits_of(case: Case, kept: Kept, published: Published) -> Iterator[str]:
    """Yield for each wrong habit in the customer's plan what it is expected to cost."""
    yield from _attention_only(case, kept, published)
    yield from _rank_habits(case, published)
    yield from _full_rate(case, kept, published)
    yield from _large_batch(case)


def _attention_only(case: Case, kept: Kept, published: Published) -> Iterator[str]:
    c = case.customer
    if c.layers is None or "mlp" in parse_layers(c.layers):
        return
    gaps = [e["nats"] for e in published.entries("attention_gaps")]
    cost = f"{min(gaps):.3f} to {max(gaps):.3f} nats on 4B and 8B models in public" if gaps else "?"
    here = "; ".join(v.line for v in kept.about("layers", "attention_worse"))
    n = trained(case.model, case.choice.rank, c.layers)
    yield (
        f"habit: adapters on {c.layers} alone. Expected cost: {cost} (the answers' accuracy "
        "often does "
        f"not tell), and {n / trained(case.model, case.choice.rank):.0%} of the capacity at one "
        "rank. "
        f"Measured here: {here or 'nothing kept'}"
    )


def _rank_habits(case: Case, published: Published) -> Iterator[str]:
    rank, advised = case.customer.rank, case.choice.rank
    if rank is None or rank == advised:
        return
    model, load = case.model, load_at(case.work.bits_high, case.model, rank)
    lacks = load is not None and load > ROOM and rank < advised
    extra = 2 * (trained(model, rank) - trained(model, advised)) / 2**20
    ratio = LoRA(rank=rank, layers=LAYERS).step_flops(model, 1)
    ratio /= LoRA(rank=advised, layers=LAYERS).step_flops(model, 1)
    price = f"{extra:+,.0f} MiB an adapter, {ratio - 1:+.1%} of operations"
    room = (
        f"room: its load is up to {load:.2g}, and {ROOM} counts as room to spare" if lacks else ""
    )
    if rank == PAPER_RANK:
        wanted = "full fine-tuning" if case.choice.method == "full" else f"rank {advised}"
        yield (
            f"habit: rank {PAPER_RANK} because a paper says so. The data ask for {wanted}; "
            f"expected cost: {room or price}"
        )
    elif lacks:
        yield f"planned rank {rank} may lack {room}"
    if rank >= EXCESS * advised:
        gain = "; ".join(
            f"{e['model']}: rank 16 to 128 gained {e['gaps'][16]:.4f} nats"
            for e in published.entries("rank_gaps")
        )
        rl = case.customer.task == "rl"
        risk = ". In RL, ranks of 128 and more collapsed at shared rates" if rl else ""
        yield (
            f"habit: a higher rank is better. Rank {rank} is {rank / advised:g} times the rank "
            f"with room; expected cost: {price}; to gain: {gain or 'not known'}{risk}"
        )


def _full_rate(case: Case, kept: Kept, published: Published) -> Iterator[str]:
    lr = case.customer.lr
    if lr is None or lr > case.rate.rate / FULL_RATE:
        return
    gaps = published.entries("low_rate_gaps") if case.customer.task == "sft" else []
    cost = "; ".join(f"{e['nats']:.3f} nats on {e['model']} at 4e-5" for e in gaps)
    here = "; ".join(v.line for v in kept.about("recipes", "attention_at_full_lr", "original"))
    yield (
        f"habit: full fine-tuning's rate for LoRA. {lr:.2g} is {case.rate.rate / lr:.2g} times "
        "below "
        f"{case.rate.rate:.2g}; expected cost: {cost or 'not known'}. Measured here, with other "
        "habits "
        f"beside it, as a share of the gain: {here or 'nothing kept'}"
    )


def _large_batch(case: Case) -> Iterator[str]:
    batch, rows = case.work.batch_size, case.work.rows
    if case.customer.task == "rl" or case.customer.batch_size is None or batch < HUGE_BATCH:
        return
    cost = regret_of_batch(batch, rows or 1000.0 * batch, case.batches.per_doubling)
    yield (
        f"habit: a batch of {batch:,}. Expected cost: up to {cost:.2g}% of the gain (worst of "
        "the kept "
        f"answers, on small models); full fine-tuning does best at small batches too"
    )
