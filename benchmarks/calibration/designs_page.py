"""Render how many runs designs need for an interval, as a section of the calibration's page."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from analysis.inference.estimate import number
from analysis.report.text import Rows, markdown
from benchmarks.calibration.designs import KNOWN, LR_RATIO, PLAIN, REGIME

Row = dict[str, Any]
OF = {"ratio": ("the ratio", LR_RATIO), "gap": ("the gap in loss", REGIME)}
"""What a sweep measures, in words, and the design of that sweep."""
AIM = 0.5
"""Of the runs of a plain grid with the same interval."""
LEAST_SEEDS = 2.0
"""A plain grid of one seed has no interval: its few degrees of freedom do not show the noise."""
HEAD = (
    "design|runs a curve|half-width of ln(ratio)|with an interval|coverage|false claims SUPPORTED|"
    "true ones|plain grid's runs|half-width of the gap, nats|coverage|plain grid's runs"
)


def tables(rows: Sequence[Row]) -> dict[float, str]:
    """Return the table of designs for each distance of the optima from the middle learning rate."""
    reaches = dict.fromkeys(r["reach"] for r in rows)
    return {v: "\n".join(markdown(table([r for r in rows if r["reach"] == v]))) for v in reaches}


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
    """Return the seeds with which a plain grid's interval is as wide; at least LEAST_SEEDS.

    Interpolated between the seeds tried, both in logarithms. Infinity beyond the most seeds tried,
    NaN for an unknown width, or fewer than two plain grids.

    Args:
        width: half-width.
        plain: conditions of each plain grid, with more and more seeds.
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
    """Compare the runs of two sweeps' designs with the aim."""
    known = _by_design([r for r in rows if r["reach"] == KNOWN])
    return [_target(known, of) for of in OF] if known else []


def _target(designs: dict[str, list[Row]], of: str) -> list[str]:
    plain, (what, mine) = _plain(designs), OF[of]
    shares = {
        name: cells[0]["runs"] / (seeds * plain[0][0]["rates"])
        for name, cells in designs.items()
        if cells[0]["fresh"]
        and math.isfinite(seeds := plain_seeds(_mean(cells, f"{of}_half_width"), plain, of))
    }
    name = _name(mine.__dict__)
    least = min(shares, key=shares.__getitem__, default=name)
    other = "" if least == name else f"; least {shares[least]:.0%} ({least})"
    share = shares.get(name, math.nan)
    shown = "half of the sweeps have none" if math.isnan(share) else f"{share:.0%}"
    return [
        f"runs for an interval of {what}, in those of a plain grid with the same",
        f"at most {AIM:.0%}",
        f"{shown} ({name}){other}",
        "yes" if share <= AIM else "**no**",
    ]


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
    grid = f"{row['rates']} rates a factor {row['factor']:g} apart, {row['seeds']} seed"
    fresh = f", {row['fresh']} fresh at {row['fresh_rates']}" if row["fresh"] else ""
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
