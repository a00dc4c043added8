"""Estimates (values with interval, n and flags), intervals over seeds, and their text form."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import stats

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


N_DRAWS = 4000
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
    the variance pooled over similar samples. The wider one counts, at every level: three seeds that
    happen to agree have far too narrow an interval, and a few samples that share seeds cannot show
    that one of them is less noisy. One value has no interval.

    `log`: average logarithms (geometric mean); values must be positive. `pooled`: variance of
    similar samples (of the logarithms, if log). `shifts`: posterior draws of an error that all
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
        parts.append(Part(float(np.sqrt(pooled.var)), pooled.df, pooled.df / (n - 1)))
    sides = [p.sd / np.sqrt(n) * np.abs(stats.t.ppf(PROBABILITIES, p.df)) for p in parts]
    draws = x.mean() + np.sign(PROBABILITIES - 0.5) * np.max(sides, axis=0)
    if len(shifts):
        resized = np.resize(np.asarray(shifts, float), N_DRAWS)
        draws = draws + np.random.default_rng(20251126).permutation(resized)
    shared = float(np.std(shifts)) if len(shifts) else 0.0
    spread = Spread(n, parts=tuple(parts), shared=shared)
    return from_draws(back(draws), n, flags=flags, spread=spread)
