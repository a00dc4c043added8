"""The best learning rate of a curve: an asymmetric convex fit of NLL over log LR, with an honest interval.

Model (LINEX; Varian 1975), x = ln(lr):   y = y_seed + c (exp(a (x - m)) - a (x - m) - 1) / a^2,   c > 0.
m is the optimum; a = 0 is the parabola c (x - m)^2 / 2; a > 0 rises faster on the right, as real valleys do.
A seed has an intercept of its own, since one seed sees the same batches at every rate. Standard deviation of a
point: s sqrt(1 + (d / D)^2), d its height over the curve's lowest point, D the height of the best rate's
neighbours (times WINDOW): the bottom of the valley counts, its walls only steer. s is pooled over all curves of a
sweep, so noise that grows with the rate and misfit of the family both widen the interval. For fixed (m, a) the rest is
linear, so the profile likelihood of m is computed on a grid, without starting values.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import stats

from analysis.results import Estimate
from analysis.table import Curve

WINDOW = 1.0
"""Height, in units of the best rate's neighbours, at which a point counts half. Assumption, set by simulation with
generators outside the family (LOG.md); the calibration study refines it."""
A_MAX = 2.5
"""Bound on |a| per unit of ln(lr): at 2.5 the steep side rises about 14 times as fast as the flat one at a factor 2."""
MIN_RATES = 5
"""Distinct usable learning rates below which there is no fit: LINEX has four parameters."""
MIN_DF = 9
"""Degrees of freedom of the pooled variance below which there is no interval."""
CHECK_RATIO = 1.3
"""A narrow parabola whose vertex differs by more than this factor raises the flag 'checks_disagree'."""
LEVEL = 0.95
_M_STEPS, _A_STEPS, _PAD = 241, 31, 0.7


@dataclass(frozen=True)
class Optimum:
    """The optimum of one curve. `best_lr` has value None where only a bound is known."""

    curve: Curve
    best_lr: Estimate
    best_nll: float | None
    flags: tuple[str, ...]
    parabola_lr: float | None = None
    """Vertex of a parabola through the five rates around the best: a check, not the answer."""
    noise: float | None = None
    """Pooled standard deviation s, in nats."""
    df: int = 0
    _fit: "_Fit | None" = field(default=None, repr=False)

    def predict(self, lr: np.ndarray) -> np.ndarray | None:
        """Return the fitted NLL at learning rates; None without a fit."""
        return None if self._fit is None else self._fit.predict(np.log(lr))

    def regret(self, lr: float) -> float | None:
        """Return NLL(lr) - best NLL in nats under the fit; None outside the rates that were tried."""
        x = self.curve.x[self.curve.usable]
        if self._fit is None or self.best_lr.value is None or not x.min() <= math.log(lr) <= x.max():
            return None
        return float(self._fit.predict(np.array([math.log(lr)]))[0] - self._fit.predict(np.array([self._fit.m]))[0])


@dataclass(frozen=True)
class _Fit:
    m: float
    a: float
    c: float
    level: float
    """Mean of the seeds' intercepts."""
    residuals: np.ndarray
    n_params: int
    grid: np.ndarray
    profile: np.ndarray
    """Least weighted sum of squares over all else, at each m of the grid."""

    def predict(self, x: np.ndarray) -> np.ndarray:
        return self.level + self.c * linex(x - self.m, self.a)


def linex(u: np.ndarray, a: float | np.ndarray) -> np.ndarray:
    """Return (exp(a u) - a u - 1) / a^2, and its limit u^2/2 at a = 0."""
    t = a * u
    small = np.abs(t) < 1e-3
    series = u * u * (0.5 + t / 6 + t * t / 24)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        full = (np.expm1(t) - t) / np.where(np.asarray(a) == 0, 1.0, a) ** 2
    return np.where(small, series, full)


def fit_all(curves: Sequence[Curve]) -> list[Optimum]:
    """Find the optimum of every curve of a sweep, with the noise pooled over all of them."""
    fittable = [c for c in curves if len(set(c.x[c.usable])) >= MIN_RATES]
    noise, df, fits = _pooled(fittable)
    by_id = {id(c): f for c, f in zip(fittable, fits)}
    return [_optimum(c, by_id.get(id(c)), noise, df) for c in curves]


# ---------------------------------------------------------------- fit


def _weights(curve: Curve, noise: float) -> np.ndarray:
    """Relative weight of each usable point, 1 at the bottom of the valley."""
    x, y = curve.x[curve.usable], curve.y[curve.usable]
    rates = sorted(set(x))
    means = np.array([y[x == v].mean() for v in rates])
    best = int(np.argmin(means))
    beside = [means[k] - means[best] for k in (best - 1, best + 1) if 0 <= k < len(rates)]
    scale = max(WINDOW * float(np.mean(beside)), 3 * noise)
    return 1 / (1 + (np.maximum(y - means[best], 0.0) / scale) ** 2)


def _pooled(curves: Sequence[Curve]) -> tuple[float, int, list[_Fit]]:
    """Fit all curves with one noise s: the weighted squares over the degrees of freedom."""
    noise = 3e-3
    fits: list[_Fit] = []
    df = 0
    for _ in range(6):
        fits = [_fit(c, noise) for c in curves]
        df = sum(len(f.residuals) - f.n_params for f in fits)
        if df <= 0:
            return noise, 0, fits
        weights = [_weights(c, noise) for c in curves]
        squares = sum(float((f.residuals**2 * w).sum()) for f, w in zip(fits, weights))
        squares /= float(np.concatenate(weights).mean())  # unbiased where the noise is even, cautious where it grows
        # Repeats at one rate measure the noise without any model; s is never taken below them.
        new = max(math.sqrt(squares / df), _repeat_noise(curves), 1e-7)
        if abs(math.log(new / noise)) < 1e-3:
            break
        noise = new
    return noise, df, fits


def _repeat_noise(curves: Sequence[Curve]) -> float:
    """Return the pooled standard deviation of seeds about their cell's mean, within cells near the bottom, after
    the seeds' common shifts are taken out; 0 with fewer than 4 degrees of freedom."""
    squares, df = 0.0, 0
    for curve in curves:
        x, y, seed = curve.x[curve.usable], curve.y[curve.usable], curve.seed[curve.usable]
        cells = [v for v in set(x) if (x == v).sum() >= 2]
        near = np.isin(x, cells)
        seeds = sorted(set(seed[near]))
        if len(cells) < 2 or len(seeds) < 2:
            continue
        columns = [x[near] == v for v in cells] + [seed[near] == s for s in seeds[1:]]
        design = np.stack(columns, axis=1).astype(float)
        _, rest, rank, _ = np.linalg.lstsq(design, y[near], rcond=None)
        squares += float(rest[0]) if len(rest) else 0.0
        df += int(near.sum()) - int(rank)
    return math.sqrt(squares / df) if df >= 4 else 0.0


def _fit(curve: Curve, noise: float) -> _Fit:
    x, y, seed = curve.x[curve.usable], curve.y[curve.usable], curve.seed[curve.usable]
    w = _weights(curve, noise) / noise**2
    wall = curve.x[~curve.usable & (curve.x > x.max())] if (~curve.usable).any() else np.array([])
    grid = np.linspace(x.min() - _PAD, x.max() + _PAD, _M_STEPS)
    a_grid = np.linspace(-A_MAX, A_MAX, _A_STEPS)
    sse, _c = _surface(x, y, seed, w, grid, a_grid, wall, noise)
    profile = sse.min(axis=1)
    i, j = np.unravel_index(int(np.argmin(sse)), sse.shape)
    # polish within the best grid cell
    fine_m = np.linspace(grid[max(i - 1, 0)], grid[min(i + 1, _M_STEPS - 1)], 41)
    fine_a = np.linspace(a_grid[max(j - 1, 0)], a_grid[min(j + 1, _A_STEPS - 1)], 21)
    fine, fine_c = _surface(x, y, seed, w, fine_m, fine_a, wall, noise)
    k, l = np.unravel_index(int(np.argmin(fine)), fine.shape)
    m, a, slope = float(fine_m[k]), float(fine_a[l]), float(fine_c[k, l])
    rest = y - slope * linex(x - m, a)
    levels = {s: float(np.average(rest[seed == s], weights=w[seed == s])) for s in set(seed)}
    residuals = rest - np.array([levels[s] for s in seed])
    profile = np.minimum(profile, np.interp(grid, fine_m, fine.min(axis=1), left=np.inf, right=np.inf))
    return _Fit(m, a, slope, float(np.mean(list(levels.values()))), residuals, len(levels) + 3, grid, profile)


def _surface(x, y, seed, w, m_grid, a_grid, wall, noise) -> tuple[np.ndarray, np.ndarray]:
    """Return the weighted sum of squares and the slope c at every (m, a), seed intercepts taken out.

    A learning rate that diverged (`wall`) only says that the loss there is no lower than the best one seen: a
    steeper bound would be false for a cliff.
    """
    u = x[None, None, :] - m_grid[:, None, None]
    f = linex(u, a_grid[None, :, None])
    y_c, f_c = y.astype(float).copy(), f.copy()
    for s in set(seed):
        at = seed == s
        share = w[at] / w[at].sum()
        y_c[at] -= (share * y[at]).sum()
        f_c[..., at] -= (f[..., at] * share).sum(-1, keepdims=True)
    ff, fy, yy = (w * f_c**2).sum(-1), (w * f_c * y_c).sum(-1), float((w * y_c**2).sum())
    c = np.where(ff > 0, np.maximum(fy, 0) / np.where(ff > 0, ff, 1), 0.0)
    sse = yy - 2 * c * fy + c**2 * ff
    if len(wall):
        base = np.average(y[None, None, :] - c[..., None] * f, weights=np.broadcast_to(w, f.shape), axis=-1)
        for x_wall in wall:
            there = base + c * linex(x_wall - m_grid[:, None], a_grid[None, :])
            sse = sse + (np.maximum(0.0, y.min() - there) / noise) ** 2
    return sse, c


# ---------------------------------------------------------------- from a fit to an answer


def _optimum(curve: Curve, fit: _Fit | None, noise: float, df: int) -> Optimum:
    x, y = curve.x[curve.usable], curve.y[curve.usable]
    if not len(x):
        return Optimum(curve, Estimate(None, flags=("no_usable_points",)), None, ("no_usable_points",))
    rates = np.array(sorted(set(x)))
    means = np.array([y[x == v].mean() for v in rates])
    best = int(np.argmin(means))
    flags: list[str] = [] if len(rates) >= MIN_RATES else ["few_points"]
    walled = bool((~curve.usable & (curve.x > rates[-1])).any())
    n = len(x)
    if best in (0, len(rates) - 1) and len(rates) > 0:
        bound = _edge(curve, rates, best, walled)
        flags += list(bound.flags)
        return Optimum(curve, Estimate(bound.value, bound.low, bound.high, n, tuple(flags)), float(means[best]),
                       tuple(flags), noise=noise, df=df, _fit=fit)  # fmt: skip
    if fit is None:
        around = Estimate(None, math.exp(rates[best - 1]), math.exp(rates[best + 1]), n, tuple(flags))
        return Optimum(curve, around, float(means[best]), tuple(flags))
    inside = rates[0] <= fit.m <= rates[-1]
    low, high = _interval(fit, df)
    bounded = low is not None and high is not None
    if df >= MIN_DF and (not bounded or fit.c <= 0):
        flags.append("flat")
    if df < MIN_DF:
        flags.append("no_variance")
    if not inside:
        flags.append("at_edge")  # the points say inside, the curve outside: only the interval's inner end is safe
        if fit.m > rates[-1]:
            side = (math.exp(rates[best - 1] if low is None else min(low, rates[best])), None)
        else:
            side = (None, math.exp(rates[best + 1] if high is None else max(high, rates[best])))
        return Optimum(curve, Estimate(None, *side, n, tuple(flags)), float(means[best]), tuple(flags),
                       noise=noise, df=df, _fit=fit)  # fmt: skip
    vertex = _parabola(rates, means, best)
    apart = 0.0 if vertex is None else abs(vertex - fit.m)
    if vertex is None or apart > math.log(CHECK_RATIO):
        flags.append("checks_disagree")
    ends: tuple[float | None, float | None] = (None, None)
    if bounded:  # the family itself is in doubt by as much as the check disagrees: added in quadrature
        ends = (math.exp(fit.m - math.hypot(fit.m - low, apart)), math.exp(fit.m + math.hypot(high - fit.m, apart)))
    estimate = Estimate(math.exp(fit.m), *ends, n, tuple(flags))
    return Optimum(curve, estimate, fit.level, tuple(flags), None if vertex is None else math.exp(vertex),
                   noise, df, fit)  # fmt: skip


def _edge(curve: Curve, rates: np.ndarray, best: int, walled: bool) -> Estimate:
    """An optimum at the edge of what was tried is a bound: beyond the neighbour, up to a divergence if one is known."""
    wall = math.exp(curve.x[~curve.usable & (curve.x > rates[-1])].min()) if walled else None
    if best == 0:
        return Estimate(None, None, math.exp(rates[1]) if len(rates) > 1 else wall, flags=("at_edge",))
    low = math.exp(rates[best - 1])
    if walled:
        return Estimate(None, low, wall, flags=("bounded_by_divergence",))
    return Estimate(None, low, None, flags=("at_edge",))


def _interval(fit: _Fit, df: int) -> tuple[float | None, float | None]:
    """Return the ends of the profile-likelihood interval in x; None where it is open within the grid."""
    if df < MIN_DF:
        return None, None
    cut = float(fit.profile.min()) + stats.t.ppf(0.5 + LEVEL / 2, df) ** 2
    inside = np.flatnonzero(fit.profile <= cut)
    first, last = int(inside[0]), int(inside[-1])
    low = None if first == 0 else _cross(fit, first - 1, first, cut)
    high = None if last == len(fit.grid) - 1 else _cross(fit, last + 1, last, cut)
    return low, high


def _cross(fit: _Fit, outside: int, inside: int, cut: float) -> float:
    p, q = fit.profile[outside], fit.profile[inside]
    share = 1.0 if not np.isfinite(p) or p == q else (cut - q) / (p - q)
    return float(fit.grid[inside] + share * (fit.grid[outside] - fit.grid[inside]))


def _parabola(rates: np.ndarray, means: np.ndarray, best: int) -> float | None:
    """Vertex of the least-squares parabola through the five rates around the best; None if it opens downward."""
    at = slice(max(0, best - 2), best + 3)
    c2, c1, _ = np.polyfit(rates[at] - rates[best], means[at], 2) if len(rates[at]) >= 3 else (0.0, 0.0, 0.0)
    return float(rates[best] - c1 / (2 * c2)) if c2 > 0 else None
