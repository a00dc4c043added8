"""The rank that is needed: where regret falls to what is allowed; and its change with training.

Each seed is a draw of what is new. Its needed rank is interpolated between the ranks tried, so the
spread over seeds is that over draws.
"""

import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.interpolate import PchipInterpolator

from analysis.measures.at_best import AtBest
from analysis.measures.regret import Gap


def rank_needed_by_seed(gaps: Mapping[int, Gap]) -> AtBest[float]:
    """Return log2 of the needed rank by seed; infinite, with its sign, outside the ranks tried.

    Args:
        gaps: of one cell at one number of updates, by rank.
    """
    ranks = sorted(gaps)
    over = [gaps[r].beyond_allowed for r in ranks]

    def read(values: Sequence[Mapping[int, float]]) -> dict[int, float]:
        seeds = set.intersection(*(set(v) for v in values)) if values else set()
        return {
            s: crossing([*map(math.log2, ranks)], [v[s] for v in values]) for s in sorted(seeds)
        }

    likely = tuple(read(v) for v in zip(*(o.likely for o in over)))
    return AtBest(read([o.best for o in over]), likely)


def crossing(x: Sequence[float], y: Sequence[float]) -> float:
    """Return where y last falls to 0, by a monotone cubic between the points.

    Negative infinity if all of y lies below 0, infinity if the last of y lies above.
    """
    if not np.isfinite(y).all():
        return math.nan
    if y[-1] > 0:
        return math.inf
    if max(y) <= 0:
        return -math.inf
    # Fritsch and Butland (1984): no overshoot, so a crossing lies between the ranks around it.
    return float(PchipInterpolator(x, y).roots(extrapolate=False).max())


def change_of_needed(
    first: AtBest[float], last: AtBest[float], doublings: float
) -> AtBest[float] | None:
    """Return the change of log2 of the needed rank a doubling of the updates.

    None if it lies outside the ranks tried in a seed.
    """
    change = last.paired(first, lambda b, a: (b - a) / doublings)
    return change if change.best and all(map(math.isfinite, change.best.values())) else None


def sum_of(values: Sequence[AtBest[float]]) -> AtBest[float] | None:
    """Add values of the seeds that all have; None without any."""

    def add(a: float, b: float) -> float:
        return a + b

    return functools.reduce(lambda a, b: a.paired(b, add), values) if values else None
