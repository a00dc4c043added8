"""Count the runs that a design needs for an interval: plain grids against two stages.

A plain grid runs every seed at all learning rates. A design in two stages, as in the sweeps, runs
one seed at all learning rates, and fresh seeds around the best one only. Both are simulated with
known optima and fitted like real sweeps of full fine-tuning and one rank (as `lr_ratio` at tiny).
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from analysis.inference.estimate import Estimate, number
from analysis.inference.gates import MIN_SEEDS
from analysis.inference.seeds import pooled_variance
from analysis.measures.at_best import losses_at_best, over_seeds
from analysis.measures.ratio import ratio_of
from analysis.optimum.optimum import seeds_at_best
from analysis.report.text import Rows
from benchmarks.calibration.coverage import covers, fitted, share, stream
from benchmarks.calibration.generators import MARGIN, Design

Row = dict[str, Any]
FAMILIES = ("linex", "plateau", "kink", "well")
"""Families whose loss at the optimum is the same for every curve, so that the true gap is 0."""
NOISE = 4e-3
"""Nats per run. Kept answers to `lr_ratio` have 0.0038 to 0.0045, `regime` 0.0014 to 0.0033."""
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
"""Two-stage designs (two LRs with fresh seeds; wider first stages), a plain grid closely spaced."""
WITH_GAPS = 60
"""Number of sweeps per condition in which gaps in loss are measured, because that is slow."""
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
    """Measure how wide one design's intervals are, and how often they hold the truth.

    Half-widths are medians over all sweeps (ratio, in ln) or ranks (gap in loss, in nats). They are
    None if half of the sweeps or ranks have no interval.

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
            # As in `analysis.measures.ratio.gaps`: each rank's loss minus full fine-tuning's, each
            # at its best LR, paired by seed, in nats. In two stages, the first seed selected the
            # LRs and does not count. In a plain grid, all seeds selected the LRs, and all count.
            full, *lora = losses_at_best(optima)
            chose = {0} if design.fresh else set()
            paired = [o.paired(full, lambda a, f: a - f).without(chose) for o in lora]
            pooled = pooled_variance([list(v.best.values()) for v in paired])
            losses += [(over_seeds(v, pooled), 0.0) for v in paired]
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
    """Return whether the interval times `scale` (wanted ratio / true ratio) lies in MARGIN.

    Both arms are simulated on one grid, so that the true ratio is near 1.
    """
    if ratio.value is None or not ratio.has_interval():
        return False
    low, high = ratio.interval
    return MARGIN[0] <= low * scale and high * scale <= MARGIN[1]


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


# ---------------------------------------------------------------- the section of the page

OF = {"ratio": ("the ratio", LR_RATIO), "gap": ("the gap in loss", REGIME)}
"""What a sweep measures, in words, and the design of that sweep."""
AIM = 0.5
"""Target: a two-stage sweep's runs / the runs of a plain grid with the same interval."""
LEAST_SEEDS = 2.0
"""Fewest seeds of a plain grid. With one seed, too few degrees of freedom show the noise."""
HEAD = (
    "design|runs per curve|half-width of ln(ratio)|with an interval|coverage|"
    "false claims SUPPORTED|true claims SUPPORTED|plain grid's runs|half-width of the gap, nats|"
    "coverage|plain grid's runs"
)


def tables(rows: Sequence[Row]) -> dict[float, Rows]:
    """Return the table of designs for each distance of the optima from the middle learning rate."""
    reaches = dict.fromkeys(r["reach"] for r in rows)
    return {v: table([r for r in rows if r["reach"] == v]) for v in reaches}


def table(rows: Sequence[Row]) -> Rows:
    """Return the table of designs, after its head."""
    designs = _by_design(rows)
    plain = _plain(designs)
    out = [HEAD.split("|")]
    for name, cells in designs.items():
        ratio, gap = (_mean(cells, f"{k}_half_width") for k in ("ratio", "gap"))
        out.append(
            [
                name,
                str(cells[0]["runs"]),
                number(ratio),
                _percent(cells, "ratio_answered"),
                _percent(cells, "ratio_coverage"),
                _percent(cells, "false_supported"),
                _percent(cells, "true_supported"),
                _runs(plain_seeds(ratio, plain, "ratio"), plain) if cells not in plain else "-",
                number(gap),
                _percent(cells, "gap_coverage"),
                _runs(plain_seeds(gap, plain, "gap"), plain) if cells not in plain else "-",
            ]
        )
    return out


def plain_seeds(width: float, plain: Sequence[Sequence[Row]], of: str) -> float:
    """Return the seeds (at least LEAST_SEEDS) of a plain grid with intervals of half-width `width`.

    Interpolated in logarithms. Infinity beyond the most seeds tried; NaN if unknown.

    Args:
        plain: the conditions of each plain grid, in the order of the number of seeds.
        of: "ratio" or "gap".
    """
    if not math.isfinite(width) or len(plain) < 2:
        return math.nan
    at: list[tuple[float, float]] = []
    for cells in plain:
        tried = _mean(cells, f"{of}_half_width")
        if math.isfinite(tried) and (not at or tried < at[-1][1]):
            at.append((cells[0]["seeds"], tried))
    if not at or width < at[-1][1]:
        return math.inf
    seeds, widths = np.log(np.array(at)).T
    found = math.exp(float(np.interp(-math.log(width), -widths, seeds)))
    return max(LEAST_SEEDS, found)


def targets(rows: Sequence[Row]) -> list[list[str]]:
    """Compare the runs of two sweeps' designs with AIM."""
    designs = _by_design([r for r in rows if r["reach"] == KNOWN])
    plain, found = _plain(designs), []
    for of, (what, mine) in OF.items() if designs else ():
        shares = {
            name: cells[0]["runs"] / (seeds * plain[0][0]["rates"])
            for name, cells in designs.items()
            if cells[0]["fresh"]
            and math.isfinite(seeds := plain_seeds(_mean(cells, f"{of}_half_width"), plain, of))
        }
        name = _name(mine.__dict__)
        least = min(shares, key=shares.__getitem__, default=name)
        other = "" if least == name else f"; lowest {shares[least]:.0%} ({least})"
        part = shares.get(name, math.nan)
        shown = "no interval in half of the sweeps" if math.isnan(part) else f"{part:.0%}"
        what = f"runs of a two-stage sweep / of a plain grid with the same interval of {what}"
        met = "yes" if part <= AIM else "**no**"
        found.append([what, f"at most {AIM:.0%}", f"{shown} ({name}){other}", met])
    return found


def _plain(designs: dict[str, list[Row]]) -> list[list[Row]]:
    """Return the conditions of the plain grids that other designs are compared with."""
    grids = {_name(d.__dict__) for d in PLAIN}
    return [cells for name, cells in designs.items() if name in grids]


def _by_design(rows: Sequence[Row]) -> dict[str, list[Row]]:
    out: dict[str, list[Row]] = {}
    for r in rows:
        out.setdefault(_name(r), []).append(r)
    return out


def _name(row: Row) -> str:
    grid = f"{row['rates']} LRs a factor {row['factor']:g} apart, {row['seeds']} seed"
    fresh = f", {row['fresh']} fresh seeds at {row['fresh_rates']}" if row["fresh"] else ""
    return grid + ("s" if row["seeds"] > 1 else "") + fresh


def _mean(cells: Sequence[Row], key: str) -> float:
    values = [r[key] for r in cells]
    return math.nan if None in values else float(np.mean(values))


def _percent(cells: Sequence[Row], key: str) -> str:
    value = _mean(cells, key)
    return "-" if math.isnan(value) else f"{100 * value:.1f}%"


def _runs(seeds: float, plain: Sequence[Sequence[Row]]) -> str:
    if math.isnan(seeds):
        return "-"
    rates, most = plain[-1][0]["rates"], plain[-1][0]["seeds"]
    return f"over {rates * most}" if math.isinf(seeds) else f"{rates * seeds:.0f}"
