"""When a LoRA learning curve falls behind full fine-tuning's, and how that depends on the rank."""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.inference.censored import censored_slope, pseudo_values
from analysis.inference.estimate import Estimate
from analysis.measures.at_best import AtBest, over_seeds
from analysis.optimum.optimum import Optimum
from analysis.runs.learning_curves import Points, by_run, same_rows
from analysis.runs.lr_curves import runs_of

DEPARTED = 0.05
"""A rank has departed when it is behind by this share of full fine-tuning's gain over the run (loss
at the start minus the last loss)."""


@dataclass(frozen=True)
class Departure:
    """The step of a departure, or the range in which it lies."""

    low: float
    """0 if the curve was behind at its first evaluation already."""
    high: float
    """Infinite if the curve was not behind at its last evaluation."""

    @property
    def never(self) -> bool:
        """Whether the curve does not depart within the run."""
        return math.isinf(self.high)

    @property
    def at_once(self) -> bool:
        """Whether the curve has departed at the first evaluation."""
        return self.low == 0


UNKNOWN = Departure(0.0, math.inf)
"""The two curves have no step in common."""


def departure(lora: Points, full: Points, start: float) -> Departure:
    """Return the step from which LoRA stays behind full fine-tuning by DEPARTED of its gain.

    Interpolated in ln(step). A curve that is not behind at the end departs later, if at all; one
    that always is departs before the first evaluation.

    Args:
        start: NLL before training, in nats.
    """
    other = dict(full)
    steps = [s for s, _ in lora if s in other]
    gain = max(start - full[-1][1], 1e-12)
    lack = [(nll - other[s]) / gain for s, nll in lora if s in other]
    if not steps:
        return UNKNOWN
    if lack[-1] <= DEPARTED:
        return Departure(steps[-1], math.inf)
    inside = [k for k, v in enumerate(lack) if v <= DEPARTED]
    if not inside:
        return Departure(0.0, steps[0])
    k = inside[-1]
    share = (DEPARTED - lack[k]) / (lack[k + 1] - lack[k])
    at = math.exp(math.log(steps[k]) + share * (math.log(steps[k + 1]) - math.log(steps[k])))
    return Departure(at, at)


def departures_of(lora: AtBest[Points], full: AtBest[Points], start: float) -> AtBest[Departure]:
    """Return the departures by seed."""
    return lora.paired(full, lambda a, b: departure(a, b, start))


def slope_of(left: dict[int, AtBest[Departure]]) -> Estimate:
    """Return the slope of ln(departure) over log2(rank), from all ranks and seeds.

    A rank that does not depart within the run is a right-censored observation: it departs later,
    and leaving it out would flatten the slope, since these are the high ranks. One that has
    departed at the first evaluation is left-censored alike. The line is fitted to all seeds
    together (`censored_slope`); seeds share their batches over the ranks, so the interval is
    Student's over the seeds' jackknife pseudo-values, which without censoring are the slopes of
    the single seeds. The error of full fine-tuning's best rate, which all ranks share, is included:
    at a higher rate full fine-tuning is ahead at first.

    Without a value if fewer than two ranks depart where it can be seen.
    """
    ranks = sorted(left)
    together = left[ranks[0]].map(lambda v: {ranks[0]: v})
    for r in ranks[1:]:
        together = together.paired(left[r], lambda a, v, r=r: {**a, r: v})  # type: ignore[misc]
    by_seed = together.best
    whole = _slope(by_seed)
    flags = (
        ("censored",) if any(d.low != d.high for v in by_seed.values() for d in v.values()) else ()
    )
    if not math.isfinite(whole):
        return Estimate(None, n=len(by_seed), flags=(*flags, "one_rank_departs"))
    if len(by_seed) < 2:
        return Estimate(whole, n=len(by_seed), flags=flags)
    without = [_slope({s: v for s, v in by_seed.items() if s != out}) for out in by_seed]
    if not np.isfinite(without).all():
        return Estimate(whole, n=len(by_seed), flags=(*flags, "one_rank_departs"))
    own = dict(zip(by_seed, pseudo_values(whole, without)))
    moved = [_slope(likely) - whole for likely in together.likely]
    shifted = tuple({s: v + m for s, v in own.items()} for m in moved)
    return over_seeds(AtBest(own, shifted), flags=flags)


def _slope(by_seed: dict[int, dict[int, Departure]]) -> float:
    """Return the slope over all seeds and ranks; NaN where it is not determined."""
    found = [(r, d) for v in by_seed.values() for r, d in v.items() if d != UNKNOWN]
    low = [math.log(d.low) if d.low > 0 else -math.inf for _, d in found]
    return censored_slope(
        [math.log2(r) for r, _ in found], low, [math.log(d.high) for _, d in found]
    )


def envelope(table: pd.DataFrame, o: Optimum) -> Points:
    """Return the lowest loss over all rates at each step, for the seed with the most rates."""
    seeds, counts = np.unique(o.curve.seed, return_counts=True)
    seed = seeds[np.argmax(counts)]
    rows = runs_of(table, o.curve)
    lowest: dict[float, float] = {}
    for points in by_run(rows[rows["seed"] == seed]).values():
        for step, nll in same_rows(points):
            lowest[step] = min(nll, lowest.get(step, math.inf))
    return sorted(lowest.items())
