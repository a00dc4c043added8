"""rho, step efficiency: full fine-tuning's steps to a loss that both reach, over LoRA's; each at
its own best rate.

A gap in nats grows and shrinks with the place on the learning curve, rho does not: 0.9 means that
LoRA needs 11% more steps. Reads learning curves from a table of runs; fits no rate.
"""

import math
from collections.abc import Sequence

import pandas as pd

from analysis.inference.estimate import Estimate, exp_of
from analysis.inference.seeds import PooledVariance
from analysis.measures.at_best import AtBest, over_seeds, values_at_best
from analysis.optimum.optimum import Optimum
from analysis.runs.learning_curves import Points, by_run, same_rows


def steps_to_reach(points: Points, loss: float) -> float | None:
    """Return the step at which a held-out curve [(step, loss), ...] first reaches a loss,
    interpolated in ln(step); None if it never does."""
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
    """Return ln of the other's steps over the one's to the lowest loss that both reach, and what
    that is: 0 a value, -1 an upper bound (the other is there at its first evaluation), 1 a lower
    bound (the one is)."""
    loss = max(one[-1][1], other[-1][1])
    steps, others = steps_to_reach(one, loss), steps_to_reach(other, loss)
    assert steps is not None and others is not None  # both end at or below it
    bound = -1 if other[0][1] <= loss else 1 if one[0][1] <= loss else 0
    return math.log(others / steps), bound


def log_rho(one: AtBest[Points], other: AtBest[Points]) -> AtBest[float]:
    """Return ln(rho) of one curve against another by seed; +-inf where only a bound is known."""

    def of(a: Points, b: Points) -> float:
        value, bound = _reach(a, b) if a and b else (math.nan, 0)
        return bound * math.inf if bound else value

    return one.paired(other, of)


def rho(
    lora: AtBest[Points], full: AtBest[Points], pooled: PooledVariance | None = None
) -> Estimate:
    """Return rho from held-out curves (step 0 and the last evaluation left out), paired by seed.

    Steps are counted to the lowest loss that both reach: LoRA's last one, or full fine-tuning's
    where that ends higher. The interval covers seeds and the error of the best rates; it needs two
    seeds or more. Where either is there at its first evaluation in any seed, only a bound is given.

    Args:
        pooled: variance over seeds of ln rho, pooled over curves like these.
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


def of_curves(table: pd.DataFrame, optima: Sequence[Optimum]) -> list[Estimate | None]:
    """Return rho of every curve against the full fine-tuning one of its group, in order; None for
    that one itself."""
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
    """Return, for every curve, its held-out learning curves by seed at its best rates; step 0 and
    the last evaluation, which uses more rows, left out."""
    learned = by_run(table)
    found = values_at_best(table, optima, lambda run: dict(same_rows(learned.get(run.name))))
    return [mine.map(lambda points: sorted(points.items())) for mine in found]


def read_to(curves: Sequence[AtBest[Points]]) -> int:
    """Return the update up to which curves are read: that of the shortest's last but one point."""
    return min(
        (int(points[-1][0]) for c in curves for points in c.best.values() if points), default=0
    )
