"""Batch and length: the largest batch before LoRA is expected to lose too much, least updates."""

import math
from dataclasses import dataclass

from lorasweep.advise.customer import Customer
from lorasweep.advise.kept import Kept
from lorasweep.advise.published import Published
from lorasweep.advise.rules.workload import UPDATES, Workload
from lorasweep.advise.trace import Sure, Trace

SAFE = 32
"""The study's smallest batch by name: there the gap is small, and shrinks as training goes on."""
RL_BATCH = 2048
"""Largest batch in episodes of tinker-cookbook's recipes: 128 problems x 16 samples."""
LARGEST = 4096


@dataclass(frozen=True)
class Batches:
    """Limits of a batch and of a run's length."""

    largest: int
    steps_min: int
    per_doubling: float
    """Change of ln(speed) that was assumed per doubling of the batch."""


def regret_of_batch(batch: int, rows: float, per_doubling: float) -> float:
    """Return what a batch is expected to cost LoRA, in percent of full fine-tuning's gain.

    LoRA is slower by per_doubling x log2(batch / 32), and the loss falls in a straight line over
    the logarithm of the updates, so a factor rho of updates is ln(rho) / ln(updates) of the gain.
    """
    slower = max(0.0, -per_doubling) * max(0.0, math.log2(batch / SAFE))
    return 100 * slower / math.log(max(math.e, rows / batch))


def batches_of(
    c: Customer, work: Workload, kept: Kept, published: Published, trace: Trace
) -> Batches:
    """Return the largest batch and the least updates for a customer's data."""
    least = UPDATES[c.task]
    trace.note(
        "steps_min",
        least,
        "fewer updates leave the rate unsettled: the study saw the best one 1.5 times higher "
        "below 100"
        if c.task == "sft"
        else "shorter runs end before the plateau",
        published.where("tinker_law" if c.task == "sft" else "zhu"),
        Sure.ONCE,
    )
    sizes = [2**k for k in range(13) if 2**k <= LARGEST]
    rows = work.rows
    if c.task == "rl":
        fits = [b for b in sizes if b <= RL_BATCH and (rows is None or rows / b >= least)]
        formula = f"largest power of two up to {RL_BATCH} that leaves {least} updates, in episodes"
        largest = max(fits, default=1)
        trace.note(
            "batch_size_max",
            largest,
            formula,
            published.where("tinker_rl"),
            Sure.ONCE,
            episodes=rows,
        )
        return Batches(largest, least, 0.0)
    effects = [e for _, e in kept.batch_effects]
    worst = min([0.0, *effects])
    assumed = rows if rows is not None else 1000.0 * SAFE
    fits = [b for b in sizes if regret_of_batch(b, assumed, worst) <= c.max_regret]
    largest = max(fits) if effects else SAFE
    trace.note(
        "batch_size_max",
        largest,
        "largest power of two that costs at most max_regret: "
        "100 x effect x log2(batch / 32) / ln(rows / batch); effect is the worst change of "
        "ln(speed) per "
        "doubling of the kept answers",
        "analysis/results: batch_size at "
        + (", ".join(f"{s} {e:+.3f}" for s, e in kept.batch_effects) or "no scale")
        + f". {published.where('study')}, figure 3, has no numbers; no table of it is public",
        Sure.WEAK,
        rows=rows,
        effect=worst,
        max_regret=c.max_regret,
    )
    return Batches(largest, least, worst)
