"""Meta-analysis: drift with the rank, pooling over models, meta-regression, correlation in groups.

Also: the slope of a line through censored values, and the jackknife. Where possible, estimates are
computed from draws (equally likely values), so that asymmetric intervals stay asymmetric.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats
from scipy.special import log_ndtr

from analysis.inference.estimate import LEVEL, PROBABILITIES, Estimate, Part, Spread, from_draws

BASES = "bases"
"""Name of the rows of a meta-regression."""
SHARPEST = 0.01
"""Smallest standard deviation that `censored_slope` fits. Without this limit, values exactly on a
line have no maximum of the likelihood."""


@dataclass(frozen=True)
class Drift:
    """The change of ln(best LR) per doubling of the rank."""

    slope: Estimate
    p_slope: float | None = None
    """Two-sided p-value of 'no slope'."""
    p_equal: float | None = None
    """p-value of 'all ranks have the same best LR' (Cochran's Q, chi^2 with k - 1 df)."""


def drift(ranks: Sequence[float], draws: Sequence[np.ndarray], n: int) -> Drift:
    """Fit the slope of ln(best LR) over log2(rank) by least squares, weighted by 1 / variance.

    If three or more optima scatter about the line by more than their own errors explain, the
    slope's spread is multiplied by sqrt(chi^2 / df), the Particle Data Group's scale factor.
    `draws`: for each curve, equally likely values of ln(best LR). `n`: number of runs.
    """
    if len(draws) < 2:
        few = "needs two or more optima with intervals, and none at an edge"
        return Drift(Estimate(None, n=n, flags=(few,)))
    x, y = np.log2(np.asarray(ranks, float)), np.array([np.median(d) for d in draws])
    w = 1 / np.array([np.var(d) for d in draws])
    centre = (w * x).sum() / w.sum()
    spread = float((w * (x - centre) ** 2).sum())
    if spread <= 1e-12:
        return Drift(Estimate(None, n=n, flags=("one rank only",)))
    k = w * (x - centre) / spread
    slope = float(k @ y)
    off = sum(ki * (d - yi) for ki, d, yi in zip(k, draws, y))
    left = len(draws) - 2
    if left > 0:
        rest = y - np.average(y, weights=w) - slope * (x - centre)
        birge = float((w * rest**2).sum()) / left
        if birge > 1:
            off = off * math.sqrt(birge)
    sloped = slope + off
    p = 2 * min(float((sloped <= 0).mean()), float((sloped >= 0).mean()))
    q = float((w * (y - np.average(y, weights=w)) ** 2).sum())
    p_equal = float(stats.chi2.sf(q, len(draws) - 1))
    return Drift(from_draws(sloped, n), max(p, 2 / len(sloped)), p_equal)


@dataclass(frozen=True)
class RandomEffects:
    """A random-effects mean over k groups, such as ln ratios of several models, with its interval.

    `tau`: standard deviation between groups; `i2`: its share of the total variance (I^2).
    `p_equal`: p-value of 'all groups are equal' (Cochran's Q). `low_next`, `high_next`: prediction
    interval for the value of another group.
    """

    mean: float
    low: float
    high: float
    tau: float
    i2: float
    p_equal: float
    low_next: float
    high_next: float
    k: int


def random_effects(
    values: Sequence[float], errors: Sequence[float], level: float = LEVEL
) -> RandomEffects:
    """Pool values with known standard errors; ValueError for fewer than two.

    A `meta_regression` on a constant. The prediction interval is by Higgins et al. (2009), with
    k - 2 degrees of freedom (1 at k = 2).
    """
    y, v = np.asarray(values, float), np.asarray(errors, float) ** 2
    k, w = len(y), 1 / v
    if k < 2:
        raise ValueError("random_effects needs two or more values")
    fit = meta_regression(y, v, np.ones((k, 1)))
    mean, error = float(fit.beta[0]), math.sqrt(fit.cov[0, 0])
    half = stats.t.ppf(0.5 + level / 2, k - 1) * error
    ahead = stats.t.ppf(0.5 + level / 2, max(k - 2, 1)) * math.hypot(fit.tau, error)
    typical = (k - 1) / (w.sum() - (w**2).sum() / w.sum())
    q = float((w * (y - (w @ y) / w.sum()) ** 2).sum())
    share, p_equal = fit.tau**2 / (fit.tau**2 + typical), float(stats.chi2.sf(q, k - 1))
    ends, next_ends = (mean - half, mean + half), (mean - ahead, mean + ahead)
    return RandomEffects(mean, *ends, fit.tau, share, p_equal, *next_ends, k)


@dataclass(frozen=True)
class MetaRegression:
    """A random-effects meta-regression over n rows; its coefficients have Student's intervals.

    `beta` [k]: coefficients; `cov` [k, k]: their covariance; `tau`: sd between rows.
    """

    beta: np.ndarray
    cov: np.ndarray
    tau: float
    df: int
    n: int

    def term(self, k: int) -> Estimate:
        """Return a coefficient with its 95% interval; no interval without degrees of freedom."""
        if self.df < 1:
            return Estimate(float(self.beta[k]), n=self.n, spread=Spread(self.n, BASES))
        error = math.sqrt(self.cov[k, k])
        spread = Spread(self.n, BASES, (Part(error * math.sqrt(self.n), self.df),))
        draws = self.beta[k] + error * stats.t.ppf(PROBABILITIES, self.df)
        return from_draws(draws, self.n, spread=spread)

    def p_of(self, k: int, value: float) -> float | None:
        """Return the p-value of 'coefficient k has this value' (t test)."""
        if self.df < 1:
            return None
        off = float(self.beta[k] - value) / math.sqrt(self.cov[k, k])
        return 2 * float(stats.t.sf(abs(off), self.df))


def meta_regression(
    y: np.ndarray, v: np.ndarray, design: np.ndarray, wider: MetaRegression | None = None
) -> MetaRegression:
    """Regress values y [n] with known variances v [n] on a design [n, k].

    The variance between rows is by Paule & Mandel (1982). With `wider`, a regression over more
    rows, that variance and its degrees of freedom come from `wider`. Errors of the coefficients are
    by Knapp & Hartung (2003), and never below the errors from v alone.
    """
    n, k = design.shape
    df = n - k

    def solve(tau2: float) -> tuple[np.ndarray, np.ndarray, float]:
        w = 1 / (v + tau2)
        inverse = np.linalg.inv(design.T @ (w[:, None] * design))
        beta = inverse @ design.T @ (w * y)
        return beta, inverse, float((w * (y - design @ beta) ** 2).sum())

    if wider is not None:
        return MetaRegression(*solve(wider.tau**2)[:2], wider.tau, wider.df, n)
    tau2 = 0.0
    if df > 0 and solve(0.0)[2] > df:
        top = 10 * float(np.var(y) + v.max()) + 1e-9
        tau2 = float(optimize.brentq(lambda t: solve(t)[2] - df, 0.0, top))
    beta, inverse, q = solve(tau2)
    cov = inverse * max(q / df, 1.0) if df > 0 else inverse
    return MetaRegression(beta, cov, math.sqrt(tau2), df, n)


def within_groups(groups: Sequence[Sequence[tuple[float, float]]], of: str) -> Estimate:
    """Return Spearman's correlation of pairs about their group's means, with its interval.

    Subtracting the means of k groups is a partial correlation given k - 1 indicators of a group.
    Fisher's z = atanh(r) of a partial correlation given q variables among n pairs has the variance
    1 / (n - q - 3) (Fisher, Metron 3, 1924): here 1 / (n - k - 2). For ranks it is 1 + r^2 / 2
    times as large (Bonett & Wright, Psychometrika 65, 2000).

    `groups`: the (x, y) pairs of each group; groups of one pair do not count. `of`: name of a pair
    in reports. There is no value if n - k - 2 is below 1.
    """
    known = [np.asarray(g, float) for g in groups if len(g) > 1]
    n = sum(map(len, known))
    left = n - len(known) - 2
    if left < 1:
        return Estimate(None, n=n)
    x, y = np.concatenate([g - g.mean(0) for g in known]).T
    r = float(stats.spearmanr(x, y).statistic)
    error = math.sqrt((1 + r**2 / 2) / left)
    z = math.atanh(min(max(r, -0.999), 0.999)) + stats.norm.ppf(PROBABILITIES) * error
    spread = Spread(n, of, (Part(error * math.sqrt(n), math.inf),))
    return from_draws(np.tanh(z), n, spread=spread)


def censored_slope(x: Sequence[float], low: Sequence[float], high: Sequence[float]) -> float:
    """Return the slope of a line by maximum likelihood (Tobin, Econometrica 26, 1958).

    The values are normal about the line, with one standard deviation sigma. A value counts with its
    density where it is known (`low` equals `high`), and with the probability of its range where it
    is censored (one of them is infinite). In (intercept, slope, 1) / sigma the log likelihood is
    concave (Olsen, Econometrica 46, 1978), so the maximum found is the only one. NaN with fewer
    than two different x of known values.
    """
    at, a, b = (np.asarray(v, float) for v in (x, low, high))
    known, above = a == b, np.isinf(b)
    if len(set(at[known])) < 2:
        return math.nan
    centre = at[known].mean()
    design = np.stack([np.ones(len(at)), at - centre], 1)
    line = np.linalg.lstsq(design[known], a[known], rcond=None)[0]
    if known.all():
        return float(line[1])
    ends = np.where(above, a, b)

    def loss(p: np.ndarray) -> tuple[float, np.ndarray]:
        """Return minus the log likelihood and its gradient at (line, 1) / sigma."""
        z = p[2] * ends - design @ p[:2]  # residuals over sigma
        tail = np.where(above, -z, z)
        log_tail = log_ndtr(tail)
        hazard = np.exp(-0.5 * tail**2 - 0.5 * math.log(2 * math.pi) - log_tail)
        dz = np.where(known, z, np.where(above, hazard, -hazard))
        total = np.where(known, 0.5 * z**2, -log_tail).sum() - known.sum() * math.log(p[2])
        steep = float(dz @ ends) - known.sum() / p[2]
        return float(total), np.append(-design.T @ dz, steep)

    rest = a[known] - design[known] @ line
    sigma = max(float(np.sqrt((rest**2).mean())), 10 * SHARPEST)
    bounds = [(None, None), (None, None), (1e-6, 1 / SHARPEST)]
    start = np.append(line, 1.0) / sigma
    found = optimize.minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds)
    return float(found.x[1] / found.x[2])


def pseudo_values(whole: float, without: Sequence[float]) -> list[float]:
    """Return the jackknife's pseudo-values of an estimate, one per unit (Tukey, 1958).

    `whole`: the estimate from all units; `without`: estimates that leave out one unit each. The
    jackknife's estimate is the mean of the pseudo-values, with Student's interval (n - 1 df). For a
    least-squares slope over units that share abscissas, the pseudo-values are the units' slopes.
    """
    n = len(without)
    return [n * whole - (n - 1) * v for v in without]
