"""Intervals over seeds: Student's, its variance steadied by kindred samples, the doubt about the best rate added.

Three seeds alone say little about their own spread: three which happen to agree have far too narrow an interval. Samples
of one kind in one sweep (the ranks' rho, the recipes' shares) lend each other their variances by the empirical Bayes rule of
Smyth (Statistical Applications in Genetics and Molecular Biology 3, 2004; limma), which lends the less the more they differ.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special, stats

from analysis.results import LEVEL, N_DRAWS, Estimate, from_draws


@dataclass(frozen=True)
class Prior:
    """What kindred samples say of a sample's variance: as much as `df` further degrees of freedom with the variance `var`."""

    df: float
    """Infinite where the samples' variances differ no more than by chance."""
    var: float
    cap: float
    """Degrees of freedom of all samples together: no interval rests on more."""


def kindred(samples: Sequence[Sequence[float]]) -> Prior | None:
    """Return what samples of one kind say of each one's variance; None for fewer than two with two values, or no spread."""
    known = [np.asarray(s, float) for s in samples if len(s) > 1 and np.isfinite(s).all()]
    if len(known) < 2:
        return None
    half = np.array([(len(s) - 1) / 2 for s in known])
    var = np.array([np.var(s, ddof=1) for s in known])
    if not np.median(var) > 0:
        return None
    logs = np.log(np.maximum(var, 1e-5 * np.median(var))) - special.digamma(half) + np.log(half)
    excess = float(np.var(logs, ddof=1) - special.polygamma(1, half).mean())
    cap = 2 * float(half.sum())
    if excess <= 0:
        return Prior(math.inf, math.exp(logs.mean()), cap)
    of_prior = optimize.brentq(lambda ln: special.polygamma(1, math.exp(ln)) - excess, -20, 20)
    half_df = math.exp(of_prior)
    return Prior(2 * half_df, math.exp(logs.mean() + special.digamma(half_df) - of_prior), cap)


def from_sample(
    values: Sequence[float], log: bool = False, level: float = LEVEL, flags: tuple[str, ...] = (), prior: Prior | None = None,
    shifts: Sequence[float] = (),
) -> Estimate:  # fmt: skip
    """Return the mean of independent values (seeds), or their geometric mean, with its interval; no interval for one value.

    Args:
        log: values are positive, and averaged as logarithms.
        prior: of the variance (of the logarithms, if log), from kindred samples.
        shifts: what the mean would move by, for equally likely best rates: an error of its own, common to all seeds.
    """
    x = np.log(values) if log else np.asarray(values, float)
    back = np.exp if log else np.asarray
    if not len(x):
        return Estimate(None, flags=flags)
    if len(x) < 2:
        return Estimate(float(back(x.mean())), n=len(x), flags=flags)
    var, df = float(np.var(x, ddof=1)), len(x) - 1.0
    if prior is not None:
        var = prior.var if math.isinf(prior.df) else (prior.df * prior.var + df * var) / (prior.df + df)
        df = min(prior.df + df, prior.cap)
    even = (np.arange(N_DRAWS) + 0.5) / N_DRAWS
    draws = x.mean() + max(math.sqrt(var / len(x)), 1e-12) * stats.t.ppf(even, df)
    if len(shifts):
        draws = draws + np.random.default_rng(20251126).permutation(np.resize(np.asarray(shifts, float), N_DRAWS))
    return from_draws(back(draws), len(x), level, flags)
