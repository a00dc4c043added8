"""Intervals over seeds: Student's, at least as wide as one by the variance of similar samples.

Three seeds give a poor estimate of their own spread: three that happen to agree have far too narrow
an interval. So samples of one quantity in one sweep (the ranks' rho, the recipes' shares) pool
their variances. A few samples that share seeds cannot show that one of them is less noisy, so
pooling only widens: the wider of Student's interval and the pooled one is used.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from analysis.inference.estimate import LEVEL, N_DRAWS, Estimate, from_draws


@dataclass(frozen=True)
class PooledVariance:
    """The variance over seeds, pooled over samples of one quantity, and its degrees of freedom."""

    var: float
    df: float


def pooled_variance(samples: Sequence[Sequence[float]]) -> PooledVariance | None:
    """Pool the variances of samples of one quantity by their median, robust against outliers.

    Each variance is first divided by the median of chi^2 / df. None with fewer than two samples of
    at least two values.
    """
    known = [np.asarray(s, float) for s in samples if len(s) > 1 and np.isfinite(s).all()]
    if len(known) < 2:
        return None
    var = float(
        np.median([np.var(s, ddof=1) * (len(s) - 1) / stats.chi2.median(len(s) - 1) for s in known])
    )
    return PooledVariance(var, float(sum(len(s) - 1 for s in known)))


def from_sample(
    values: Sequence[float],
    log: bool = False,
    flags: tuple[str, ...] = (),
    pooled: PooledVariance | None = None,
    shifts: Sequence[float] = (),
) -> Estimate:
    """Return the mean of independent values (one per seed) with Student's interval.

    One value has no interval. With shifts, the value is the median over them.

    Args:
        log: average logarithms (geometric mean); values must be positive.
        pooled: variance of similar samples (of the logarithms, if log); it only widens.
        shifts: changes of the mean at other, equally likely best rates: an error that all seeds
            share.
    """
    x = np.log(values) if log else np.asarray(values, float)
    back = np.exp if log else np.asarray
    if not len(x):
        return Estimate(None, flags=flags)
    if len(x) < 2:
        return Estimate(float(back(x.mean())), n=len(x), flags=flags)
    spreads = [
        (float(np.var(x, ddof=1)), len(x) - 1.0),
        *([(pooled.var, pooled.df)] if pooled else []),
    ]
    var, df = max(spreads, key=lambda s: math.sqrt(s[0]) * stats.t.ppf(0.5 + LEVEL / 2, s[1]))
    even = (np.arange(N_DRAWS) + 0.5) / N_DRAWS
    draws = x.mean() + max(math.sqrt(var / len(x)), 1e-12) * stats.t.ppf(even, df)
    if len(shifts):
        draws = draws + np.random.default_rng(20251126).permutation(
            np.resize(np.asarray(shifts, float), N_DRAWS)
        )
    return from_draws(back(draws), len(x), flags=flags)
