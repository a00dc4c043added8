"""Find the best learning rate of lr curves, with an interval or a bound where possible.

`likelihood` summarises a curve's runs, `valley` models its shape, `posterior` pools noise and
misfit over a sweep, and `answer` turns a posterior into a value or a bound.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from analysis.inference.estimate import LEVEL, Estimate
from analysis.optimum import valley
from analysis.optimum.answer import bound_at_end, cubic_vertex, value_or_bound
from analysis.optimum.likelihood import (
    MIN_DF,
    MIN_RATES,
    Likelihood,
    growth_of,
    lowest_loss,
    n_rates,
    of_curve,
    pools,
    rate_means,
    weights_of,
    without_collapse,
)
from analysis.optimum.optimum import Optimum
from analysis.optimum.posterior import Pooled, Posterior, weigh
from analysis.runs.lr_curves import LrCurve

FEW_RATES = 5
"""A curve with fewer rates is flagged 'few_points', and no verdict may depend on it."""
MIN_RATES_WITH_PRIOR = 3
"""Rates that a fit needs if at least two related curves give a prior of its shape."""
CHECK_RATIO = 1.3
"""The flag 'checks_disagree' is set if the minimum of a cubic fit lies outside the interval and
differs from the median by more than this factor."""


def fit_all(curves: Sequence[LrCurve], level: float = LEVEL, share: bool = False) -> list[Optimum]:
    """Find the optimum of every curve of a sweep, with noise and misfit pooled over all of them.

    Args:
        level: of the intervals.
        share: use curves that differ only in rank as a prior for each other's shape.
    """
    return fit_sweeps([curves], level, share)[0]


def fit_sweeps(
    sweeps: Sequence[Sequence[LrCurve]], level: float = LEVEL, share: bool = False
) -> list[list[Optimum]]:
    """Find the optima of many sweeps, each independently.

    Curves with the same rates and repeats are computed together, which is faster.
    """
    trimmed = [[without_collapse(c) for c in curves] for curves in sweeps]
    groups = [
        _group(i, {k: curves[k] for k in part})
        for i, curves in enumerate(trimmed)
        for part in pools(curves)
    ]
    shape_priors = None
    if share:
        alone = weigh([list(g.likelihoods.values()) for g in groups])
        shape_priors = [_shape_priors(g, *fitted) for g, fitted in zip(groups, alone)]
    fits = weigh([list(g.likelihoods.values()) for g in groups], shape_priors)
    found: list[dict[int, Optimum]] = [{} for _ in sweeps]
    for g, (posteriors, pooled) in zip(groups, fits):
        by_curve = dict(zip(g.likelihoods, posteriors))
        for k, curve in g.curves.items():
            found[g.sweep][k] = _optimum(
                curve, g.likelihoods.get(k), by_curve.get(k), pooled, level
            )
    return [[optima[k] for k in range(len(optima))] for optima in found]


@dataclass
class _Group:
    """Curves of one sweep with a common noise level, by index in the sweep."""

    sweep: int
    curves: dict[int, LrCurve]
    weights: dict[int, np.ndarray]
    growth: float
    likelihoods: dict[int, Likelihood]
    """Likelihoods of the curves with enough rates for a fit."""


def _group(sweep: int, curves: dict[int, LrCurve]) -> _Group:
    weights = weights_of(list(curves.values()))
    growth = growth_of(list(curves.values()), weights)
    group = _Group(sweep, curves, dict(zip(curves, weights)), growth, {})
    group.likelihoods = _likelihoods(
        group, [k for k, c in curves.items() if n_rates(c) >= MIN_RATES]
    )
    return group


def _likelihoods(group: _Group, members: Sequence[int]) -> dict[int, Likelihood]:
    return {k: of_curve(group.curves[k], group.growth, group.weights[k]) for k in members}


# ---------------------------------------------------------------- related curves


def _shape_priors(
    group: _Group, posteriors: Sequence[Posterior], pooled: Pooled
) -> list[valley.ShapePrior | None]:
    """Return a shape prior for every fitted curve.

    Curves with too few rates for a fit of their own, but enough with a prior, are added to the
    group's likelihoods.
    """
    shapes = _shapes(group, posteriors, pooled)
    priors = {
        k: _shape_prior(k, group.curves, shapes)
        for k, c in group.curves.items()
        if n_rates(c) >= MIN_RATES_WITH_PRIOR
    }
    fitted = [k for k in priors if priors[k] or n_rates(group.curves[k]) >= MIN_RATES]
    group.likelihoods = _likelihoods(group, fitted)
    return [priors[k] for k in fitted]


def _shapes(
    group: _Group, posteriors: Sequence[Posterior], pooled: Pooled
) -> dict[int, valley.Shape]:
    """Return the shapes of the curves that have a fit and whose best rate is not at an edge."""
    out = {}
    for (k, e), posterior in zip(group.likelihoods.items(), posteriors):
        if 0 < e.best < len(e.x) - 1:
            m = float(posterior.quantile(0.5))
            out[k] = valley.likeliest(e.x, e.root, e.root @ e.loss, m, pooled.noise, pooled.misfit)
    return out


def _shape_prior(
    k: int, curves: dict[int, LrCurve], shapes: dict[int, valley.Shape]
) -> valley.ShapePrior | None:
    """Return an empirical-Bayes prior of curve `k`'s shape, from curves that differ only in rank.

    Mean and standard deviation of their asymmetry and ln curvature; the standard deviations are at
    least 0.2 and 0.15. None with fewer than two such curves.
    """
    found = [
        s
        for j, s in shapes.items()
        if j != k and _key_but_rank(curves[j]) == _key_but_rank(curves[k])
    ]
    if len(found) < 2:
        return None
    a, c = np.array([s.a for s in found]), np.log([s.c for s in found])
    return valley.ShapePrior(
        float(a.mean()),
        max(float(a.std(ddof=1)), 0.2),
        float(np.exp(c.mean())),
        max(float(c.std(ddof=1)), 0.15),
    )


def _key_but_rank(curve: LrCurve) -> tuple:
    return tuple(sorted((k, str(v)) for k, v in curve.key.items() if k != "rank"))


# ---------------------------------------------------------------- from a posterior to an optimum


def _optimum(
    curve: LrCurve,
    likelihood: Likelihood | None,
    posterior: Posterior | None,
    pooled: Pooled,
    level: float,
) -> Optimum:
    x, y = curve.x[curve.usable], curve.y[curve.usable]
    if not len(x):
        nothing = ("no_usable_points",)
        return Optimum(curve, Estimate(None, flags=nothing), None, nothing)
    rates, means = rate_means(curve)
    means = means if likelihood is None else likelihood.loss
    best = lowest_loss(means)
    lowest = float(np.mean(y[x == rates[best]]))
    few: tuple[str, ...] = () if len(rates) >= FEW_RATES else ("few_points",)

    def estimate(e: Estimate, flags: tuple[str, ...]) -> Estimate:
        return Estimate(e.value, e.low, e.high, len(x), flags, e.draws, e.level)

    if best in (0, len(rates) - 1):
        bound = bound_at_end(curve, rates, best, posterior)
        flags = (*few, *bound.flags)
        side = 1 if best and len(rates) > 1 else -1
        return Optimum(curve, estimate(bound, flags), lowest, flags, pooled=pooled, open_side=side)
    if likelihood is None or posterior is None:
        around = Estimate(None, math.exp(rates[best - 1]), math.exp(rates[best + 1]))
        return Optimum(curve, estimate(around, few), lowest, few)
    known = pooled.df >= MIN_DF
    if few and not known:
        # Too few rates for a misfit and no known noise: all that is known of a valley with one
        # minimum is that it lies between the neighbours of the best rate.
        low, high = rates[best - 1], rates[best + 1]
        value = float(np.clip(posterior.quantile(0.5), low, high))
        flags = (*few, "no_variance")
        bracket = estimate(Estimate(math.exp(value), math.exp(low), math.exp(high)), flags)
        return Optimum(curve, bracket, lowest, flags, None, pooled, 0, posterior, likelihood)
    low, high = (float(v) for v in posterior.quantile(np.array([0.5 - level / 2, 0.5 + level / 2])))
    vertex = cubic_vertex(rates, means, best)
    answer = value_or_bound(posterior, (low, high), rates, curve, known, level)
    flags = (
        *few,
        *(() if known else ("no_variance",)),
        *(() if _agree(vertex, low, high, posterior) else ("checks_disagree",)),
        *answer.flags,
    )
    return Optimum(
        curve,
        estimate(answer, flags),
        lowest,
        flags,
        None if vertex is None else math.exp(vertex),
        pooled,
        0 if (low < rates[0]) == (high > rates[-1]) else -1 if low < rates[0] else 1,
        posterior,
        likelihood,
    )


def _agree(vertex: float | None, low: float, high: float, posterior: Posterior) -> bool:
    """Return whether the cubic's minimum lies in the interval or near the posterior's median."""
    if vertex is None:
        return False
    off = abs(vertex - float(posterior.quantile(0.5)))
    return low <= vertex <= high or off <= math.log(CHECK_RATIO)
