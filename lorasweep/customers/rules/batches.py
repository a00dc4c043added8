"""Batch and length: the largest batch before LoRA is expected to lose too much, least updates."""

import math
from dataclasses import dataclass

from lorasweep.customers.evidence import Case, Sure
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
    c, published, note = case.customer, case.published, case.trace.note
    least, rows, rewarded = UPDATES[c.task], work.rows, c.task == "rl"
    why = "with fewer than 100 the study saw best learning rates 1.5 times higher"
    if rewarded:
        why = "shorter runs end before the plateau"
    source = published.where("zhu" if rewarded else "tinker_law")
    note("steps_min", least, why, source, Sure.ONCE)
    sizes = [2**k for k in range(13) if 2**k <= LARGEST]
    if rewarded:
        fits = [b for b in sizes if b <= RL_BATCH and (rows is None or rows / b >= least)]
        formula = f"largest power of two up to {RL_BATCH} that leaves {least} updates, in episodes"
        largest, source = max(fits, default=1), published.where("tinker_rl")
        note("batch_size_max", largest, formula, source, Sure.ONCE, episodes=rows)
        return Batches(largest, least, 0.0)
    effects = case.kept.batch_effects
    worst = min([0.0, *(e for _, e in effects)])
    assumed = rows if rows is not None else 1000.0 * SAFE
    fits = [b for b in sizes if regret_of_batch(b, assumed, worst) <= c.max_regret]
    largest = max(fits) if effects else SAFE
    scales = ", ".join(f"{s} {e:+.3f}" for s, e in effects) or "no scale"
    formula = (
        "largest power of two whose regret is at most max_regret: 100 x effect x log2(batch / 32) "
        "/ ln(rows / batch); effect is the worst change of ln(speed) per doubling in the kept "
        "results"
    )
    source = (
        f"analysis/results: batch_size at {scales}. {published.where('study')}, figure 3, has no "
        "numbers; no table of it is public"
    )
    inputs = {"rows": rows, "effect": worst, "max_regret": c.max_regret}
    note("batch_size_max", largest, formula, source, Sure.WEAK, **inputs)
    return Batches(largest, least, worst)
