"""Intervals over seeds: Student's, not narrower than the usual spread of their kind, and the doubt
about the best rate.

Three seeds alone say little about their own spread: three which happen to agree have far too narrow
an interval. So samples of one kind in one sweep (the ranks' rho, the recipes' shares) tell each
other what is usual. A handful of samples that share seeds cannot tell whether one of them is
noisier, so that this only widens: of Student's interval and the one by the usual spread the wider
counts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from analysis.inference.estimate import LEVEL, N_DRAWS, Estimate, from_draws


@dataclass(frozen=True)
class PooledVariance:
    """The variance over seeds that is usual among samples of one kind, and its degrees of freedom."""

    var: float
    df: float


def pooled_variance(samples: Sequence[Sequence[float]]) -> PooledVariance | None:
    """Return what samples of one kind say of each one's variance: the median of theirs, each over
    the median of chi^2 / df; None for fewer than two with two values."""
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
    """Return the mean of independent values (seeds), or their geometric mean, with its interval; no
    interval for one value. With shifts, the value is the median of what the mean may be.

    Args:
        log: values are positive, and averaged as logarithms.
        kind: the usual variance (of the logarithms, if log) of such samples; it widens, or says
            nothing.
        shifts: what the mean would move by, for equally likely best rates: an error of its own,
            common to all seeds.
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
    var, df = max(
        spreads, key=lambda told: math.sqrt(told[0]) * stats.t.ppf(0.5 + LEVEL / 2, told[1])
    )
    even = (np.arange(N_DRAWS) + 0.5) / N_DRAWS
    draws = x.mean() + max(math.sqrt(var / len(x)), 1e-12) * stats.t.ppf(even, df)
    if len(shifts):
        draws = draws + np.random.default_rng(20251126).permutation(
            np.resize(np.asarray(shifts, float), N_DRAWS)
        )
    return from_draws(back(draws), len(x), flags=flags)
