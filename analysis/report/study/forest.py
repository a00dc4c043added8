"""The claims of the study in one figure: every measured value in units of its claim's margin."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from analysis.inference.decide import scale_of
from analysis.inference.estimate import AT_LEAST, Estimate, Verdict
from analysis.optimum.optimum import WITHIN
from analysis.report.study.answers import Part
from analysis.report.study.pooled import Pooled
from analysis.report.study.setting import Setting

OPEN = 5.0
"""An end of a margin that lies this many times further from the claim's value than the other end is
open: the claim is that something is at least, or at most, so large."""
DOUBLE = math.log(2)
"""Unit of a ratio whose margin has none: a factor of 2. That of a difference is WITHIN nats."""


@dataclass(frozen=True)
class Scale:
    """The axis of one claim: 0 is the claim's value, -1 and 1 are the ends of its margin."""

    expected: float
    """On the scale of errors: a logarithm for a ratio."""
    units: tuple[float, float]
    """What -1 and +1 are worth, below and above the expected value."""
    band: tuple[float, float]
    """The margin on this axis; infinite where it is open."""
    log: bool

    def at(self, value: float) -> float:
        """Return the place of a value."""
        away = scale_of(self.log)(value) - self.expected
        return away / (self.units[0] if away < 0 else self.units[1])


def scale_for(v: Verdict) -> Scale:
    """Return the axis of a claim, from its expected value and its margin."""
    to = scale_of(v.log)
    expected = to(v.expected)
    below, above = expected - to(v.margin[0]), to(v.margin[1]) - expected
    reaches = _reach(below, above), _reach(above, below)
    known = [r for r in reaches if r]
    other = known[0] if known else DOUBLE if v.log else WITHIN
    low, high = (r or other for r in reaches)
    band = (
        -math.inf if reaches[0] is None else -reaches[0] / low,
        math.inf if reaches[1] is None else reaches[1] / high,
    )
    return Scale(expected, (low, high), band, v.log)


def _reach(distance: float, other: float) -> float | None:
    """Return the distance of a margin's end from the claim's value; None if the end is open.

    Args:
        other: distance of the other end. If that is 0, nothing but its size, 1 in the claim's own
            unit, tells whether this end is meant to be met.
    """
    return None if distance > (OPEN * other if other else 1.0) else distance


@dataclass(frozen=True)
class Mark:
    """One measured value in a row."""

    value: float
    low: float
    high: float
    """Ends of the interval; infinite where there is none."""
    outcome: str
    """SUPPORTED, REFUTED or UNDECIDED; empty for a value over bases."""
    explores: bool
    """Whether the verdict is exploratory."""


@dataclass(frozen=True)
class Row:
    """One claim."""

    says: str
    band: tuple[float, float]
    marks: dict[Setting, list[Mark]]


def rows_of(parts: Sequence[Part], over_bases: Sequence[Pooled], whose: str = "study") -> list[Row]:
    """Return a row per claim of one source that has a measured value, in the study's order.

    Claims that say the same share a row, whichever question they belong to. Withdrawn answers are
    left out.
    """
    rows: dict[str, Row] = {}
    for part in parts:
        for v in part.single:
            known = v.estimate.value is not None and not v.is_withdrawn
            if known and (part.word(v.claim, "whose") or "ours") == whose:
                _add(rows, part, v, v.estimate, v.outcome)
    for pool in over_bases:
        part, v = pool.one
        if part.says(v.claim) in rows and pool.estimate.value is not None:
            _add(rows, part, v, pool.estimate, "")
    return list(rows.values())


def _add(rows: dict[str, Row], part: Part, v: Verdict, e: Estimate, outcome: str) -> None:
    scale = scale_for(v)
    row = rows.setdefault(part.says(v.claim), Row(part.says(v.claim), scale.band, {}))
    low = -math.inf if e.low is None else scale.at(e.low)
    high = math.inf if e.high is None or AT_LEAST in e.flags else scale.at(e.high)
    explores = bool(v.exploratory)
    mark = Mark(scale.at(float(e.value or 0.0)), low, high, outcome, explores)
    row.marks.setdefault(part.setting(v.group), []).append(mark)
