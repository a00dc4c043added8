"""Student's t intervals over seeds, never narrower than with the pooled variance.

Three seeds that happen to agree have far too narrow an interval. So samples of one quantity in one
sweep (such as rho at each rank) pool their variances. Pooling only widens, because a few samples
that share seeds cannot show that one of them is less noisy.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from analysis.inference.estimate import N_DRAWS, PROBABILITIES, Estimate, from_draws
from analysis.inference.spread import Part, Spread


@dataclass(frozen=True)
class PooledVariance:
    """The variance over seeds, pooled over samples of one quantity, and its degrees of freedom."""

    var: float
    df: float


def pooled_variance(samples: Sequence[Sequence[float]]) -> PooledVariance | None:
    """Pool the variances of samples of one quantity by their median, robust against outliers.

    Each is first divided by the median of chi^2 / df. Samples with fewer than two values, or with a
    value that is not finite, are left out. None if fewer than two samples remain.
    """
    known = [np.asarray(s, float) for s in samples if len(s) > 1 and np.isfinite(s).all()]
    if len(known) < 2:
        return None
    each = [np.var(s, ddof=1) * (len(s) - 1) / stats.chi2.median(len(s) - 1) for s in known]
    return PooledVariance(float(np.median(each)), float(sum(len(s) - 1 for s in known)))


def from_sample(
    values: Sequence[float],
    log: bool = False,
    flags: tuple[str, ...] = (),
    pooled: PooledVariance | None = None,
    shifts: Sequence[float] = (),
) -> Estimate:
    """Return the mean of independent values (one per seed) with Student's interval.

    The interval of level 1 - a is mean +- t(1 - a/2, df) sqrt(var / n) (Student, Biometrika 6,
    1908). It is computed twice: with the sample's variance and n - 1 degrees of freedom, and with
    the pooled variance and its degrees of freedom. The wider one counts, at every level: each draw
    is the outer one of the two quantiles. One value has no interval. With shifts, each draw is
    moved by one of them, and the value is the median of the draws.

    Args:
        log: average logarithms (geometric mean); values must be positive.
        pooled: variance of similar samples (of the logarithms, if log).
        shifts: posterior draws of an error that all seeds share, because the best LR is uncertain.
            Each is the change of the mean if another LR were the best.
    """
    x = np.log(values) if log else np.asarray(values, float)
    back = np.exp if log else np.asarray
    if not len(x):
        return Estimate(None, flags=flags)
    if len(x) < 2:
        return Estimate(float(back(x.mean())), n=len(x), flags=flags)
    n = len(x)
    parts = [Part(max(float(np.std(x, ddof=1)), 1e-12), n - 1.0)]
    if pooled is not None:
        parts.append(Part(float(np.sqrt(pooled.var)), pooled.df, pooled.df / (n - 1)))
    sides = [p.sd / np.sqrt(n) * np.abs(stats.t.ppf(PROBABILITIES, p.df)) for p in parts]
    draws = x.mean() + np.sign(PROBABILITIES - 0.5) * np.max(sides, axis=0)
    if len(shifts):
        resized = np.resize(np.asarray(shifts, float), N_DRAWS)
        draws = draws + np.random.default_rng(20251126).permutation(resized)
    shared = float(np.std(shifts)) if len(shifts) else 0.0
    spread = Spread(n, parts=tuple(parts), shared=shared)
    return from_draws(back(draws), n, flags=flags, spread=spread)
