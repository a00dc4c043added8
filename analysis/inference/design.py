"""Predict whether a planned sweep can decide its claims, from the spread that its file states."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from analysis.inference.decide import look_level, scale_of
from analysis.inference.estimate import MAX_NEEDED, Part, Spread, needed, number
from analysis.inference.gates import MIN_SEEDS

FAR = 100.0
"""A margin's end beyond -FAR or FAR counts as open."""
N_SIMULATED = 4000
"""Simulated sweeps for a probability; its standard error is then at most 0.008."""


@dataclass(frozen=True)
class Outlook:
    """The predicted interval of one claim of a planned sweep, if the expected value is true."""

    claim: str
    expected: float
    margin: tuple[float, float]
    level: float
    """Level of the interval at one look."""
    log: bool
    """The claim is about a ratio; `half_width` and `room` are then in ln."""
    planned: int
    """Planned number of units, such as seeds, that the estimate averages."""
    units: str
    room: float
    """Distance of the expected value from the nearest end of the margin; below 0 outside it."""
    half_width: float | None = None
    """Half-width of the expected interval. None: no sd is stated, or one unit is planned."""
    needed: int | None = None
    """Smallest number of units that decides with 80% power. None: no sd is stated, or too many."""
    can_decide: bool | None = None
    """Whether the planned units suffice; None if no sd is stated."""
    underpowered: bool = False
    """The sweep file says that the planned units do not suffice."""

    @property
    def warns(self) -> bool:
        """Whether the claim cannot be decided although the sweep file does not say so."""
        return self.can_decide is False and not self.underpowered

    def plain(self) -> dict[str, Any]:
        """Return plain values for JSON; the room in an open margin is None."""
        room = self.room if math.isfinite(self.room) else None
        return {**dataclasses.asdict(self), "margin": list(self.margin), "room": room}

    def line(self) -> str:
        """Return the outlook as one line for people."""
        start = f"  {'warning, ' if self.warns else ''}claim {self.claim}: "
        if self.can_decide is None:
            return f"{start}not known: no standard deviation stated"
        value, half = f"{self.expected:g}", self.half_width
        if half is None:
            interval = f"expected {value} without an interval"
        elif self.log:
            ends = [number(self.expected * math.exp(sign * half)) for sign in (-1, 1)]
            interval = f"expected interval {value} [{', '.join(ends)}]"
        else:
            interval = f"expected interval {value} +- {number(half, 2)}"
        low, high = self.margin
        margin = f"[{'..' if low <= -FAR else f'{low:g}'}, {'..' if high >= FAR else f'{high:g}'}]"
        text = f"{start}{interval}, margin {margin}: "
        if self.can_decide:
            stated = ", though its file says `underpowered`" if self.underpowered else ""
            return f"{text}can decide{stated}"
        enough = f"more than {MAX_NEEDED}" if self.needed is None else f"{self.needed}"
        why = f"needs {enough} {self.units} (planned {self.planned})"
        if self.needed is None and self.room == 0:
            why = "the expected value lies on the margin's end"
        return f"{text}cannot decide: {why}{', as its file says' if self.underpowered else ''}"


def outlook(
    claim: str,
    expected: float,
    margin: Sequence[float],
    sd: float | None,
    planned: int,
    *,
    rounds: int = 1,
    log: bool = False,
    units: str = "seeds",
    underpowered: bool = False,
) -> Outlook:
    """Predict a claim's interval over the planned units, and whether it decides the claim.

    With n units, the half-width is t(level, n - 1) sd / sqrt(n) (Student, Biometrika 6, 1908).

    Args:
        sd: standard deviation between units (of the logarithm, if log). 0: an exact value, which
            always decides. None: not known.
        rounds: number of looks planned.
        underpowered: the file says that the claim cannot be decided.
    """
    ends, value, level = _ends(margin, log), scale_of(log)(expected), look_level(rounds)
    room = min(value - ends[0], ends[1] - value)
    half_width, n, can_decide = (0.0, 1, True) if sd == 0 else (None, None, None)
    if sd:
        spread = Spread(2, parts=(Part(sd, 1.0),))  # n units leave n - 1 degrees of freedom
        half, most = spread.at(2, level)[0], max(MAX_NEEDED, planned)
        n = needed(spread, value, (value - half, value + half), ends, level, MIN_SEEDS, most)
        half_width = spread.at(planned, level)[0] if planned > 1 else None
        can_decide = n is not None and n <= planned
    known = (claim, expected, (margin[0], margin[1]), level, log, planned, units, room)
    return Outlook(*known, half_width, n, can_decide, underpowered)


def decided_by(
    expected: float,
    margin: Sequence[float],
    sd: float,
    units: Sequence[int],
    log: bool = False,
) -> list[float]:
    """Return the probability that a claim is decided by each look, if the expected value is true.

    Sweeps are simulated: normal units, and at each look Student's interval of the level of
    `look_level` over all units so far. Variances are not pooled over samples.

    Args:
        sd: standard deviation between units (of the logarithm, if log); 0: always decided.
        units: number of units at each planned look, ascending.
    """
    value, (low, high), level = scale_of(log)(expected), _ends(margin, log), look_level(len(units))
    if sd == 0:
        return [1.0] * len(units)
    drawn = np.random.default_rng(20251126).normal(value, sd, (N_SIMULATED, units[-1]))
    decided, by_look = np.zeros(N_SIMULATED, bool), []
    for n in units:
        if n > 1:
            mean, error = drawn[:, :n].mean(1), drawn[:, :n].std(1, ddof=1) / math.sqrt(n)
            half = stats.t.ppf(0.5 + level / 2, n - 1) * error
            inside = (mean - half >= low) & (mean + half <= high)
            decided |= inside | (mean + half < low) | (mean - half > high)
        by_look.append(float(decided.mean()))
    return by_look


def _ends(margin: Sequence[float], log: bool) -> tuple[float, float]:
    """Return the ends of a margin on the scale of errors; open ends are infinite."""
    low, high = margin
    to = scale_of(log)
    return -math.inf if low <= -FAR else to(low), math.inf if high >= FAR else to(high)
