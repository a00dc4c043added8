"""Step efficiency rho: full fine-tuning's steps to a common loss over LoRA's.

Each method is at its own best rate. A gap in nats depends on where on the learning curve it is
read; rho does not: 0.9 means that LoRA needs 11% more steps. Reads learning curves from a table of
runs; fits no rate.
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from analysis.inference.estimate import Estimate, exp_of
from analysis.inference.seeds import PooledVariance
from analysis.measures.at_best import AtBest, over_seeds, values_at_best
from analysis.optimum.optimum import Optimum
from analysis.runs.learning_curves import Points, by_run, same_rows


def steps_to_reach(points: Points, loss: float) -> float | None:
    """Return the step at which a learning curve first reaches a loss; None if it never does.

    Interpolated in ln(step).

    Args:
        points: [(step, held-out loss), ...].
    """
    before: tuple[float, float] | None = None
    for step, value in points:
        if value <= loss:
            if before is None or before[1] <= value:
                return step
            share = (before[1] - loss) / (before[1] - value)
            return math.exp(math.log(before[0]) + share * (math.log(step) - math.log(before[0])))
        before = (step, value)
    return None


def _reach(one: Points, other: Points) -> tuple[float, int]:
    """Return ln(steps of `other` / steps of `one`) to the lowest loss that both reach.

    Also returns its kind: 0 a value; -1 an upper bound, because `other` has the loss at its first
    evaluation already; 1 a lower bound, because `one` has.
    """
    loss = max(one[-1][1], other[-1][1])
    steps, others = steps_to_reach(one, loss), steps_to_reach(other, loss)
    assert steps is not None and others is not None  # both end at or below it
    bound = -1 if other[0][1] <= loss else 1 if one[0][1] <= loss else 0
    return math.log(others / steps), bound


def log_rho(one: AtBest[Points], other: AtBest[Points]) -> AtBest[float]:
    """Return ln(rho) of one curve against another, by seed; +-inf where only a bound is known."""

    def of(a: Points, b: Points) -> float:
        value, bound = _reach(a, b) if a and b else (math.nan, 0)
        return bound * math.inf if bound else value

    return one.paired(other, of)


def rho(
    lora: AtBest[Points], full: AtBest[Points], pooled: PooledVariance | None = None
) -> Estimate:
    """Return rho from held-out learning curves, paired by seed.

    Steps are counted to the lowest loss that both reach: the higher of their last losses. The
    interval covers the seeds' spread and the error of the best rates; it needs at least two seeds.
    If in any seed either curve has that loss at its first evaluation, there is only a bound.

    Args:
        lora: learning curves without step 0 and the last evaluation, as from `at_best`.
        full: the same of full fine-tuning.
        pooled: variance over seeds of ln rho, pooled over similar curves.
    """
    pairs = {s: (lora.best[s], full.best[s]) for s in sorted(lora.best.keys() & full.best.keys())}
    found = [_reach(a, b) for a, b in pairs.values() if a and b]
    if not found:
        return Estimate(None)
    values, bounds = [math.exp(v) for v, _ in found], {bound for _, bound in found} - {0}
    if bounds:
        low, high = (
            (min(values) if bounds == {1} else None),
            (max(values) if bounds == {-1} else None),
        )
        return Estimate(None, low, high, len(found), ("one is there at its first evaluation",))
    return exp_of(over_seeds(log_rho(lora, full), pooled))


def slope_by_rank(logs: dict[int, AtBest[float]]) -> Estimate:
    """Return the slope of ln(rho) over log2(rank): least squares by seed, then over seeds.

    All ranks are compared with the same curves of full fine-tuning, so the error of its best rate
    hardly moves the slope. Without a value if any seed has only a bound, or fewer than two ranks.

    Args:
        logs: `log_rho` by rank.
    """
    ranks = sorted(logs)
    if len(ranks) < 2:
        return Estimate(None)
    together = logs[ranks[0]].map(lambda v: [v])
    for r in ranks[1:]:
        together = together.paired(logs[r], lambda found, v: [*found, v])
    x = np.log2(ranks) - np.mean(np.log2(ranks))
    slopes = together.map(lambda v: float(x @ np.array(v) / (x @ x)))
    if not np.isfinite(list(slopes.best.values())).all():
        return Estimate(None, n=len(slopes.best), flags=("only_bounds",))
    return over_seeds(slopes)


def of_curves(table: pd.DataFrame, optima: Sequence[Optimum]) -> list[Estimate | None]:
    """Return rho of every curve, in order, against full fine-tuning's of the same group.

    None for full fine-tuning itself, and where there is not exactly one curve to compare with.
    """
    curves = at_best(table, optima)
    out: list[Estimate | None] = []
    for o, mine in zip(optima, curves):
        full = [
            k
            for k, f in enumerate(optima)
            if f.curve.group == o.curve.group and f.curve.key["method"] == "fullft"
        ]
        compared = o.curve.key["method"] != "fullft" and len(full) == 1
        out.append(rho(mine, curves[full[0]]) if compared else None)
    return out


def at_best(table: pd.DataFrame, optima: Sequence[Optimum]) -> list[AtBest[Points]]:
    """Return each curve's held-out learning curves by seed, at its best rate and likely rates.

    Step 0 and the last evaluation, which uses more rows, are left out.
    """
    learned = by_run(table)
    found = values_at_best(table, optima, lambda run: dict(same_rows(learned.get(run.name))))
    return [mine.map(lambda points: sorted(points.items())) for mine in found]


def read_to(curves: Sequence[AtBest[Points]]) -> int:
    """Return the last update of the shortest curve; 0 without curves."""
    return min(
        (int(points[-1][0]) for c in curves for points in c.best.values() if points), default=0
    )
