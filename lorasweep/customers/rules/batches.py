"""Batch and length: the largest batch before LoRA is expected to lose too much, least updates."""

import math
from dataclasses import dataclass

from lorasweep.customers.evidence import Case
from lorasweep.customers.rules.workload import UPDATES, Workload

SAFE = 32
"""The study's smallest batch by name: there the gap is small, and shrinks during training."""
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
    """Return LoRA's expected regret of a batch, in percent of full fine-tuning's gain.

    LoRA is slower by per_doubling x log2(batch / 32), and the loss falls in a straight line over
    the logarithm of the updates, so a factor rho of updates is ln(rho) / ln(updates) of the gain.
    """
    slower = max(0.0, -per_doubling) * max(0.0, math.log2(batch / SAFE))
    return 100 * slower / math.log(max(math.e, rows / batch))


def batches_of(case: Case, work: Workload) -> Batches:
    """Return the largest batch and the least updates for a customer's data."""
    c, rows = case.customer, work.rows
    least = UPDATES[c.task]
    case.note("steps_min", least, c.task)
    sizes = [2**k for k in range(13) if 2**k <= LARGEST]
    if c.task == "rl":
        fits = [b for b in sizes if b <= RL_BATCH and (rows is None or rows / b >= least)]
        largest = max(fits, default=1)
        case.note("batch_size_max", largest, "rl", {"episodes": rows}, most=RL_BATCH, least=least)
        return Batches(largest, least, 0.0)
    effects = case.kept.batch_effects
    worst = min([0.0, *(e for _, e in effects)])
    assumed = rows if rows is not None else 1000.0 * SAFE
    fits = [b for b in sizes if regret_of_batch(b, assumed, worst) <= c.max_regret]
    largest = max(fits) if effects else SAFE
    inputs = {"rows": rows, "effect": worst, "max_regret": c.max_regret}
    scales = ", ".join(f"{s} {e:+.3f}" for s, e in effects) or "no scale"
    case.note("batch_size_max", largest, "sft", inputs, scales=scales)
    return Batches(largest, least, worst)
