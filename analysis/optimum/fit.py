"""The best learning rate of a curve, with an honest interval: from runs to evidence, from a
posterior to an answer.

The model of a valley and its constants are in `valley`, the pooling of noise and misfit over a
sweep in `posterior`. Here a curve's runs become numbers for them, and a posterior becomes an
optimum, a bound, or nothing: an optimum at the edge of what was tried, or beside a rate that breaks
down, is a bound, and a valley too flat for its noise has none.
"""

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from analysis.inference.estimate import LEVEL, Estimate
from analysis.optimum import valley
from analysis.optimum.likelihood import (
    MIN_DF,
    MIN_RATES,
    Likelihood,
    bottom,
    first_diverged,
    growth_of,
    n_rates,
    of_curve,
    pools,
    weights_of,
    without_collapse,
)
from analysis.optimum.posterior import Pooled, Posterior, weigh
from analysis.runs.lr_curves import LrCurve

FEW_RATES = 5
"""Below this many a curve is flagged 'few_points', and no verdict rests on it."""
MIN_RATES_WITH_PRIOR = 3
"""The same where two or more related curves lend it their shape."""
CHECK_RATIO = 1.3
"""A narrow cubic whose minimum lies outside the interval and differs by more raises the flag
'checks_disagree'."""


@dataclass(frozen=True)
class Optimum:
    """The optimum of one curve. `best_lr` has value None where only a bound is known."""

    curve: LrCurve
    best_lr: Estimate
    lowest: float | None
    """Mean NLL at the best rate tried."""
    flags: tuple[str, ...]
    check_lr: float | None = None
    """Minimum of a cubic through the five rates around the best: a check, not the answer."""
    pooled: Pooled | None = None
    open_side: int = 0
    """1: the optimum may lie above the rates tried, -1: below; 0: between them, or on either side
    (flat)."""
    posterior: Posterior | None = field(default=None, repr=False)
    likelihood: Likelihood | None = field(default=None, repr=False)

    @functools.cached_property
    def shape(self) -> valley.Shape | None:
        """The likeliest valley with its minimum at the posterior's median; None without a fit."""
        if self.posterior is None:
            return None
        e, m = self.likelihood, float(self.posterior.quantile(0.5))
        return valley.likeliest(
            e.x, e.root, e.root @ e.loss, m, self.pooled.noise, self.pooled.misfit
        )

    @functools.cached_property
    def best_nll(self) -> float | None:
        """The fitted NLL at the optimum; where that is not known, the mean at the best rate tried."""
        if self.shape is None or self.best_lr.value is None:
            return self.lowest
        return _level(self.curve, self.shape, self.pooled)

    def predict(self, lr: np.ndarray) -> np.ndarray | None:
        """Return the fitted NLL at learning rates; None without a fit."""
        return (
            None
            if self.shape is None
            else _level(self.curve, self.shape, self.pooled) + self.shape.height(np.log(lr))
        )

    def regret(self, lr: float) -> float | None:
        """Return NLL(lr) - best NLL in nats under the fit; None outside the rates that were tried."""
        x = self.curve.x[self.curve.usable]
        if self.shape is None or not x.min() - 1e-9 <= math.log(lr) <= x.max() + 1e-9:
            return None
        return float(max(self.shape.height(np.array([math.log(lr)]))[0], 0.0))

    def band(self, loss: float) -> tuple[float, float] | None:
        """Return the rates around the best one that lose at most `loss` nats under the fit, within
        those tried."""
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
    """Count the seeds at the two rates on both sides of the fitted optimum (without one: about the
    best rate)."""
    x = o.curve.x[o.curve.usable]
    if not len(x):
        return 0
    rates = sorted(set(x))
    y = o.curve.y[o.curve.usable]
    if o.best_lr.value is not None and rates[0] <= math.log(o.best_lr.value) <= rates[-1]:
        m = math.log(o.best_lr.value)
        sides = (max(r for r in rates if r <= m), min(r for r in rates if r >= m))
        return min(len(set(o.curve.seed[o.curve.usable][x == r])) for r in sides)
    best = min(range(len(rates)), key=lambda k: y[x == rates[k]].mean())
    around = rates[max(0, best - 1) : best + 2]
    return min(len(set(o.curve.seed[o.curve.usable][x == r])) for r in around)


def fit_all(curves: Sequence[LrCurve], level: float = LEVEL, share: bool = False) -> list[Optimum]:
    """Find the optimum of every curve of a sweep, with noise and misfit pooled over all of them.

    share: curves that differ in their rank only lend each other their curvature (see `_kin`).
    """
    return fit_sweeps([curves], level, share)[0]


def fit_sweeps(
    sweeps: Sequence[Sequence[LrCurve]], level: float = LEVEL, share: bool = False
) -> list[list[Optimum]]:
    """The same for many sweeps, none of which knows of the others."""
    trimmed = [[without_collapse(c) for c in curves] for curves in sweeps]
    parts = [(i, part) for i, curves in enumerate(trimmed) for part in pools(curves)]
    gathered: list[dict[int, Likelihood]] = []
    all_weights: list[dict[int, np.ndarray]] = []
    for i, part in parts:
        mine = [trimmed[i][k] for k in part]
        all_weights.append(dict(zip(part, weights_of(mine))))
        growth = growth_of(mine, list(all_weights[-1].values()))
        gathered.append(
            {
                k: of_curve(trimmed[i][k], growth, all_weights[-1][k])
                for k in part
                if n_rates(trimmed[i][k]) >= MIN_RATES
            }
        )
    shape_priors: list[list[valley.ShapePrior | None]] | None = None
    if share:
        shape_priors = []
        for n, ((i, part), (posteriors, pooled)) in enumerate(
            zip(parts, weigh([list(g.values()) for g in gathered]))
        ):
            shapes = _shapes(trimmed[i], gathered[n], posteriors, pooled)
            priors = {
                k: _shape_prior(k, trimmed[i], shapes)
                for k in part
                if n_rates(trimmed[i][k]) >= MIN_RATES_WITH_PRIOR
            }
            growth = growth_of([trimmed[i][k] for k in part], list(all_weights[n].values()))
            gathered[n] = {
                k: of_curve(trimmed[i][k], growth, all_weights[n][k])
                for k, prior in priors.items()
                if prior is not None or n_rates(trimmed[i][k]) >= MIN_RATES
            }
            shape_priors.append([priors[k] for k in gathered[n]])
    out: list[list[Optimum | None]] = [[None] * len(curves) for curves in trimmed]
    for (i, part), told, (posteriors, pooled) in zip(
        parts, gathered, weigh([list(g.values()) for g in gathered], shape_priors)
    ):
        found = dict(zip(told, posteriors))
        for k in part:
            out[i][k] = _optimum(trimmed[i][k], told.get(k), found.get(k), pooled, level)
    return out


# ---------------------------------------------------------------- related curves


def _shapes(
    curves: Sequence[LrCurve],
    told: dict[int, Likelihood],
    posteriors: Sequence[Posterior],
    pooled: Pooled,
) -> dict[int, valley.Shape]:
    """The shapes of curves that have a fit of their own and their best rate inside."""
    out = {}
    for (k, e), posterior in zip(told.items(), posteriors):
        if 0 < e.best < len(e.x) - 1:
            m = float(posterior.quantile(0.5))
            out[k] = valley.likeliest(e.x, e.root, e.root @ e.loss, m, pooled.noise, pooled.misfit)
    return out


def _shape_prior(
    k: int, curves: Sequence[LrCurve], shapes: dict[int, valley.Shape]
) -> valley.ShapePrior | None:
    """Say what the others that differ from a curve in their rank only say of its shape: empirical
    Bayes.

    Their asymmetry and curvature give mean and spread (at least 0.2 and 15%); fewer than two others
    say nothing.
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


# ---------------------------------------------------------------- from a posterior to an answer


def _optimum(
    curve: LrCurve,
    likelihood: Likelihood | None,
    posterior: Posterior | None,
    pooled: Pooled,
    level: float,
) -> Optimum:
    x, y = curve.x[curve.usable], curve.y[curve.usable]
    if not len(x):
        return Optimum(
            curve, Estimate(None, flags=("no_usable_points",)), None, ("no_usable_points",)
        )
    rates = np.array(sorted(set(x)))
    means = np.array([y[x == v].mean() for v in rates]) if likelihood is None else likelihood.loss
    best = bottom(means)
    lowest = float(np.mean(y[x == rates[best]]))
    flags = [] if len(rates) >= FEW_RATES else ["few_points"]
    if best in (0, len(rates) - 1):
        ends = (
            (-math.inf, math.inf)
            if posterior is None
            else tuple(posterior.quantile(np.array([0.025, 0.975])))
        )
        bound = _edge(curve, rates, best, *ends)
        flags += bound.flags
        return Optimum(
            curve,
            Estimate(None, bound.low, bound.high, len(x), tuple(flags)),
            lowest,
            tuple(flags),
            pooled=pooled,
            open_side=1 if best and len(rates) > 1 else -1,
        )
    if likelihood is None:
        around = Estimate(
            None, math.exp(rates[best - 1]), math.exp(rates[best + 1]), len(x), tuple(flags)
        )
        return Optimum(curve, around, lowest, tuple(flags))
    if pooled.df < MIN_DF:
        flags.append("no_variance")
    m = float(posterior.quantile(0.5))
    vertex = _cubic(rates, means, best)
    low, high = (float(v) for v in posterior.quantile(np.array([0.5 - level / 2, 0.5 + level / 2])))
    if vertex is None or (not low <= vertex <= high and abs(vertex - m) > math.log(CHECK_RATIO)):
        flags.append("checks_disagree")
    side = 0 if (low < rates[0]) == (high > rates[-1]) else -1 if low < rates[0] else 1
    estimate, shown = _answer(posterior, m, (low, high), rates, curve, pooled.df >= MIN_DF, level)
    flags += shown
    estimate = Estimate(
        estimate.value, estimate.low, estimate.high, len(x), tuple(flags), estimate.draws, level
    )
    return Optimum(
        curve,
        estimate,
        lowest,
        tuple(flags),
        None if vertex is None else math.exp(vertex),
        pooled,
        side,
        posterior,
        likelihood,
    )


def _answer(
    posterior: Posterior,
    m: float,
    ends: tuple[float, float],
    rates: np.ndarray,
    curve: LrCurve,
    known: bool,
    level: float,
) -> tuple[Estimate, list[str]]:
    """Turn a posterior into a value with an interval, or a bound where the interval leaves the
    rates tried."""
    low, high = ends
    open_low, open_high = low < rates[0], high > rates[-1]
    end = first_diverged(curve)
    if not (open_low or open_high):
        if not known:
            return Estimate(math.exp(m)), []
        draws = np.exp(posterior.draws(_stream(curve)))
        return Estimate(math.exp(m), math.exp(low), math.exp(high), draws=draws, level=level), []
    if open_low and open_high:
        return Estimate(None), ["flat"]
    if open_high:
        end, flag = (
            (math.exp(end), "bounded_by_divergence") if math.isfinite(end) else (None, "at_edge")
        )
        return Estimate(None, math.exp(low) if known else None, end), [flag]
    return Estimate(None, None, math.exp(high) if known else None), ["at_edge"]


def _stream(curve: LrCurve) -> int:
    """A random stream of the curve's own, the same on every machine."""
    name = repr(sorted((k, str(v)) for k, v in curve.key.items()))
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")


def _edge(curve: LrCurve, rates: np.ndarray, best: int, low: float, high: float) -> Estimate:
    """The best rate is the first or the last one tried: a bound, no number.

    It reaches to the neighbour inside, or further where the noise leaves that open (low, high: ends
    of the posterior, ln(lr)), and outside to a rate that broke down, if one is known.
    """
    end = first_diverged(curve)
    if best == 0 and len(rates) > 1:
        inner = max(rates[1], high) if math.isfinite(high) else rates[1]
        if inner >= rates[-1] and len(rates) > 2:
            return Estimate(None, flags=("at_edge", "flat"))
        return Estimate(None, None, math.exp(inner), flags=("at_edge",))
    if best == 0:
        return Estimate(
            None, None, math.exp(end) if math.isfinite(end) else None, flags=("at_edge",)
        )
    inner = min(rates[best - 1], low) if math.isfinite(low) else rates[best - 1]
    if inner <= rates[0] and len(rates) > 2:
        return Estimate(
            None, None, math.exp(end) if math.isfinite(end) else None, flags=("at_edge", "flat")
        )
    if math.isfinite(end):
        return Estimate(None, math.exp(inner), math.exp(end), flags=("bounded_by_divergence",))
    return Estimate(None, math.exp(inner), None, flags=("at_edge",))


def _level(curve: LrCurve, shape: valley.Shape, pooled: Pooled) -> float:
    """Return the fitted loss at the optimum: what each block's (seed's) runs say of it, those near
    the bottom most."""
    x, y, block = curve.x[curve.usable], curve.y[curve.usable], curve.block[curve.usable]
    height = shape.height(x)
    weight = 1 / (pooled.noise**2 + (pooled.misfit * height) ** 2 + 1e-18)
    blocks = np.unique(block)
    share = [
        min(float(weight[block == b].sum()), 1 / pooled.noise**2) for b in blocks
    ]  # no seed counts more than one
    return float(
        np.average(
            [np.average((y - height)[block == b], weights=weight[block == b]) for b in blocks],
            weights=share,
        )
    )


def _cubic(rates: np.ndarray, means: np.ndarray, best: int) -> float | None:
    """Minimum of the least-squares cubic through the five rates around the best; None if it has
    none between them."""
    at = slice(min(max(0, best - 2), max(0, len(rates) - 5)), max(best + 3, 5))
    x, y = rates[at] - rates[best], means[at]
    if len(x) < 4:
        return None
    slope = np.polyder(np.polyfit(x, y, 3))
    flat = [
        r.real
        for r in np.roots(slope)
        if abs(r.imag) < 1e-12 and np.polyval(np.polyder(slope), r.real) > 0
    ]
    return float(rates[best] + flat[0]) if flat and x[0] <= flat[0] <= x[-1] else None
