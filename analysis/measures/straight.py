"""Whether a learning curve falls in a straight line over the logarithm of updates."""

import math

import numpy as np

from analysis.inference.estimate import Estimate, exp_of
from analysis.measures.at_best import AtBest, over_seeds
from analysis.runs.learning_curves import Points

SPAN = 4
"""The two spans that are compared are the last factor SPAN of the updates, and the one before."""


def bend(points: Points) -> float:
    """Return ln(fall of the loss in the last span / in the one before).

    0 on a straight line over ln(updates), below 0 where the curve flattens. Losses between
    evaluations are interpolated in ln(updates). NaN if the loss does not fall in either span, or
    the curve begins later than the first span.
    """
    steps, losses = np.array(points, dtype=float).T if points else (np.zeros(1), np.zeros(1))
    ends = steps[-1] / np.array([SPAN**2, SPAN, 1.0])
    if not 0 < steps[0] <= ends[0]:
        return math.nan
    first, middle, last = np.interp(np.log(ends), np.log(steps), losses)
    if not (first > middle > last):
        return math.nan
    return math.log((middle - last) / (first - middle))


def straightness(curves: AtBest[Points]) -> Estimate:
    """Return the fall in the last span over that in the one before: 1 on a straight line.

    Over seeds, at a curve's best rate and likely rates. Without a value if a seed has none.
    """
    bends = curves.map(bend)
    if not bends.best or not all(map(math.isfinite, bends.best.values())):
        return Estimate(None, n=len(bends.best))
    return exp_of(over_seeds(bends))


def least_straight(*curves: AtBest[Points]) -> Estimate:
    """Return the straightness furthest from 1; without a value if a curve has none."""
    found = [straightness(c) for c in curves]
    unknown = [e for e in found if e.value is None]
    return unknown[0] if unknown else max(found, key=lambda e: abs(math.log(e.value or 1.0)))
