"""The conditions under which LoRA has no regret, and five habits that the study calls wrong."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from lorasweep.customers.evidence import Case, Sure, Verdict
from lorasweep.customers.rules.batches import SAFE, Batches, regret_of_batch
from lorasweep.customers.rules.capacity import FULL, LAYERS, ROOM, Choice, load_at, trained
from lorasweep.customers.rules.rates import Rate
from lorasweep.customers.rules.workload import Workload
from lorasweep.methods.lora import LoRA
from lorasweep.spec.method import parse_layers

PAPER_RANK = 64
HUGE_BATCH = 512
FULL_RATE = 3.0
"""A planned learning rate this many times below the advised one or more is full fine-tuning's."""
EXCESS = 4
"""A planned rank this many times the recommended one or more is excessive."""


@dataclass(frozen=True)
class Condition:
    """One condition of the regime in which LoRA has no regret."""

    name: str
    state: str
    """met, missed, or unknown."""
    why: str
    evidence: tuple[str, ...]
    sure: Sure

    def plain(self) -> dict[str, Any]:
        """Return it as JSON values."""
        found = {"condition": self.name, "state": self.state, "why": self.why}
        return {**found, "evidence": list(self.evidence), "sure": self.sure.name.lower()}


class Found(NamedTuple):
    """What the other rules found for a customer."""

    work: Workload
    choice: Choice
    rate: Rate
    """LoRA's."""
    batches: Batches


def conditions_of(case: Case, found: Found) -> list[Condition]:
    """Return every condition with its state in the customer's plan, or in what is advised."""
    c, kept = case.customer, case.kept
    regime = kept.about("regime", "low", "fits", "beyond")
    if c.task == "rl":
        regime = kept.about("rl", "rank_1", "top_rank") + kept.about("rl_bits", "tie", "behind")
    layers = kept.about("layers", "attention_worse", "mlp_is_enough")
    rates = kept.about("lr_ratio", "ratio", "ten_times")
    batches = kept.about("batch_size", "penalty", "below_256")
    room = Sure.WEAK if regime else Sure.ONCE
    planned = "met" if c.layers is None or "mlp" in parse_layers(c.layers) else "missed"
    said = f"as advised: {LAYERS}" if c.layers is None else f"planned: {c.layers}"
    table: list[tuple[str, tuple[str, str], list[Verdict], Sure]] = [
        ("capacity for the data", _capacity(case, found), regime, room),
        (
            "adapters on all matrices, the MLP's above all",
            (planned, said),
            layers,
            Sure.PUBLISHED,
        ),
        ("LoRA's own learning rate", _rate(case, found), rates, Sure.ONCE),
        ("a small batch", _batch(case, found), batches, Sure.WEAK),
        ("enough updates", _updates(found), [], Sure.ONCE),
    ]
    return [
        Condition(name, *state, tuple(v.line for v in verdicts), sure)
        for name, state, verdicts, sure in table
    ]


def _capacity(case: Case, found: Found) -> tuple[str, str]:
    rank, work = case.customer.rank or found.choice.rank, found.work
    low, high = (load_at(b, case.model, rank) for b in (work.bits_low, work.bits_high))
    if low is None or high is None:
        return "unknown", "the amount of data is not stated"
    if high <= ROOM:
        return "met", f"load of rank {rank} at most {high:.2g}, at or below {ROOM}"
    if low > FULL:
        return "missed", f"load of rank {rank} at least {low:.2g}, above {FULL:g}"
    return "unknown", f"load of rank {rank} between {low:.2g} and {high:.2g}"


def _rate(case: Case, found: Found) -> tuple[str, str]:
    lr, low, high = case.customer.lr, found.rate.low, found.rate.high
    span = f"{low:.2g} to {high:.2g}"
    if lr is None:
        return "unknown", f"no sweep was run; start within {span}"
    if low <= lr <= high:
        return "met", f"planned {lr:.2g}, within {span}"
    return "missed", f"planned {lr:.2g}, outside {span}"


def _batch(case: Case, found: Found) -> tuple[str, str]:
    batch, most = found.work.batch_size, found.batches.largest
    what = f"{'planned' if case.customer.batch_size else 'as advised'}: {batch:,}"
    if batch > most:
        return "missed", f"{what}, above {most:,}"
    if batch <= SAFE or case.customer.task == "rl":
        return "met", f"{what}, at most {most:,}"
    return "unknown", f"{what}, within {most:,} by results on small models alone"


def _updates(found: Found) -> tuple[str, str]:
    steps, least = found.work.steps, found.batches.steps_min
    if steps is None:
        return "unknown", "the number of updates is not stated"
    return ("met" if steps >= least else "missed"), f"{steps:,} updates, least {least}"


# ---------------------------------------------------------------- habits


def note_habits(case: Case, found: Found) -> None:
    """Warn of each habit in a customer's plan, with its expected cost."""
    _attention_only(case, found)
    _rank_habits(case, found)
    _full_rate(case, found)
    batch, rows = found.work.batch_size, found.work.rows
    if case.customer.task == "sft" and case.customer.batch_size and batch >= HUGE_BATCH:
        cost = regret_of_batch(batch, rows or 1000.0 * batch, found.batches.per_doubling)
        case.warn("large_batch", batch=batch, cost=cost)


def _attention_only(case: Case, found: Found) -> None:
    layers = case.customer.layers
    if layers is None or "mlp" in parse_layers(layers):
        return
    gaps = [e["nats"] for e in case.published.entries("attention_gaps")]
    cost = f"{min(gaps):.3f} to {max(gaps):.3f} nats on 4B and 8B models in public" if gaps else "?"
    here = _cited(case, "layers", "attention_worse")
    share = trained(case.model, found.choice.rank, layers) / trained(case.model, found.choice.rank)
    case.warn("attention_only", layers=layers, cost=cost, share=share, here=here)


def _cited(case: Case, sweep: str, *claims: str) -> str:
    return "; ".join(v.line for v in case.kept.about(sweep, *claims)) or "nothing kept"


def _rank_habits(case: Case, found: Found) -> None:
    rank, advised, model = case.customer.rank, found.choice.rank, case.model
    if rank is None or rank == advised:
        return
    load = load_at(found.work.bits_high, model, rank)
    extra = 2 * (trained(model, rank) - trained(model, advised)) / 2**20
    planned, best = (LoRA(rank=r, layers=LAYERS).step_flops(model, 1) for r in (rank, advised))
    price = f"{extra:+,.0f} MiB an adapter, {planned / best - 1:+.1%} of operations"
    lacks = load is not None and load > ROOM and rank < advised
    room = f"capacity: its load is up to {load:.2g}, and {ROOM} is the most with room to spare"
    if rank == PAPER_RANK:
        wanted = "full fine-tuning" if found.choice.method == "full" else f"rank {advised}"
        case.warn("paper_rank", rank=rank, wanted=wanted, cost=room if lacks else price)
    elif lacks:
        case.warn("low_capacity", rank=rank, cost=room)
    if rank >= EXCESS * advised:
        gain = "; ".join(
            f"{e['model']}: rank 16 to 128 gained {e['gaps'][16]:.4f} nats"
            for e in case.published.entries("rank_gaps")
        )
        words = {"times": rank / advised, "cost": price, "gain": gain or "not known"}
        case.warn(f"high_rank.{case.customer.task}", rank=rank, **words)


def _full_rate(case: Case, found: Found) -> None:
    lr, advised = case.customer.lr, found.rate.rate
    if lr is None or lr > advised / FULL_RATE:
        return
    gaps = case.published.entries("low_rate_gaps") if case.customer.task == "sft" else []
    cost = "; ".join(f"{e['nats']:.3f} nats on {e['model']} at 4e-5" for e in gaps) or "not known"
    here = _cited(case, "recipes", "attention_at_full_lr", "original")
    case.warn("full_rate", lr=lr, times=advised / lr, advised=advised, cost=cost, here=here)
