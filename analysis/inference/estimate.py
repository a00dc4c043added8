"""Estimates (values with interval, n and flags) over seeds and groups, and their text form.

Where possible, they are computed from draws (equally likely values), so that asymmetric intervals
stay asymmetric.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import optimize, stats
from scipy.special import log_ndtr

SEEDS = "seeds at each optimum"
MAX_NEEDED = 64
"""More units than this are reported as 'more than'."""
POWER = 0.8
"""Probability that the needed number of units decides a claim, if the present value is true."""


@dataclass(frozen=True)
class Part:
    """A variance between units that an interval may be computed from."""

    sd: float
    """Standard deviation between units, on the scale of the estimate's errors (ln for ratios)."""
    df: float
    """Its degrees of freedom now (infinite: it is known); one more unit adds `per_unit`."""
    per_unit: float = 1.0


@dataclass(frozen=True)
class Spread:
    """The independent units of an interval, and how its width depends on their number."""

    n: int
    """Present number of units; `of` says what a unit is."""
    of: str = SEEDS
    parts: tuple[Part, ...] = ()
    """At each level, the part with the widest interval counts. Empty: the width of the interval is
    proportional to 1 / sqrt(n)."""
    shared: float = 0.0
    """Standard deviation of an error that more units do not reduce, such as that of a best LR."""

    def at(self, n: int, level: float) -> tuple[float, float, float]:
        """Return the half-width of the interval, the standard error and its df with n units."""
        sides = []
        for part in self.parts:
            df = part.df + part.per_unit * (n - self.n)
            error = part.sd / math.sqrt(n)
            sides.append((float(stats.t.ppf(0.5 + level / 2, df)) * error, error, df))
        half, error, df = max(sides)
        known = float(stats.norm.ppf(0.5 + level / 2)) * self.shared
        return math.hypot(half, known), math.hypot(error, self.shared), df

    def sharing(self, error: float) -> "Spread":
        """Return the spread with one more error that all units share."""
        return dataclasses.replace(self, shared=math.hypot(self.shared, error))


def needed(
    spread: Spread,
    value: float,
    interval: Sequence[float],
    margin: Sequence[float],
    level: float,
    fewest: int = 1,
    most: int = MAX_NEEDED,
) -> int | None:
    """Return the number of units, from `fewest` to `most`, that decides with probability POWER.

    None if `most` are not enough. `interval` holds the present ends, `margin` may have infinite
    ends. For ratios, these and `value` are logarithms.

    The present value and variances are taken as true. With n units, the estimate X has standard
    error s / sqrt(n) and the interval X +- h, h = t(level, df(n)) s / sqrt(n). So a margin [a, b]
    decides with the largest of P(a + h <= X <= b - h), P(X > b + h) and P(X < a - h). (X - value) /
    error is taken to follow Student's t, which approximates the noncentral t of the exact power
    (Chow, Shao & Wang, Sample Size Calculations in Clinical Research, 2003, chapter 3).
    """
    below, above = value - interval[0], interval[1] - value
    if not (below > 0 and above > 0 and math.isfinite(below + above)):
        return None
    if not spread.parts:  # only the interval is known: its variance counts as known
        units = max(spread.n, 1)
        sd = (below + above) / 2 * math.sqrt(units) / float(stats.norm.ppf(0.5 + level / 2))
        spread = Spread(units, spread.of, (Part(sd, math.inf),))
    half_now, *_ = spread.at(spread.n, level)
    # Distances to the margin's ends, converted to the scale of `Part.sd`.
    to_low = (value - margin[0]) * half_now / (below if value >= margin[0] else above)
    to_high = (margin[1] - value) * half_now / (above if value <= margin[1] else below)
    for n in range(max(fewest, spread.n + 1), most + 1):
        half, error, df = spread.at(n, level)

        def chance(room: float) -> float:
            return float(stats.t.cdf((room - half) / error, df))  # noqa: B023

        inside = chance(to_low) + chance(to_high) - 1
        if max(inside, chance(-to_low), chance(-to_high)) >= POWER:
            return n
    return None


N_DRAWS = 32_000
PROBABILITIES = (np.arange(N_DRAWS) + 0.5) / N_DRAWS
"""Probabilities whose quantiles are taken as equally likely draws."""
LEVEL = 0.95
"""Default level of an interval; sweeps with more than one look use a higher level."""
AT_LEAST = "at_least"
"""Flag: the estimated quantity is a lower bound."""


@dataclass(frozen=True)
class Estimate:
    """A number with its interval. `value` is None where only a bound is known (`low` or `high`)."""

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    flags: tuple[str, ...] = ()
    draws: np.ndarray | None = field(default=None, repr=False, compare=False)
    """Equally likely values, if there is an interval; used to combine estimates."""
    level: float = LEVEL
    spread: Spread | None = field(default=None, repr=False, compare=False)
    """How the interval depends on the number of units; None: not known."""

    def plain(self) -> dict[str, Any]:
        """Return plain values for JSON, without the draws and the spread."""
        values = {k: v for k, v in vars(self).items() if k not in ("draws", "spread")}
        return {**values, "flags": list(self.flags)}

    def has_interval(self) -> bool:
        """Return whether both ends are known."""
        return self.low is not None and self.high is not None

    @property
    def interval(self) -> tuple[float, float]:
        """Both ends; ValueError where one is unknown."""
        if self.low is None or self.high is None:
            raise ValueError("this estimate has no interval")
        return self.low, self.high

    @property
    def log_draws(self) -> np.ndarray:
        """ln of the equally likely values; ValueError where there are none."""
        if self.draws is None:
            raise ValueError("this estimate has no draws")
        return np.log(self.draws)


def from_draws(
    draws: np.ndarray,
    n: int,
    level: float = LEVEL,
    flags: tuple[str, ...] = (),
    spread: Spread | None = None,
) -> Estimate:
    """Return the median of equally likely values and their equal-tailed interval."""
    # hazen: the k-th of N sorted values is the quantile of (k - 1/2) / N, as in PROBABILITIES
    at = [0.5 - level / 2, 0.5, 0.5 + level / 2]
    low, value, high = (float(v) for v in np.quantile(draws, at, method="hazen"))
    return Estimate(value, low, high, n, flags, draws, level, spread)


def exp_of(e: Estimate) -> Estimate:
    """Convert an estimate of a logarithm to the original scale."""
    if e.value is None:
        return e
    draws = None if e.draws is None else np.exp(e.draws)
    low, high = exp_or_none(e.low), exp_or_none(e.high)
    return Estimate(math.exp(e.value), low, high, e.n, e.flags, draws, e.level, e.spread)


def exp_or_none(value: float | None) -> float | None:
    """Return exp of a number; None of None, NaN or an infinity."""
    return None if value is None or not math.isfinite(value) else math.exp(value)


def exactly(value: float, n: int = 1) -> Estimate:
    """Return a number without error, such as a difference of two deterministic runs."""
    return Estimate(value, value, value, n, draws=np.full(N_DRAWS, value))


def number(value: float | None, digits: int = 3) -> str:
    """Format a number; a missing one as a dash."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value + 0.0:.{digits}g}"


def signed(value: float | None) -> str:
    """Format a difference in nats; a missing one as a dash."""
    return "-" if value is None else fixed(value, 4, "+")


def fixed(value: float, digits: int, sign: str = "") -> str:
    """Format a number with fixed decimals, never as -0; `sign` "+": also mark positive ones."""
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}"


def rate(value: float | None) -> str:
    """Format a learning rate: 1.23e-3."""
    if value is None or not math.isfinite(value):
        return "-"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def with_interval(e: Estimate, write: Callable[[float | None], str] = number) -> str:
    """Format an estimate as value [low, high], or as a bound."""
    if AT_LEAST in e.flags:
        return f"at least {with_interval(dataclasses.replace(e, flags=()), write)}"
    if e.value is not None:
        ends = f"[{write(e.low)}, {write(e.high)}]" if e.has_interval() else "(no interval)"
        return f"{write(e.value)} {ends}"
    if e.has_interval():
        return f"between {write(e.low)} and {write(e.high)}"
    if e.low is not None:
        return f"> {write(e.low)}"
    return f"< {write(e.high)}" if e.high is not None else "-"


def pooled_variance(samples: Sequence[Sequence[float]]) -> Part | None:
    """Pool the variances of samples of one quantity by their median, robust against outliers.

    Each is first divided by the median of chi^2 / df. Samples with fewer than two values, or with a
    value that is not finite, are left out. None if fewer than two samples remain.
    """
    known = [np.asarray(s, float) for s in samples if len(s) > 1 and np.isfinite(s).all()]
    if len(known) < 2:
        return None
    each = [np.var(s, ddof=1) * (len(s) - 1) / stats.chi2.median(len(s) - 1) for s in known]
    return Part(float(np.sqrt(np.median(each))), float(sum(len(s) - 1 for s in known)))


def from_sample(
    values: Sequence[float],
    log: bool = False,
    flags: tuple[str, ...] = (),
    pooled: Part | None = None,
    shifts: Sequence[float] = (),
) -> Estimate:
    """Return the mean of independent values (one per seed) with Student's interval.

    The interval of level 1 - a is mean +- t(1 - a/2, df) sqrt(var / n) (Student, Biometrika 6,
    1908). It is computed twice: with the sample's variance and n - 1 degrees of freedom, and with
    the variance pooled over similar samples. The wider one counts, at every level: three seeds that
    happen to agree have far too narrow an interval, and a few samples that share seeds cannot show
    that one of them is less noisy. One value has no interval.

    `log`: average logarithms (geometric mean); values must be positive. `pooled`: see
    `pooled_variance` (of the logarithms, if log). `shifts`: posterior draws of an error that all
    seeds share, because the best LR is uncertain: the change of the mean if another LR were the
    best. Each draw is moved by one of them.
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
        parts.append(dataclasses.replace(pooled, per_unit=pooled.df / (n - 1)))
    sides = [p.sd / np.sqrt(n) * np.abs(stats.t.ppf(PROBABILITIES, p.df)) for p in parts]
    draws = x.mean() + np.sign(PROBABILITIES - 0.5) * np.max(sides, axis=0)
    if len(shifts):
        resized = np.resize(np.asarray(shifts, float), N_DRAWS)
        draws = draws + np.random.default_rng(20251126).permutation(resized)
    shared = float(np.std(shifts)) if len(shifts) else 0.0
    spread = Spread(n, parts=tuple(parts), shared=shared)
    return from_draws(back(draws), n, flags=flags, spread=spread)


BASES = "bases"
"""Name of the rows of a meta-regression."""
SHARPEST = 0.01
"""Smallest standard deviation that `censored_slope` fits. Without this limit, values exactly on a
line have no maximum of the likelihood."""


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
