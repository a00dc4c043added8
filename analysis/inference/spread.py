"""Predict how an interval narrows with more units, such as seeds, and how many are enough."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

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
    """Degrees of freedom of the variance now; infinite if it counts as known."""
    per_unit: float = 1.0
    """Degrees of freedom that one more unit adds."""


@dataclass(frozen=True)
class Spread:
    """The independent units of an interval, and how its width depends on their number."""

    n: int
    """Present number of units."""
    of: str = SEEDS
    """What a unit is."""
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
    error s / sqrt(n) and the interval X +- h(n), h(n) = t(level, df(n)) s / sqrt(n). A value
    inside the margin [a, b] is SUPPORTED with probability P(a + h <= X <= b - h). A value above b
    is REFUTED with probability P(X > b + h). A value below the margin is REFUTED with probability
    P(X < a - h). (X - value) / error is taken to follow Student's t, which approximates the
    noncentral t of the exact power (Chow, Shao & Wang, Sample Size Calculations in Clinical
    Research, 2003, chapter 3).
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
