"""The map of `regime`: what LoRA gives up over how much is new in the data, for every rank."""

from collections.abc import Sequence
from dataclasses import dataclass

from analysis.inference.estimate import Estimate
from analysis.measures.regret import ALLOWED
from analysis.report.study.answers import Part, estimate_of

REGIME = "regime"


@dataclass(frozen=True)
class Point:
    """One rank on one data set of one base."""

    rank: int
    base: str
    load: float
    """Bits of what is new over the capacity of the rank."""
    regret: Estimate
    """Percent of full fine-tuning's gain."""


@dataclass(frozen=True)
class Boundary:
    """The range of loads that separates what LoRA holds from what it does not."""

    low: float
    high: float
    clean: bool
    """Whether no rank falls behind below the range, and none keeps up above it."""


def points_of(parts: Sequence[Part]) -> list[Point]:
    """Return all points with a known load, by rank and load."""
    found = [
        Point(
            int(r["rank"]),
            cell["cell"].partition(",")[0],
            r["load"],
            estimate_of(r["regret_percent"]),
        )
        for part in parts
        if part.results["sweep"] == REGIME
        for cell in part.results["cells"]
        for r in cell["ranks"]
        if r["load"]
    ]
    return sorted((p for p in found if p.regret.value is not None), key=lambda p: (p.rank, p.load))


def boundary_of(points: Sequence[Point]) -> Boundary | None:
    """Return where giving up nothing ends; None unless some ranks do and others do not.

    A rank gives up nothing if its interval lies below ALLOWED of the gain, and falls behind if it
    lies above. Others do not count.
    """
    limit = 100 * ALLOWED
    keeps = [p.load for p in points if p.regret.high is not None and p.regret.high < limit]
    behind = [p.load for p in points if p.regret.low is not None and p.regret.low > limit]
    if not keeps or not behind:
        return None
    last, first = max(keeps), min(behind)
    return Boundary(min(last, first), max(last, first), last < first)
