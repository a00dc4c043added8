"""Count the runs that a design needs for an interval: plain grids against two stages.

A plain grid runs every seed at all learning rates. A design in two stages, as in the sweeps, runs
one seed at all learning rates, and fresh seeds around the best one only. Both are simulated with
known optima and fitted like real sweeps of full fine-tuning and one rank (as `lr_ratio` at tiny).
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from analysis.inference.estimate import Estimate
from analysis.inference.gates import MIN_SEEDS
from analysis.inference.seeds import pooled_variance
from analysis.measures.at_best import losses_at_best, over_seeds
from analysis.measures.ratio import ratio_of
from analysis.optimum.optimum import Optimum, seeds_at_best
from benchmarks.calibration.coverage import covers, fitted, share, stream
from benchmarks.calibration.generators import MARGIN, Design

Row = dict[str, Any]
FAMILIES = ("linex", "plateau", "kink", "well")
"""Families whose loss at the optimum is the same for every curve, so that the true gap is 0."""
NOISE = 4e-3
"""In nats. The kept answers to `lr_ratio` have 0.0038 to 0.0045, `regime` 0.0014 to 0.0033."""
PLAIN = tuple(Design(7, 2.0, seeds, noise=NOISE, curves=2) for seeds in (2, 3, 6))
REGIME, LR_RATIO = (
    Design(5, factor, 1, fresh, NOISE, 2, around)
    for factor, fresh, around in ((2.0, 5, 3), (1.6, 2, 4))
)
"""The designs of two sweeps at tiny."""
OTHERS = (
    Design(5, 2.0, 1, 5, NOISE, 2, 2),
    Design(7, 2.0, 1, 3, NOISE, 2, 3),
    Design(7, 1.6, 1, 3, NOISE, 2, 3),
    Design(7, 1.6, 3, 0, NOISE, 2),
)
"""Of the equal-cost rule, with wider first stages, and a plain grid around a known optimum."""
WITH_GAPS = 60
"""Number of sweeps of a condition of which the gaps in loss are measured, which is slow."""
NEAR, KNOWN, UNKNOWN = 1.25, 2.0, 4.0
"""The optimum lies at most this factor from the middle of the learning rates."""


def designs_tried() -> Iterator[tuple[str, Design, float]]:
    """Yield each condition: family, design, and the optimum's largest distance from the middle."""
    for family in FAMILIES:
        for design in (*PLAIN, REGIME, LR_RATIO, *OTHERS):
            yield family, design, KNOWN
        for design in (PLAIN[1], LR_RATIO):
            yield family, design, UNKNOWN
        for design in (PLAIN[1], LR_RATIO, OTHERS[1]):
            yield family, design, NEAR


def designs(family: str, design: Design, reach: float, cases: int) -> Row:
    """Measure the intervals of one design: how wide they are, and how often they hold the truth.

    Half-widths are medians over all sweeps (ratio, in ln) or ranks (gap in loss, in nats). One
    without an interval counts as infinitely wide; the median is None where half have none.

    Args:
        reach: the true optima lie at most this factor from the middle of the rates.
        cases: sweeps.
    """
    rng = stream("designs", family, design.noise, reach)
    inside = (design.rates - 1) / 2 - math.log(reach) / math.log(design.factor)
    ratios: list[tuple[Estimate, float]] = []
    losses: list[tuple[Estimate, float]] = []
    edge, middle = [], []
    options = {"place": (inside, inside), "paired": True}
    for _, truths, optima in fitted(family, design, rng, cases, **options):
        true, measured = float(np.mean(truths[1:])) - truths[0], ratio_of(optima[1:], optima[0])
        ratios.append((measured, math.exp(true)))
        few = min(map(seeds_at_best, optima)) < MIN_SEEDS
        edge += [not few and supported(measured, r / math.exp(true)) for r in MARGIN]
        middle.append(not few and supported(measured, 10 / math.exp(true)))
        if len(ratios) <= WITH_GAPS:
            losses += [(e, 0.0) for e in _gaps(optima, bool(design.fresh))]
    return {
        "family": family,
        **design.__dict__,
        "runs": design.runs,
        "reach": reach,
        "sweeps": cases,
        **{f"ratio_{k}": v for k, v in _summary(ratios, log=True).items()},
        **{f"gap_{k}": v for k, v in _summary(losses, log=False).items()},
        "false_supported": share(edge),
        "true_supported": share(middle),
    }


def supported(ratio: Estimate, scale: float) -> bool:
    """Return whether the interval lies inside MARGIN, once the ratio is scaled to a wanted one.

    Both arms are simulated on one grid, so that the true ratio is near 1.
    """
    if ratio.value is None or not ratio.has_interval():
        return False
    low, high = ratio.interval
    return MARGIN[0] <= low * scale and high * scale <= MARGIN[1]


def _gaps(optima: Sequence[Optimum], staged: bool) -> list[Estimate]:
    """Return each rank's loss - full fine-tuning's at their best rates, paired by seed, in nats.

    As in `analysis.measures.ratio.gaps`: where there are fresh seeds, the first seed selected the
    learning rates and does not count. In a plain grid all seeds selected them, and all count.
    """
    full, *lora = losses_at_best(optima)
    chose = {0} if staged else set()
    paired = [o.paired(full, lambda a, f: a - f).without(chose) for o in lora]
    pooled = pooled_variance([list(v.best.values()) for v in paired])
    return [over_seeds(v, pooled) for v in paired]


def _summary(found: Sequence[tuple[Estimate, float]], log: bool) -> Row:
    """Summarise estimates and their truths: median half-width, share with an interval, coverage."""
    known = [(e, truth) for e, truth in found if e.value is not None and e.has_interval()]
    ends = [e.interval for e, _ in known]
    half = [(math.log(high / low) if log else high - low) / 2 for low, high in ends]
    median = float(np.median([*half, *[math.inf] * (len(found) - len(known))]))
    return {
        "half_width": median if math.isfinite(median) else None,
        "answered": len(known) / len(found),
        "coverage": share([covers(e, truth) for e, truth in known]),
    }
