"""Find the best learning rate of LR curves, with an interval or a bound where possible.

The noise and the misfit (relative error of the modelled curvature) are pooled over a sweep. If the
best LR is the lowest or highest tried, or next to a diverged one, the result is a bound. A curve
that is too flat for its noise has neither value nor bound.
"""

import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from analysis.inference.estimate import LEVEL, PROBABILITIES, Estimate
from analysis.optimum import valley
from analysis.optimum.valley import (
    MIN_DF,
    MIN_RATES,
    Likelihood,
    Pooled,
    Posterior,
    first_diverged,
    growth_of,
    likelihood_of,
    lowest_loss,
    n_rates,
    pools,
    rate_means,
    weigh,
    weights_of,
    without_collapse,
)
from analysis.runs.lr_curves import LrCurve

WITHIN = 0.01
"""Extra loss allowed in the low-regret band, in units of the metric."""
N_REGRETS = 40
"""Number of draws of the optimum for the regret of the best learning rate."""


@dataclass(frozen=True)
class Optimum:
    """The optimum of one curve. The value of `best_lr` is None if only a bound is known."""

    curve: LrCurve
    best_lr: Estimate
    lowest: float | None
    """Mean NLL at the best LR tried."""
    flags: tuple[str, ...]
    pooled: Pooled | None = None
    open_side: int = 0
    """1: the optimum may lie above the LRs tried; -1: below them. 0: it lies inside them, or the
    curve is flat, so that it may lie on either side."""
    posterior: Posterior | None = field(default=None, repr=False)
    likelihood: Likelihood | None = field(default=None, repr=False)

    @functools.cached_property
    def shape(self) -> valley.Shape | None:
        """The likeliest shape with its minimum at the posterior's median; None without a fit."""
        m = None if self.posterior is None else float(self.posterior.quantile(0.5))
        return None if m is None else self._shape_at(m)

    def _shape_at(self, m: float) -> valley.Shape | None:
        """Return the likeliest shape with its minimum at ln(lr) m; None without a fit."""
        e, of = self.likelihood, self.pooled
        if e is None or of is None:
            return None
        return valley.likeliest(e.x, e.root, e.root @ e.loss, m, of.noise, of.misfit)

    def regret_of_best(self, level: float) -> float | None:
        """Return the regret of choosing `best_lr`, at most, in nats; None without draws.

        The upper end of a one-sided interval of this level: the optimum is drawn from its
        posterior, and the likeliest shape with this optimum gives the loss at `best_lr`.
        """
        if self.best_lr.value is None or self.best_lr.draws is None:
            return None
        at, logs = np.array([math.log(self.best_lr.value)]), np.log(self.best_lr.draws)
        optima = np.quantile(logs, (np.arange(N_REGRETS) + 0.5) / N_REGRETS)
        shapes = [self._shape_at(float(m)) for m in optima]
        return float(np.quantile([s.height(at)[0] for s in shapes if s], level))

    @functools.cached_property
    def best_nll(self) -> float | None:
        """The fitted NLL at the optimum; without a fit, the mean NLL at the best LR tried."""
        return self.lowest if self.best_lr.value is None or self._level is None else self._level

    def predict(self, lr: np.ndarray) -> np.ndarray | None:
        """Return the fitted NLL at learning rates; None without a fit."""
        if self.shape is None or self._level is None:
            return None
        return self._level + self.shape.height(np.log(lr))

    @functools.cached_property
    def _level(self) -> float | None:
        """The fitted minimum of the NLL; None without a fit.

        Height is the fitted loss above the minimum. So each run's loss minus the height at its LR
        estimates the minimum; these are averaged in each block (seed), then over blocks.
        """
        if self.shape is None or self.pooled is None:
            return None
        x, y, block = (v[self.curve.usable] for v in (self.curve.x, self.curve.y, self.curve.block))
        height = self.shape.height(x)
        weight = 1 / (self.pooled.noise**2 + (self.pooled.misfit * height) ** 2 + 1e-18)
        blocks = np.unique(block)
        # Runs near the minimum weigh most. A block weighs at most as much as one run there.
        most = 1 / self.pooled.noise**2
        share = [min(float(weight[block == b].sum()), most) for b in blocks]
        levels = [np.average((y - height)[block == b], weights=weight[block == b]) for b in blocks]
        return float(np.average(levels, weights=share))

    def regret(self, lr: float) -> float | None:
        """Return the fitted NLL(lr) - best NLL, in nats; None outside the LRs tried."""
        x = self.curve.x[self.curve.usable]
        if self.shape is None or not x.min() - 1e-9 <= math.log(lr) <= x.max() + 1e-9:
            return None
        return float(max(self.shape.height(np.array([math.log(lr)]))[0], 0.0))

    def band(self, loss: float) -> tuple[float, float] | None:
        """Return the range of LRs within `loss` nats of the fitted minimum; None without a fit."""
        if self.shape is None:
            return None
        x = self.curve.x[self.curve.usable]
        grid = np.union1d(
            np.linspace(x.min(), x.max(), 400), [np.clip(self.shape.m, x.min(), x.max())]
        )
        over = np.flatnonzero(self.shape.height(grid) > loss)
        at = int(np.argmin(np.abs(grid - self.shape.m)))
        low = max((int(k) for k in over if k < at), default=-1) + 1
        high = min((int(k) for k in over if k > at), default=len(grid)) - 1
        return float(np.exp(grid[low])), float(np.exp(grid[high]))


def seeds_at_best(o: Optimum) -> int:
    """Return the smaller number of seeds at the two LRs next to the fitted optimum.

    Without a fitted optimum, the smallest number at the best LR and its neighbours.
    """
    x = o.curve.x[o.curve.usable]
    if not len(x):
        return 0
    rates, m = sorted(set(x)), math.log(o.best_lr.value or math.nan)
    if rates[0] <= m <= rates[-1]:  # False for NaN
        around = [max(r for r in rates if r <= m), min(r for r in rates if r >= m)]
    else:
        best = lowest_loss(rate_means(o.curve)[1])
        around = rates[max(0, best - 1) : best + 2]
    return min(len(set(o.curve.seed[o.curve.usable][x == r])) for r in around)


FEW_RATES = 5
"""A curve with fewer LRs is flagged 'few_points', and no verdict may depend on it."""
MIN_RATES_WITH_PRIOR = 3
"""Distinct usable LRs that a fit needs if two or more related curves give a prior of the shape."""
CHECK_RATIO = 1.3
"""The flag 'checks_disagree' is set if a cubic fit has no minimum, or if the minimum lies outside
the interval and differs from the median by more than this factor."""


def fit_all(curves: Sequence[LrCurve], share: bool = False) -> list[Optimum]:
    """Find the optima of a sweep; `share`: the other ranks give a curve a prior of the shape."""
    trimmed = [without_collapse(c) for c in curves]
    found: dict[int, Optimum] = {}
    for part in pools(trimmed):
        found |= _fit_pool({k: trimmed[k] for k in part}, share)
    return [found[k] for k in range(len(found))]


def _fit_pool(curves: dict[int, LrCurve], share: bool) -> dict[int, Optimum]:
    """Fit curves that share one noise level; the keys are indices in the sweep."""
    weights = dict(zip(curves, weights_of(list(curves.values()))))
    growth = growth_of(list(curves.values()), list(weights.values()))

    def fitted(
        priors: Mapping[int, valley.ShapePrior | None],
    ) -> tuple[dict[int, Likelihood], dict[int, Posterior], Pooled]:
        likelihoods = {k: likelihood_of(curves[k], growth, weights[k]) for k in priors}
        posteriors, pooled = weigh(list(likelihoods.values()), list(priors.values()))
        return likelihoods, dict(zip(priors, posteriors)), pooled

    found = fitted({k: None for k, c in curves.items() if n_rates(c) >= MIN_RATES})
    if share:
        found = fitted(_shape_priors(curves, *found))
    likelihoods, posteriors, pooled = found
    return {
        k: _optimum(c, likelihoods.get(k), posteriors.get(k), pooled) for k, c in curves.items()
    }


def _shape_priors(
    curves: Mapping[int, LrCurve],
    likelihoods: Mapping[int, Likelihood],
    posteriors: Mapping[int, Posterior],
    pooled: Pooled,
) -> dict[int, valley.ShapePrior | None]:
    """Return a shape prior for every fitted curve, from the curves that differ only in rank.

    The prior is empirical Bayes: the mean and standard deviation of asymmetry and ln curvature over
    those curves. It is None if fewer than two of them have a best LR inside the LRs tried. Curves
    that have enough LRs only with a prior are added.
    """
    shapes = {}
    for k, e in likelihoods.items():
        if 0 < e.best < len(e.x) - 1:
            at = (float(posteriors[k].quantile(0.5)), pooled.noise, pooled.misfit)
            shapes[k] = valley.likeliest(e.x, e.root, e.root @ e.loss, *at)
    key = {
        k: sorted((name, str(v)) for name, v in c.key.items() if name != "rank")
        for k, c in curves.items()
    }
    priors: dict[int, valley.ShapePrior | None] = {}
    for k, curve in curves.items():
        related = [s for j, s in shapes.items() if j != k and key[j] == key[k]]
        if n_rates(curve) >= MIN_RATES_WITH_PRIOR and len(related) >= 2:
            a, c = np.array([s.a for s in related]), np.log([s.c for s in related])
            spreads = max(float(a.std(ddof=1)), 0.2), max(float(c.std(ddof=1)), 0.15)
            centre = float(np.exp(c.mean()))
            priors[k] = valley.ShapePrior(float(a.mean()), spreads[0], centre, spreads[1])
        elif n_rates(curve) >= MIN_RATES:
            priors[k] = None
    return priors


def _optimum(
    curve: LrCurve,
    likelihood: Likelihood | None,
    posterior: Posterior | None,
    pooled: Pooled,
) -> Optimum:
    x, y = curve.x[curve.usable], curve.y[curve.usable]
    if not len(x):
        nothing = ("no_usable_points",)
        return Optimum(curve, Estimate(None, flags=nothing), None, nothing)
    rates, means = rate_means(curve)
    means = means if likelihood is None else likelihood.loss
    best, known = lowest_loss(means), pooled.df >= MIN_DF
    lowest = float(np.mean(y[x == rates[best]]))
    few: tuple[str, ...] = () if len(rates) >= FEW_RATES else ("few_points",)

    def found(e: Estimate, flags: tuple[str, ...], side: int = 0, fit: bool = True) -> Optimum:
        model = (posterior, likelihood) if fit else ()
        return Optimum(
            curve, replace(e, n=len(x), flags=flags), lowest, flags, pooled, side, *model
        )

    if best in (0, len(rates) - 1):
        bound = _bound_at_end(curve, rates, best, posterior)
        side, flags = 1 if best and len(rates) > 1 else -1, (*few, *bound.flags)
        return found(bound, flags, side, fit=False)
    low, high = rates[best - 1], rates[best + 1]
    if likelihood is None or posterior is None:
        return replace(found(Estimate(None, math.exp(low), math.exp(high)), few), pooled=None)
    if few and not known:
        # Misfit and noise are both unknown. The only bounds of the minimum are the neighbours of
        # the best LR.
        bracket = np.exp([np.clip(posterior.quantile(0.5), low, high), low, high]).tolist()
        return found(Estimate(*bracket), (*few, "no_variance"))
    ends = np.array([0.5 - LEVEL / 2, 0.5, 0.5 + LEVEL / 2])
    low, median, high = map(float, posterior.quantile(ends))
    # A check: the minimum of a least-squares cubic through the five LRs around the best one.
    at = slice(min(max(0, best - 2), max(0, len(rates) - 5)), max(best + 3, 5))
    u = rates[at] - rates[best]
    agrees = False
    if len(u) >= 4:
        slope = np.polyder(np.polyfit(u, means[at], 3))
        roots = [r.real for r in np.roots(slope) if abs(r.imag) < 1e-12]
        flat = [r for r in roots if np.polyval(np.polyder(slope), r) > 0]
        if flat and u[0] <= flat[0] <= u[-1]:
            vertex = rates[best] + flat[0]
            agrees = low <= vertex <= high or abs(vertex - median) <= math.log(CHECK_RATIO)
    below, above = low < rates[0], high > rates[-1]
    if below and above:
        answer = Estimate(None, flags=("flat",))
    elif below:
        answer = Estimate(None, None, math.exp(high) if known else None, flags=("at_edge",))
    elif above:
        end, flag = _upper_end(curve)
        answer = Estimate(None, math.exp(low) if known else None, end, flags=(flag,))
    elif not known:
        answer = Estimate(math.exp(median))
    else:
        # Quantiles, evenly spaced in probability, in a random order: sums of such draws have
        # smoother distributions than sums of random draws. The order is derived from the curve's
        # settings, the same on every machine.
        name = repr(sorted((k, str(v)) for k, v in curve.key.items()))
        stream = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
        order = np.random.default_rng([20251125, stream]).permutation(len(PROBABILITIES))
        draws = np.exp(posterior.quantile(PROBABILITIES)[order])
        answer = Estimate(math.exp(median), math.exp(low), math.exp(high), draws=draws)
    doubts = {"no_variance": known, "checks_disagree": agrees}
    flags = (*few, *(flag for flag, is_fine in doubts.items() if not is_fine), *answer.flags)
    side = 0 if below == above else -1 if below else 1
    return found(answer, flags, side)


def _bound_at_end(
    curve: LrCurve, rates: np.ndarray, best: int, posterior: Posterior | None
) -> Estimate:
    """Return the bound for a best LR, rates[best], that is the first or the last one tried.

    The inner bound is the neighbouring LR, or a more distant value if the posterior reaches there.
    The outer bound is the first LR that diverged, if there is one.
    """
    end, flag = _upper_end(curve)
    if len(rates) == 1:
        return Estimate(None, None, end, flags=("at_edge",))
    if best == 0:
        inner = max(rates[1], -math.inf if posterior is None else posterior.quantile(0.975))
        if inner >= rates[-1] and len(rates) > 2:
            return Estimate(None, flags=("at_edge", "flat"))
        return Estimate(None, None, math.exp(inner), flags=("at_edge",))
    inner = min(rates[-2], math.inf if posterior is None else posterior.quantile(0.025))
    if inner <= rates[0] and len(rates) > 2:
        return Estimate(None, None, end, flags=("at_edge", "flat"))
    return Estimate(None, math.exp(inner), end, flags=(flag,))


def _upper_end(curve: LrCurve) -> tuple[float | None, str]:
    """Return the lowest diverged LR above the usable ones (or None), and the bound's flag."""
    end = first_diverged(curve)
    return (math.exp(end), "bounded_by_divergence") if math.isfinite(end) else (None, "at_edge")
