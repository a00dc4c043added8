"""The best learning rate of a curve, with an honest interval: from runs to evidence, from a posterior to an answer.

The model of a valley and its constants are in `valley`, the pooling of noise and misfit over a sweep in `posterior`.
Here a curve's runs become numbers for them, and a posterior becomes an optimum, a bound, or nothing: an optimum at the
edge of what was tried, or beside a rate that breaks down, is a bound, and a valley too flat for its noise has none.
"""

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from analysis import valley
from analysis.posterior import Evidence, Pooled, Posterior, gather, weigh
from analysis.results import LEVEL, Estimate
from analysis.table import Curve

MIN_RATES = 4
"""Distinct usable learning rates below which a curve has no fit of its own."""
FEW_RATES = 5
"""Below this many a curve is flagged 'few_points', and no verdict rests on it."""
MIN_RATES_KIN = 3
"""The same where related curves lend it their shape."""
MIN_DF = 10
"""Degrees of freedom of the pooled variance below which there is no interval."""
CHECK_RATIO = 1.3
"""A narrow cubic whose minimum lies outside the interval and differs by more raises the flag 'checks_disagree'."""
GROWTH = (0.0, 0.35, 0.7, 1.05)
"""Growth of the noise's standard deviation tried: as lr to this power."""
MIN_DF_GROWTH = 20
"""Degrees of freedom of repeats below which the noise is taken to be even."""


@dataclass(frozen=True)
class Optimum:
    """The optimum of one curve. `best_lr` has value None where only a bound is known."""

    curve: Curve
    best_lr: Estimate
    lowest: float | None
    """Mean NLL at the best rate tried."""
    flags: tuple[str, ...]
    check_lr: float | None = None
    """Minimum of a cubic through the five rates around the best: a check, not the answer."""
    pooled: Pooled | None = None
    posterior: Posterior | None = field(default=None, repr=False)
    evidence: Evidence | None = field(default=None, repr=False)

    @functools.cached_property
    def shape(self) -> valley.Shape | None:
        """The likeliest valley with its minimum at the posterior's median; None without a fit."""
        if self.posterior is None:
            return None
        e, m = self.evidence, float(self.posterior.quantile(0.5))
        return valley.likeliest(e.x, e.root, e.root @ e.loss, m, self.pooled.noise, self.pooled.misfit)

    @functools.cached_property
    def best_nll(self) -> float | None:
        """The fitted NLL at the optimum; where that is not known, the mean at the best rate tried."""
        if self.shape is None or self.best_lr.value is None:
            return self.lowest
        return _level(self.curve, self.shape, self.pooled)

    def predict(self, lr: np.ndarray) -> np.ndarray | None:
        """Return the fitted NLL at learning rates; None without a fit."""
        return None if self.shape is None else _level(self.curve, self.shape, self.pooled) + self.shape.height(np.log(lr))

    def regret(self, lr: float) -> float | None:
        """Return NLL(lr) - best NLL in nats under the fit; None outside the rates that were tried."""
        x = self.curve.x[self.curve.usable]
        if self.shape is None or not x.min() - 1e-9 <= math.log(lr) <= x.max() + 1e-9:
            return None
        return float(max(self.shape.height(np.array([math.log(lr)]))[0], 0.0))

    def band(self, loss: float) -> tuple[float, float] | None:
        """Return the rates around the best one that lose at most `loss` nats under the fit, within those tried."""
        if self.shape is None:
            return None
        x = self.curve.x[self.curve.usable]
        grid = np.union1d(np.linspace(x.min(), x.max(), 400), [self.shape.m])
        over = np.flatnonzero(self.shape.height(grid) > loss)
        at = int(np.argmin(np.abs(grid - self.shape.m)))
        low = max((int(k) for k in over if k < at), default=-1) + 1
        high = min((int(k) for k in over if k > at), default=len(grid)) - 1
        return float(np.exp(grid[low])), float(np.exp(grid[high]))


def fit_all(curves: Sequence[Curve], level: float = LEVEL, share: bool = False) -> list[Optimum]:
    """Find the optimum of every curve of a sweep, with noise and misfit pooled over all of them.

    share: curves of one group and method but different rank lend each other their curvature (see `_kin`).
    """
    return fit_sweeps([curves], level, share)[0]


def fit_sweeps(sweeps: Sequence[Sequence[Curve]], level: float = LEVEL, share: bool = False) -> list[list[Optimum]]:
    """The same for many sweeps, none of which knows of the others."""
    gathered: list[dict[int, Evidence]] = []
    for curves in sweeps:
        least = MIN_RATES_KIN if share else MIN_RATES
        fit = {k: c for k, c in enumerate(curves) if len(set(c.x[c.usable])) >= least}
        growth = _growth(list(fit.values()))
        gathered.append({k: _evidence(c, growth) for k, c in fit.items()})
    told = [list(g.values()) for g in gathered]
    if share:
        alone = [[e for e in row if len(e.x) >= MIN_RATES] for row in told]
        kin = [_kin(curves, g, lone) for curves, g, lone in zip(sweeps, gathered, weigh(alone))]
        weighed = weigh(told, kin)
    else:
        weighed = weigh(told)
    return [
        [_optimum(c, g.get(k), dict(zip(g, posteriors)).get(k), pooled, level) for k, c in enumerate(curves)]
        for curves, g, (posteriors, pooled) in zip(sweeps, gathered, weighed)
    ]


# ---------------------------------------------------------------- from runs to evidence


def _evidence(curve: Curve, growth: float) -> Evidence:
    use = curve.usable
    return gather(curve.x[use], curve.y[use], curve.block[use], _wall(curve), growth)


def _wall(curve: Curve) -> float:
    """ln of the lowest rate above all usable ones that broke down; infinite without one."""
    top = curve.x[curve.usable].max()
    return float(min(curve.x[~curve.usable & (curve.x > top)], default=math.inf))


def _growth(curves: Sequence[Curve]) -> float:
    """Return how the noise grows with the rate, by the likelihood of repeats near the bottoms of a sweep's valleys."""
    far, rest, df = [], [], 0
    for c in curves:
        x, y, block = c.x[c.usable], c.y[c.usable], c.block[c.usable]
        e = gather(x, y, block)
        if not e.df:
            continue
        at = np.searchsorted(e.x, x)
        left = y - e.loss[at]
        for b in np.unique(block):
            left[block == b] -= left[block == b].mean()
        near = (np.bincount(at)[at] >= 2) & (np.abs(at - e.best) <= 2)
        far += list(x[near] - e.x[e.best])
        rest += list(left[near])
        df += e.df
    if df < MIN_DF_GROWTH or len(far) < MIN_DF_GROWTH:
        return 0.0
    u, r = np.array(far), np.array(rest)

    def log(g: float) -> float:
        return -0.5 * len(u) * math.log((r**2 * np.exp(-2 * g * u)).mean() + 1e-30) - g * u.sum()

    return max(GROWTH, key=lambda g: log(g) - g)  # a light prior for even noise


def _kin(
    curves: Sequence[Curve], told: dict[int, Evidence], alone: tuple[list[Posterior], Pooled]
) -> list[valley.Kin | None]:
    """Say for each curve what the others of its group and method say of its shape: empirical Bayes.

    Asymmetry and curvature of the curves that have a fit of their own give mean and spread (at least 0.2 and 15%); a
    curve that is the only one of its kind gets none.
    """
    posteriors, pooled = alone
    shapes: dict[tuple, list[valley.Shape]] = {}
    fitted = iter(posteriors)
    for k, e in told.items():
        if len(e.x) >= MIN_RATES and 0 < e.best < len(e.x) - 1:
            m = float(next(fitted).quantile(0.5))
            shapes.setdefault(_kind(curves[k]), []).append(
                valley.likeliest(e.x, e.root, e.root @ e.loss, m, pooled.noise, pooled.misfit)
            )
        elif len(e.x) >= MIN_RATES:
            next(fitted)
    out: list[valley.Kin | None] = []
    for k in told:
        found = shapes.get(_kind(curves[k]), [])
        if len(found) < 2:
            out.append(None)
            continue
        a, c = np.array([s.a for s in found]), np.log([s.c for s in found])
        out.append(valley.Kin(float(a.mean()), max(float(a.std(ddof=1)), 0.2), float(np.exp(c.mean())),
                              max(float(c.std(ddof=1)), 0.15)))  # fmt: skip
    return out


def _kind(curve: Curve) -> tuple:
    return curve.group, curve.key["method"]


# ---------------------------------------------------------------- from a posterior to an answer


def _optimum(
    curve: Curve, evidence: Evidence | None, posterior: Posterior | None, pooled: Pooled, level: float
) -> Optimum:
    x, y = curve.x[curve.usable], curve.y[curve.usable]
    if not len(x):
        return Optimum(curve, Estimate(None, flags=("no_usable_points",)), None, ("no_usable_points",))
    rates = np.array(sorted(set(x)))
    means = np.array([y[x == v].mean() for v in rates]) if evidence is None else evidence.loss
    best = int(np.argmin(means))
    lowest = float(np.mean(y[x == rates[best]]))
    flags = [] if len(rates) >= FEW_RATES else ["few_points"]
    if best in (0, len(rates) - 1):
        ends = (-math.inf, math.inf) if posterior is None else tuple(posterior.quantile(np.array([0.025, 0.975])))
        bound = _edge(curve, rates, best, *ends)
        flags += bound.flags
        return Optimum(curve, Estimate(None, bound.low, bound.high, len(x), tuple(flags)), lowest, tuple(flags),
                       pooled=pooled)  # fmt: skip
    if evidence is None:
        around = Estimate(None, math.exp(rates[best - 1]), math.exp(rates[best + 1]), len(x), tuple(flags))
        return Optimum(curve, around, lowest, tuple(flags))
    if pooled.df < MIN_DF:
        flags.append("no_variance")
    m = float(posterior.quantile(0.5))
    vertex = _cubic(rates, means, best)
    low, high = (float(v) for v in posterior.quantile(np.array([0.5 - level / 2, 0.5 + level / 2])))
    if vertex is None or (not low <= vertex <= high and abs(vertex - m) > math.log(CHECK_RATIO)):
        flags.append("checks_disagree")
    estimate, shown = _answer(posterior, m, (low, high), rates, curve, pooled.df >= MIN_DF, level)
    flags += shown
    estimate = Estimate(estimate.value, estimate.low, estimate.high, len(x), tuple(flags), estimate.draws, level)
    return Optimum(curve, estimate, lowest, tuple(flags), None if vertex is None else math.exp(vertex), pooled,
                   posterior, evidence)  # fmt: skip


def _answer(
    posterior: Posterior, m: float, ends: tuple[float, float], rates: np.ndarray, curve: Curve, known: bool,
    level: float,
) -> tuple[Estimate, list[str]]:  # fmt: skip
    """Turn a posterior into a value with an interval, or a bound where the interval leaves the rates tried."""
    low, high = ends
    open_low, open_high = low < rates[0], high > rates[-1]
    wall = _wall(curve)
    if not (open_low or open_high):
        if not known:
            return Estimate(math.exp(m)), []
        draws = np.exp(posterior.draws(_stream(curve)))
        return Estimate(math.exp(m), math.exp(low), math.exp(high), draws=draws, level=level), []
    if open_low and open_high:
        return Estimate(None), ["flat"]
    if open_high:
        end, flag = (math.exp(wall), "bounded_by_divergence") if math.isfinite(wall) else (None, "at_edge")
        return Estimate(None, math.exp(low) if known else None, end), [flag]
    return Estimate(None, None, math.exp(high) if known else None), ["at_edge"]


def _stream(curve: Curve) -> int:
    """A random stream of the curve's own, the same on every machine."""
    name = repr(sorted((k, str(v)) for k, v in curve.key.items()))
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")


def _edge(curve: Curve, rates: np.ndarray, best: int, low: float, high: float) -> Estimate:
    """The best rate is the first or the last one tried: a bound, no number.

    It reaches to the neighbour inside, or further where the noise leaves that open (low, high: ends of the posterior,
    ln(lr)), and outside to a rate that broke down, if one is known.
    """
    wall = _wall(curve)
    if best == 0 and len(rates) > 1:
        inner = max(rates[1], high) if math.isfinite(high) else rates[1]
        if inner >= rates[-1] and len(rates) > 2:
            return Estimate(None, flags=("at_edge", "flat"))
        return Estimate(None, None, math.exp(inner), flags=("at_edge",))
    if best == 0:
        return Estimate(None, None, math.exp(wall) if math.isfinite(wall) else None, flags=("at_edge",))
    inner = min(rates[best - 1], low) if math.isfinite(low) else rates[best - 1]
    if inner <= rates[0] and len(rates) > 2:
        return Estimate(None, None, math.exp(wall) if math.isfinite(wall) else None, flags=("at_edge", "flat"))
    if math.isfinite(wall):
        return Estimate(None, math.exp(inner), math.exp(wall), flags=("bounded_by_divergence",))
    return Estimate(None, math.exp(inner), None, flags=("at_edge",))


def _level(curve: Curve, shape: valley.Shape, pooled: Pooled) -> float:
    """Return the fitted loss at the optimum: mean over blocks (seeds) of what their runs, near the bottom, say."""
    x, y, block = curve.x[curve.usable], curve.y[curve.usable], curve.block[curve.usable]
    height = shape.height(x)
    weight = 1 / (pooled.noise**2 + (pooled.misfit * height) ** 2 + 1e-18)
    return float(np.mean([np.average((y - height)[block == b], weights=weight[block == b]) for b in np.unique(block)]))


def _cubic(rates: np.ndarray, means: np.ndarray, best: int) -> float | None:
    """Minimum of the least-squares cubic through the five rates around the best; None if it has none between them."""
    at = slice(min(max(0, best - 2), max(0, len(rates) - 5)), max(best + 3, 5))
    x, y = rates[at] - rates[best], means[at]
    if len(x) < 4:
        return None
    slope = np.polyder(np.polyfit(x, y, 3))
    flat = [r.real for r in np.roots(slope) if abs(r.imag) < 1e-12 and np.polyval(np.polyder(slope), r.real) > 0]
    return float(rates[best] + flat[0]) if flat and x[0] <= flat[0] <= x[-1] else None
