"""Rank correlation over groups, such as layer sets of several tasks."""

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from analysis.inference.estimate import N_DRAWS, Estimate, from_draws
from analysis.inference.spread import Part, Spread


def within_groups(groups: Sequence[Sequence[tuple[float, float]]], of: str) -> Estimate:
    """Return Spearman's correlation of pairs about their group's means, with its interval.

    Subtracting the means of k groups is a partial correlation given k - 1 indicators of a group.
    Fisher's z = atanh(r) of a partial correlation given q variables among n pairs has the variance
    1 / (n - q - 3) (Fisher, Metron 3, 1924): so 1 / (n - k - 2), n - 6 for four groups. For ranks
    it is 1 + r^2 / 2 times as large (Bonett & Wright, Psychometrika 65, 2000).

    No value where n - k - 2 is below 1.

    Args:
        groups: (x, y) of every pair, by group; groups of one pair do not count.
        of: what a pair is, for people.
    """
    known = [np.asarray(g, float) for g in groups if len(g) > 1]
    n = sum(map(len, known))
    left = n - len(known) - 2
    if left < 1:
        return Estimate(None, n=n)
    x, y = np.concatenate([g - g.mean(0) for g in known]).T
    r = float(stats.spearmanr(x, y).statistic)
    error = math.sqrt((1 + r**2 / 2) / left)
    even = (np.arange(N_DRAWS) + 0.5) / N_DRAWS
    z = math.atanh(min(max(r, -0.999), 0.999)) + stats.norm.ppf(even) * error
    spread = Spread(n, of, (Part(error * math.sqrt(n), math.inf),))
    return from_draws(np.tanh(z), n, spread=spread)
