"""When a LoRA learning curve falls behind full fine-tuning's, and how that depends on the rank."""

import math

import numpy as np
import pandas as pd

from analysis.inference.estimate import Estimate
from analysis.measures.at_best import AtBest, over_seeds
from analysis.optimum.optimum import Optimum
from analysis.runs.learning_curves import Points, by_run, same_rows
from analysis.runs.lr_curves import runs_of

DEPARTED = 0.05
"""A rank has departed when it is behind by this share of full fine-tuning's gain over the run (loss
at the start minus the last loss)."""


def departure(lora: Points, full: Points, start: float) -> float:
    """Return the step from which LoRA stays behind full fine-tuning by DEPARTED of its gain.

    Interpolated in ln(step). Infinite if LoRA is not behind at the end; the first step evaluated if
    it always is.

    Args:
        start: NLL before training, in nats.
    """
    other = dict(full)
    steps = [s for s, _ in lora if s in other]
    gain = max(start - full[-1][1], 1e-12)
    lack = [(nll - other[s]) / gain for s, nll in lora if s in other]
    if not steps or lack[-1] <= DEPARTED:
        return math.inf
    inside = [k for k, v in enumerate(lack) if v <= DEPARTED]
    if not inside:
        return steps[0]
    k = inside[-1]
    share = (DEPARTED - lack[k]) / (lack[k + 1] - lack[k])
    return math.exp(math.log(steps[k]) + share * (math.log(steps[k + 1]) - math.log(steps[k])))


def departures_of(lora: AtBest[Points], full: AtBest[Points], start: float) -> AtBest[float]:
    """Return the departures by seed."""
    return lora.paired(full, lambda a, b: departure(a, b, start))


def slope_of(left: dict[int, AtBest[float]]) -> Estimate:
    """Return the slope of ln(departure) over log2(rank), fitted for each seed.

    Ranks that never depart are left out, and the estimate is flagged as censored. The error of full
    fine-tuning's best rate, which all ranks share, is included: at a higher rate full fine-tuning
    is ahead at first.
    """
    ranks = sorted(left)
    together = left[ranks[0]].map(lambda v: {ranks[0]: v})
    for r in ranks[1:]:
        together = together.paired(left[r], lambda a, v, r=r: {**a, r: v})  # type: ignore[misc]
    slopes = _known(together.map(_slope))
    return over_seeds(slopes, flags=("censored",) if never(left) else ())


def never(left: dict[int, AtBest[float]]) -> int:
    """Count the curves that never depart."""
    return sum(math.isinf(v) for d in left.values() for v in d.best.values())


def _slope(left: dict[int, float]) -> float:
    there = [(math.log2(r), math.log(v)) for r, v in left.items() if math.isfinite(v)]
    if len(there) < 2:
        return math.nan
    x, y = zip(*there)
    return float(np.polyfit(x, y, 1)[0])


def _known(values: AtBest[float]) -> AtBest[float]:
    """Leave out the seeds that have no value."""

    def known(by_seed: dict[int, float]) -> dict[int, float]:
        return {s: v for s, v in by_seed.items() if math.isfinite(v)}

    return AtBest(known(values.best), tuple(map(known, values.likely)))


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
