"""The conditions for LoRA without regret, and five habits that the study calls wrong."""

from dataclasses import dataclass

from lorasweep.advise.evidence import Case, Row, Sure, line_of
from lorasweep.advise.rules.capacity import FULL, LAYERS, ROOM, Choice, load_at, trained
from lorasweep.advise.rules.rates import Rate
from lorasweep.advise.rules.workload import SAFE, Batches, Workload, regret_of_batch
from lorasweep.methods.lora import LoRA
from lorasweep.spec.method import parse_layers

PAPER_RANK = 64
HUGE_BATCH = 512
FULL_RATE = 3.0
"""Planned learning rates below the advised one by this factor or more suit full fine-tuning."""
EXCESS = 4
"""A planned rank above the advised one by this factor or more is excessive."""


@dataclass(frozen=True)
class Condition:
    """One condition of the regime without regret; `state`: met, missed or unknown."""

    name: str
    state: str
    why: str
    evidence: tuple[str, ...]
    sure: Sure


def conditions_of(
    case: Case, work: Workload, choice: Choice, rate: Rate, batches: Batches
) -> list[Condition]:
    """Judge the conditions by the customer's plan, else by the advice; `rate`: LR of LoRA."""
    c, kept = case.customer, case.known.kept
    regime = kept.about("regime", "low", "fits", "beyond")
    if c.task == "rl":
        regime = kept.about("rl", "rank_1", "top_rank") + kept.about("rl_bits", "tie", "behind")
    room = Sure.WEAK if regime else Sure.ONCE

    rank, span = c.rank or choice.rank, f"{rate.low:.2g} to {rate.high:.2g}"
    low, high = (load_at(b, case.model, rank) for b in (work.bits_low, work.bits_high))
    if low is None or high is None:
        capacity = "unknown", "the amount of data is not stated"
    elif high <= ROOM:
        capacity = "met", f"load of rank {rank} at most {high:.2g}, at or below {ROOM}"
    elif low > FULL:
        capacity = "missed", f"load of rank {rank} at least {low:.2g}, above {FULL:g}"
    else:
        capacity = "unknown", f"load of rank {rank} between {low:.2g} and {high:.2g}"

    if c.layers is None:
        matrices = "met", f"as advised: {LAYERS}"
    else:
        matrices = "met" if "mlp" in parse_layers(c.layers) else "missed", f"planned: {c.layers}"

    if c.lr is None:
        own_rate = "unknown", f"no sweep was run; start within {span}"
    elif rate.low <= c.lr <= rate.high:
        own_rate = "met", f"planned {c.lr:.2g}, within {span}"
    else:
        own_rate = "missed", f"planned {c.lr:.2g}, outside {span}"

    batch, most = work.batch_size, batches.largest
    what = f"{'planned' if c.batch_size else 'as advised'}: {batch:,}"
    if batch > most:
        small = "missed", f"{what}, above {most:,}"
    elif batch <= SAFE or c.task == "rl":
        small = "met", f"{what}, at most {most:,}"
    else:
        small = "unknown", f"{what}, at most {most:,} by results on small models only"

    if work.steps is None:
        enough = "unknown", "the number of updates is not stated"
    else:
        state = "met" if work.steps >= batches.steps_min else "missed"
        enough = state, f"{work.steps:,} updates, at least {batches.steps_min} needed"

    layers = kept.about("layers", "attention_worse", "mlp_is_enough")
    rates = kept.about("lr_ratio", "ratio", "ten_times")
    sizes = kept.about("batch_size", "penalty", "below_256")
    table: list[tuple[str, tuple[str, str], list[Row], Sure]] = [
        ("capacity for the data", capacity, regime, room),
        ("adapters on all matrices, the MLP's above all", matrices, layers, Sure.PUBLISHED),
        ("LoRA's own learning rate", own_rate, rates, Sure.ONCE),
        ("a small batch", small, sizes, Sure.WEAK),
        ("enough updates", enough, [], Sure.ONCE),
    ]
    return [
        Condition(name, *state, tuple(map(line_of, verdicts)), sure)
        for name, state, verdicts, sure in table
    ]


# ---------------------------------------------------------------- habits


def note_habits(case: Case, work: Workload, choice: Choice, rate: Rate, batches: Batches) -> None:
    """Warn of habits in a customer's plan, with the expected cost of each; `rate`: LR of LoRA."""
    c, model, published = case.customer, case.model, case.known.published

    def cited(sweep: str, *claims: str) -> str:
        return (
            "; ".join(line_of(v) for v in case.known.kept.about(sweep, *claims)) or "nothing kept"
        )

    if c.layers is not None and "mlp" not in parse_layers(c.layers):
        gaps, cost = [e["nats"] for e in published.entries("attention_gaps")], "?"
        if gaps:
            cost = f"{min(gaps):.3f} to {max(gaps):.3f} nats on 4B and 8B models, published"
        share = trained(model, choice.rank, c.layers) / trained(model, choice.rank)
        here = cited("layers", "attention_worse")
        case.warn("attention_only", layers=c.layers, cost=cost, share=share, here=here)
    if c.rank is not None and c.rank != choice.rank:
        load = load_at(work.bits_high, model, c.rank)
        lacks = load is not None and load > ROOM and c.rank < choice.rank
        room = f"capacity: its load is up to {load or 0:.2g}, above {ROOM}"
        extra_mib = 2 * (trained(model, c.rank) - trained(model, choice.rank)) / 2**20
        flops = [LoRA(rank=r, layers=LAYERS).step_flops(model, 1) for r in (c.rank, choice.rank)]
        more = flops[0] / flops[1] - 1
        price = f"{extra_mib:+,.0f} MiB per adapter, {more:+.1%} of operations"
        if c.rank == PAPER_RANK:
            wanted = "full fine-tuning" if choice.method == "full" else f"rank {choice.rank}"
            case.warn("paper_rank", rank=c.rank, wanted=wanted, cost=room if lacks else price)
        elif lacks:
            case.warn("low_capacity", rank=c.rank, cost=room)
        if c.rank >= EXCESS * choice.rank:
            gain = "; ".join(
                f"{e['model']}: rank 16 to 128 gained {e['gaps'][16]:.4f} nats"
                for e in published.entries("rank_gaps")
            )
            words = {"times": c.rank / choice.rank, "cost": price, "gain": gain or "not known"}
            case.warn(f"high_rank.{c.task}", rank=c.rank, **words)
    if c.lr is not None and c.lr < rate.low and c.lr <= rate.rate / FULL_RATE:
        entries = published.entries("low_rate_gaps") if c.task == "sft" else []
        costs = [f"{e['nats']:.3f} nats on {e['model']} at 4e-5" for e in entries]
        here, cost = cited("recipes", "attention_at_full_lr", "original"), "; ".join(costs)
        words = {"times": rate.rate / c.lr, "advised": rate.rate, "cost": cost or "not known"}
        case.warn("full_rate", lr=c.lr, here=here, **words)
    elif c.lr is not None and c.lr > rate.high:
        case.warn("high_rate", lr=c.lr, advised=rate.rate, high=rate.high)
    batch = work.batch_size
    if c.task == "sft" and c.batch_size and batch >= HUGE_BATCH:
        regret = regret_of_batch(batch, work.rows or 1000.0 * batch, batches.per_doubling)
        case.warn("large_batch", batch=batch, cost=regret)
