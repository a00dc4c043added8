"""The results of an analysis (values with interval, n and flags) and their text form."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from analysis.inference.gates import Gate, GateCode
from analysis.inference.spread import Spread

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


BETTER = "it is on the better side"
"""End of a refutation's reason if the result is better than claimed."""
EXPLORATORY, WITHDRAWN = "exploratory", "WITHDRAWN"
"""Marks of a verdict that confirms no claim, and of a verdict that does not count."""


@dataclass(frozen=True)
class Verdict:
    """SUPPORTED, REFUTED or UNDECIDED, with the reason (`why`) and the remedy (`needed`)."""

    claim: str
    group: str
    outcome: str
    estimate: Estimate
    expected: float
    margin: tuple[float, float]
    primary: bool
    why: str
    needed: str = ""
    rivals: dict[str, float] = field(default_factory=dict)
    log: bool = True
    """The margin is of a ratio, so distances are compared as logarithms."""
    p: float | None = None
    """The smallest significance level at which the claim is decided; None without draws."""
    gates: tuple[Gate, ...] = ()
    exploratory: str = ""
    """Why the verdict does not confirm the claim; empty: it may."""
    missing: int | None = None
    """Units still needed for a decision; None: unknown, or too many. `plain` leaves it out."""

    @property
    def is_better(self) -> bool:
        """Whether the claim is refuted by a result better than claimed."""
        return self.why.endswith(BETTER)

    @property
    def is_withdrawn(self) -> bool:
        """Whether the sweep's file says that the answer does not count."""
        return any(g.code == GateCode.WITHDRAWN for g in self.gates)

    @property
    def shown(self) -> str:
        """The outcome as shown in reports, marked if withdrawn or exploratory."""
        if self.is_withdrawn:
            return WITHDRAWN
        return f"{self.outcome} ({EXPLORATORY})" if self.exploratory else self.outcome

    def plain(self) -> dict[str, Any]:
        """Return plain values for JSON, without `missing`."""
        return {
            **{k: v for k, v in vars(self).items() if k != "missing"},
            "estimate": self.estimate.plain(),
            "margin": list(self.margin),
            "gates": [g.plain() for g in self.gates],
        }


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


def row_interval(
    row: dict[str, Any], key: str = "value", write: Callable[[float | None], str] = number
) -> str:
    """Format row[key], row["low"] and row["high"] as value [low, high]."""
    return with_interval(Estimate(row[key], row["low"], row["high"]), write)


def with_interval(e: Estimate, write: Callable[[float | None], str] = number) -> str:
    """Format an estimate as value [low, high], or as a bound."""
    if AT_LEAST in e.flags:
        return f"at least {with_interval(dataclasses.replace(e, flags=()), write)}"
    if e.value is None:
        if e.low is not None and e.high is not None:
            return f"between {write(e.low)} and {write(e.high)}"
        if e.low is not None:
            return f"> {write(e.low)}"
        return f"< {write(e.high)}" if e.high is not None else "-"
    if not e.has_interval():
        return f"{write(e.value)} (no interval)"
    return f"{write(e.value)} [{write(e.low)}, {write(e.high)}]"
