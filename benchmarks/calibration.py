"""Calibrate the analysis on simulated sweeps, which are fitted and judged exactly like real ones.

    python -m benchmarks calibration [--cases 1000] [--jobs 2]         (make calibrate)

A condition is a family of shapes and a design; a case is a sweep of four curves of one family:
four optima and three ratios. The model's constants were chosen on other draws, and without some of
the families (generators.HELD_OUT). Designs: plain grids, which run every seed at all learning
rates, against two stages, as in the sweeps: one seed at all learning rates, and fresh seeds around
the best one only.
"""

import argparse
import dataclasses
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.inference.decide import MIN_SEEDS, Gate, GateCode, judge
from analysis.inference.estimate import Estimate, from_draws, number
from analysis.measures.at_best import losses_at_best, over_seeds, pooled_over
from analysis.measures.ratio import ratio_of
from analysis.optimum.fit import Optimum, fit_all, seeds_at_best
from analysis.questions.base import Panel, Series
from analysis.report import plots
from analysis.report.text import Rows
from analysis.runs.curves import LrCurve
from benchmarks.generators import FAMILIES, HELD_OUT, INSIDE, MARGIN, Design, plant
from benchmarks.harness import RESULTS, Figures, Page, render

NOISES = (1e-4, 1e-3, 1e-2)
DESIGNS = (
    *(Design(7, 2.0, s) for s in (1, 2, 8)),
    Design(7, 2.0, 1, 3),
    Design(9, 1.78, 2),
    Design(5, 2.0, 2),
    Design(5, 2.0, 1, 2),
    Design(7, 3.3, 2),
    Design(4, 3.0, 2),
    Design(5, 3.3, 1),
)
RATIOS = (3.0, 6.0, 7.1, 10.0, 14.1, 20.0)
CLAIM = {"margin": MARGIN, "expected": 10, "primary": True}
POSITIONS = ("inside", "below", "above")
ERRORS = ("error", "ratio_error", "argmin_error", "parabola_error", "global_error")
"""Errors as factors between estimate and truth; only the median of each is kept."""
BATCH = 100
"""Number of sweeps drawn before the simpler estimators draw from the same stream."""
WITH_BASELINES = 200
"""Number of sweeps of a condition to which the simpler estimators are applied, too."""


def fitted(
    family: str, design: Design, rng: np.random.Generator, sweeps: int, **options: Any
) -> Iterator[tuple[list[LrCurve], np.ndarray, list[Optimum]]]:
    """Simulate BATCH sweeps at a time by `plant`; yield curves, true optima, and fits.

    The curves of every second sweep have one shape, those of the others have shapes of their own:
    nothing is known about how alike the arms of a real sweep are.
    """
    for start in range(0, sweeps, BATCH):
        n = min(BATCH, sweeps - start)
        for curves, truths in [
            plant(family, design, rng, alike=bool(k % 2), **options) for k in range(n)
        ]:
            yield curves, truths, fit_all(curves)


def covers(e: Estimate, truth: float) -> bool:
    """Return whether an interval or bound contains the truth."""
    return (e.low is None or e.low <= truth) and (e.high is None or truth <= e.high)


def stream(*key: Any) -> np.random.Generator:
    """Return a random stream for one condition; none was used to choose the model's constants."""
    return np.random.default_rng([77, *(int.from_bytes(str(k).encode()[:8], "big") for k in key)])


def share(hits: Sequence[float]) -> float | None:
    """Return the share of hits; None for an empty list."""
    return float(np.mean(hits)) if hits else None


def middle(values: Sequence[float]) -> float | None:
    """Return the median; None for an empty list."""
    return float(np.median(values)) if values else None


# ---------------------------------------------------------------- coverage


def coverage(family: str, design: Design, cases: int) -> Figures:
    """Fit the sweeps of a condition; return how often intervals hold the truth, and errors."""
    rng = stream(
        "coverage", family, design.rates, design.factor, design.seeds, design.fresh, design.noise
    )
    rows: dict[str, list[float]] = defaultdict(list)
    for k, (curves, truths, optima) in enumerate(fitted(family, design, rng, cases)):
        for o, truth in zip(optima, truths):
            e, true = o.best_lr, float(truth)
            if e.value is None:
                empty = e.low is None and e.high is None
                rows["empty" if empty else "bound"].append(empty or covers(e, math.exp(true)))
                continue
            rows["error"].append(abs(math.log(e.value) - true))
            if e.has_interval():
                rows["value"].append(covers(e, math.exp(true)))
                low, high = e.interval
                rows["width"].append(math.log(high / low))
        for o, truth in zip(optima[1:], truths[1:]):
            r = ratio_of([o], optima[0])
            if r.value is not None and r.has_interval():
                rows["ratio"].append(covers(r, math.exp(truth - truths[0])))
                rows["ratio_error"].append(abs(math.log(r.value) - (truth - truths[0])))
        if k < WITH_BASELINES:
            for c, truth in zip(curves, truths):
                _baselines(rows, c, float(truth), rng)
    answers = rows["value"] + rows["bound"]  # a case without value and bound does not count
    return {
        "family": family,
        **design.__dict__,
        "cases": design.curves * cases,
        "sweeps": cases,
        "coverage": share(answers),
        **{f"coverage_{k}": share(rows[k]) for k in ("value", "bound")},
        "empty": len(rows["empty"]) / (design.curves * cases),
        "valued": len(rows["value"]) / (design.curves * cases),
        "width": middle(rows["width"]),
        "ratio_cases": len(rows["ratio"]),
        **{f"{k}_coverage": share(rows[k]) for k in ("ratio", "parabola", "global")},
        **{k: float(np.exp(np.median(rows[k]))) if rows[k] else None for k in ERRORS},
    }


def _baselines(
    rows: dict[str, list[float]], curve: LrCurve, truth: float, rng: np.random.Generator
) -> None:
    """Add the results of three simpler estimators to `rows`.

    (1) The best LR of the grid. (2) A parabola through the five LRs around the best one, with a
    bootstrap over seeds. (3) A least-squares parabola through all LRs.
    """
    x = np.unique(curve.x[curve.usable])
    seeds = [s for s in np.unique(curve.seed) if (curve.usable & (curve.seed == s)).sum() == len(x)]
    if not seeds or len(x) < 5:
        return
    y = np.array([curve.y[curve.usable & (curve.seed == s)] for s in seeds])
    mean = y.mean(0)
    best = int(np.argmin(mean))
    near = slice(max(0, best - 2), best + 3)

    def vertex(losses: np.ndarray) -> np.ndarray:
        """Return the vertices of parabolas through losses [n, P] around the best LR; else NaN."""
        c = np.polyfit(x[near] - x[best], losses[:, near].T, 2)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(c[0] > 0, x[best] - c[1] / (2 * c[0]), np.nan)

    rows["argmin_error"].append(abs(x[best] - truth))
    if np.isfinite(found := vertex(mean[None])[0]):
        rows["parabola_error"].append(abs(found - truth))
    if len(seeds) > 1:
        drawn = vertex(y[rng.integers(0, len(seeds), (200, len(seeds)))].mean(1))
        known = np.isfinite(drawn).any()
        low, high = np.nanquantile(drawn, [0.025, 0.975]) if known else (np.nan, np.nan)
        rows["parabola"].append(low <= truth <= high)
    (c2, c1, _), cov = np.polyfit(x - x.mean(), mean, 2, cov="unscaled" if len(x) < 6 else True)
    if c2 > 0:
        m = -c1 / (2 * c2)
        variance = cov[1, 1] + 4 * m * m * cov[0, 0] + 4 * m * cov[0, 1]
        error = math.sqrt(max(variance, 0.0)) / (2 * c2)
        rows["global_error"].append(abs(x.mean() + m - truth))
        if len(x) >= 6:
            # 2.3 is Student's t (95%) at 8 degrees of freedom; the fit has len(x) - 3.
            rows["global"].append(abs(x.mean() + m - truth) <= 2.3 * error)


# ---------------------------------------------------------------- verdicts and flags


def verdicts(family: str, ratio: float, design: Design, cases: int) -> Figures:
    """Judge 'the ratio lies in 7.1 to 14.1' in simulated sweeps with a known ratio.

    One full fine-tuning curve against three ranks.
    """
    rng = stream("verdicts", family, ratio, design.noise)
    count = {"SUPPORTED": 0, "REFUTED": 0, "UNDECIDED": 0}
    for _, truths, optima in fitted(family, design, rng, cases, steep=(0.05, 0.3)):
        measured = ratio_of(optima[1:], optima[0])
        # Both arms are simulated on one grid; the measured ratio is scaled to the true one.
        offset = ratio / math.exp(float(np.mean(truths[1:])) - truths[0])
        if measured.draws is not None:
            measured = from_draws(measured.draws * offset, measured.n)
        seeds = min(seeds_at_best(o) for o in optima)
        gates = [Gate(GateCode.FEW_SEEDS_AT_BEST, seeds)] if seeds < MIN_SEEDS else []
        count[judge("ratio", CLAIM, "planted", measured, gates, seeds, True).outcome] += 1
    known = {"family": family, "ratio": ratio, "noise": design.noise, "cases": cases}
    return known | {k.lower(): v / cases for k, v in count.items()}


def flags(family: str, where: str, cases: int) -> Figures:
    """Count how often the flags of optima at the edge of the learning rates are right.

    True optima lie at least 1.5 grid spacings inside the learning rates tried, or 0.5 to 1.5 beyond
    an end.
    """
    rng = stream("flags", family, where)
    design = Design(7, 2.0, 2, noise=1e-3)
    reach = design.rates - 1
    position = {"inside": (1.5, 1.5), "below": (-1.5, reach + 0.5), "above": (reach + 0.5, -1.5)}
    right = holds = n = 0
    options = {"place": position[where], "steep": (0.05, 0.3)}
    for _, truths, optima in fitted(family, design, rng, cases, **options):
        for o, truth in zip(optima, truths):
            n += 1
            if where == "inside":
                right += o.best_lr.value is not None or "bounded_by_divergence" in o.flags
            else:
                right += o.best_lr.value is None and "at_edge" in o.flags
            holds += covers(o.best_lr, math.exp(float(truth)))
    return {"family": family, "where": where, "cases": n, "right": right / n, "holds": holds / n}


# ---------------------------------------------------------------- runs that an interval needs

DESIGN_FAMILIES = ("linex", "plateau", "kink", "well")
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
    for family in DESIGN_FAMILIES:
        for design in (*PLAIN, REGIME, LR_RATIO, *OTHERS):
            yield family, design, KNOWN
        for design in (PLAIN[1], LR_RATIO):
            yield family, design, UNKNOWN
        for design in (PLAIN[1], LR_RATIO, OTHERS[1]):
            yield family, design, NEAR


def designs(family: str, design: Design, reach: float, cases: int) -> Figures:
    """Measure how wide one design's intervals are, and how often they hold the truth.

    One rank against full fine-tuning (as `lr_ratio` at tiny). Half-widths are medians over all
    sweeps (ratio, in ln) or ranks (gap in loss, in nats). They are None if half of the sweeps or
    ranks have no interval.

    Args:
        reach: the true optima lie at most this factor from the middle of the rates.
        cases: sweeps.
    """
    rng = stream("designs", family, design.noise, reach)
    inside = (design.rates - 1) / 2 - math.log(reach) / math.log(design.factor)
    ratios: list[tuple[Estimate, float]] = []
    losses: list[tuple[Estimate, float]] = []
    edge, centre = [], []
    options = {"place": (inside, inside), "paired": True}
    for _, truths, optima in fitted(family, design, rng, cases, **options):
        true, measured = float(np.mean(truths[1:])) - truths[0], ratio_of(optima[1:], optima[0])
        ratios.append((measured, math.exp(true)))
        few = min(map(seeds_at_best, optima)) < MIN_SEEDS
        edge += [not few and supported(measured, r / math.exp(true)) for r in MARGIN]
        centre.append(not few and supported(measured, 10 / math.exp(true)))
        if len(ratios) <= WITH_GAPS:
            # Each rank's loss minus full fine-tuning's at their best LRs, paired by seed, in nats.
            # In two stages, the first seed selected the LRs and does not count. In a plain grid,
            # all seeds selected the LRs, and all count.
            full, *lora = losses_at_best(optima)
            used = {0} if design.fresh else set()
            full = full.each(lambda v: {s: x for s, x in v.items() if s not in used})  # noqa: B023
            paired = [o.minus(full) for o in lora]
            losses += [(over_seeds(v, pooled_over(paired)), 0.0) for v in paired]
    return {
        "family": family,
        **design.__dict__,
        **{"runs": design.runs, "reach": reach, "sweeps": cases},
        **{f"ratio_{k}": v for k, v in _summary(ratios, log=True).items()},
        **{f"gap_{k}": v for k, v in _summary(losses, log=False).items()},
        "false_supported": share(edge),
        "true_supported": share(centre),
    }


def supported(ratio: Estimate, scale: float) -> bool:
    """Return whether the interval times `scale` (wanted ratio / true ratio) lies in MARGIN.

    Both arms are simulated on one grid, so that the true ratio is near 1.
    """
    if ratio.value is None or not ratio.has_interval():
        return False
    low, high = ratio.interval
    return MARGIN[0] <= low * scale and high * scale <= MARGIN[1]


def _summary(found: Sequence[tuple[Estimate, float]], log: bool) -> Figures:
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


# ---------------------------------------------------------------- the page

FINE = 2.0
"""Largest factor between neighbouring LRs up to which the targets for coverage apply."""
OF = {"ratio": ("the ratio", LR_RATIO), "gap": ("the gap in loss", REGIME)}
"""What a sweep measures, in words, and the design of that sweep."""
AIM = 0.5
"""Target: a two-stage sweep's runs / the runs of a plain grid with the same interval."""
LEAST_SEEDS = 2.0
"""Fewest seeds of a plain grid. With one seed, too few degrees of freedom show the noise."""
TARGETS = """\
coverage of intervals of the best learning rate, mean|94 to 98%
the same, in the worst family|at least 93%
coverage of intervals of the ratio, mean|94 to 98%
the same, in the worst family|at least 93%
values and bounds at an edge or near divergence that hold, worst case|at least 93%
best learning rates from grids with wider spacing, in the worst family|at least 93%
median error of the best learning rate (7 LRs a factor 2 apart, 2 seeds)|below 1.1x
correct flags for optima at an edge or near divergence, worst case|at least 99%
false claims (true value at the margin's edge) that are SUPPORTED|at most 2.5%
true, precisely measured claims that are UNDECIDED|at most 20%"""
"""Name and target of each requirement, in the order of `targets`."""
FAMILY_COLUMNS = {
    "coverage": "coverage",
    "of values": "coverage_value",
    "of bounds": "coverage_bound",
    "with a value": "valued",
    "error": "error",
    "ratio": "ratio_coverage",
    "argmin error": "argmin_error",
    "parabola coverage": "parabola_coverage",
    "parabola error": "parabola_error",
    "global coverage": "global_coverage",
    "global error": "global_error",
}
DESIGN_COLUMNS = {
    "half-width of ln(ratio)": "ratio_half_width",
    "with an interval": "ratio_answered",
    "coverage": "ratio_coverage",
    "false claims SUPPORTED": "false_supported",
    "true claims SUPPORTED": "true_supported",
    "plain grid's runs": "ratio",
    "half-width of the gap, nats": "gap_half_width",
    "coverage of the gap": "gap_coverage",
    "plain grid's runs for the gap": "gap",
}
"""Column of the table of designs -> figure; `ratio` and `gap`: see `plain_seeds`."""


def _shown(value: float | None, key: str = "coverage") -> str:
    """Format a figure by its name: shares in percent, a missing one as a dash."""
    if value is None or value != value:
        return "-"
    if "width" in key or "error" in key:
        return number(value)
    return f"{100 * value:.{0 if key == 'valued' else 1}f}%"


def _fine(study: Figures) -> pd.DataFrame:
    """Return the conditions with learning rates at most FINE apart."""
    return pd.DataFrame(study["coverage"]).query("factor <= @FINE")


def _worst(means: pd.Series) -> tuple[float, str]:
    """Return the lowest of some means and the name of that mean; ties: alphabetical order."""
    return float(means.min()), str(means.sort_index().idxmin())


def _met(met: bool) -> str:
    return "yes" if met else "**no**"


def targets(study: Figures) -> Rows:
    """Compare the targets for the analysis with the measurements of the calibration.

    Returns rows of name, target, measured, met, after the head.
    """
    fine, flags, verdicts = _fine(study), *map(pd.DataFrame, (study["flags"], study["verdicts"]))
    found: list[tuple[str, str]] = []
    for key in ("coverage", "ratio_coverage"):
        mean, (worst, where) = fine[key].mean(), _worst(fine.groupby("family")[key].mean())
        found.append((_shown(mean), "no: too wide" if mean > 0.98 else _met(mean >= 0.94)))
        found.append((f"{_shown(worst)} ({where})", _met(worst >= 0.93)))
    held = flags.set_index(flags["family"] + ", " + flags["where"])["holds"]
    coarse = pd.DataFrame(study["coverage"]).query("factor > @FINE")
    for worst, where in (_worst(held), _worst(coarse.groupby("family")["coverage"].mean())):
        found.append((f"{_shown(worst)} ({where})", _met(worst >= 0.93)))
    errors = fine.query("rates == 7 and factor == 2 and seeds == 2 and fresh == 0")["error"]
    middle, most = errors.median(), number(errors.max())
    found.append((f"{number(middle)}x, at most {most}x in any condition", _met(middle < 1.1)))
    right, where = _worst(flags.groupby("where")["right"].mean())
    found.append((f"{_shown(right)} ({where})", _met(right >= 0.99)))
    edge = verdicts[verdicts["ratio"].isin(MARGIN)]["supported"]
    false, most = edge.mean(), _shown(edge.max())
    found.append((f"{_shown(false)}, at most {most} in any condition", _met(false <= 0.025)))
    open_ = verdicts[verdicts["ratio"] == 10.0]["undecided"].mean()
    found.append((_shown(open_), _met(open_ <= 0.2)))
    rows = [[*line.split("|"), *row] for line, row in zip(TARGETS.splitlines(), found)]
    return [["requirement", "target", "measured", "met"], *rows, *_runs_needed(study)]


def _runs_needed(study: Figures) -> Rows:
    """Compare the runs of two sweeps' designs with AIM."""
    means, rows = _design_means(study["designs"], KNOWN), []
    plain = means[means.index.isin([_name(d.__dict__) for d in PLAIN])]
    for of, (what, mine) in OF.items():
        seeds = means[f"{of}_half_width"].map(lambda w, of=of: plain_seeds(w, plain, of))
        shares = (means["runs"] / (seeds * PLAIN[0].rates))[
            np.isfinite(seeds) & (means["fresh"] > 0)
        ]
        name = _name(mine.__dict__)
        least = shares.idxmin()
        other = "" if least == name else f"; lowest {shares[least]:.0%} ({least})"
        part = shares.get(name, math.nan)
        shown = "no interval in half of the sweeps" if math.isnan(part) else f"{part:.0%}"
        what = f"runs of a two-stage sweep / of a plain grid with the same interval of {what}"
        rows.append([what, f"at most {AIM:.0%}", f"{shown} ({name}){other}", _met(part <= AIM)])
    return rows


def _name(row: Figures) -> str:
    grid = f"{row['rates']:.0f} LRs a factor {row['factor']:g} apart, {row['seeds']:.0f} seed"
    at = f", {row['fresh']:.0f} fresh seeds at {row['fresh_rates']:.0f}"
    return grid + ("s" if row["seeds"] > 1 else "") + (at if row["fresh"] else "")


def _design_means(rows: Sequence[Figures], reach: float) -> pd.DataFrame:
    """Return each design's means over families; NaN where a family has no value."""
    mine = pd.DataFrame(rows).query("reach == @reach").drop(columns="family")
    names = pd.Index([_name(r) for r in mine.to_dict("records")], name="design")
    return (
        mine.set_index(names)
        .astype(float)
        .groupby(level=0, sort=False)
        .agg(lambda v: v.mean(skipna=False))
    )


def plain_seeds(width: float, plain: pd.DataFrame, of: str) -> float:
    """Return the seeds (at least LEAST_SEEDS) of a plain grid with intervals of half-width `width`.

    Interpolated in logarithms. Infinity beyond the most seeds tried; NaN if unknown.

    Args:
        plain: a row of means for each plain grid, by rising number of seeds.
        of: "ratio" or "gap".
    """
    if not math.isfinite(width) or len(plain) < 2:
        return math.nan
    widths = plain[f"{of}_half_width"].to_numpy()
    falls = np.isfinite(widths) & (widths < np.fmin.accumulate([math.inf, *widths[:-1]]))
    if not falls.any() or width < widths[falls][-1]:
        return math.inf
    seeds, at = np.log(plain["seeds"].to_numpy()[falls]), -np.log(widths[falls])
    return max(LEAST_SEEDS, math.exp(float(np.interp(-math.log(width), at, seeds))))


def _design_table(rows: Sequence[Figures], reach: float) -> Rows:
    """Return the table of designs, after its head."""
    means = _design_means(rows, reach)
    plain = means[means.index.isin([_name(d.__dict__) for d in PLAIN])]
    out = [["design", "runs per curve", *DESIGN_COLUMNS]]
    for name, row in means.iterrows():
        cells = []
        for key in DESIGN_COLUMNS.values():
            if key not in OF:
                cells.append(_shown(row[key], key))
                continue
            seeds = plain_seeds(row[f"{key}_half_width"], plain, key)
            runs = PLAIN[0].rates * min(seeds, plain["seeds"].max())
            shown = f"{'over ' if math.isinf(seeds) else ''}{runs:.0f}"
            cells.append("-" if name in plain.index or math.isnan(seeds) else shown)
        out.append([str(name), f"{row['runs']:.0f}", *cells])
    return out


def page(study: Figures) -> str:
    """Render the page."""
    tried, fine = study["designs"], _fine(study)
    families = [["family", *FAMILY_COLUMNS]]
    for f, cells in fine.groupby("family", sort=False):
        mark = " (inside)" if f in INSIDE else " (held out)" if f in HELD_OUT else ""
        means = [_shown(cells[key].mean(), key) for key in FAMILY_COLUMNS.values()]
        families.append([f"{f}{mark}", *means])
    head = "learning rates|factor|seeds|fresh seeds|noise|coverage|worst family|with a value"
    by_design = [[*head.split("|"), "width (high / low)", "error", "ratio"]]
    design = ["rates", "factor", "seeds", "fresh", "noise"]
    for values, cells in pd.DataFrame(study["coverage"]).groupby(design, sort=False):
        low, where = _worst(cells.set_index("family")["coverage"])
        mean = {k: _shown(cells[k].mean(), k) for k in ("coverage", "valued", "error")}
        row = [mean["coverage"], f"{_shown(low)} ({where})", mean["valued"]]
        row += [number(float(np.exp(cells["width"].mean()))), mean["error"]]
        by_design.append(
            [*(f"{v:g}" for v in values), *row, _shown(cells["ratio_coverage"].mean())]
        )
    outcomes = ["supported", "refuted", "undecided"]
    judged = [["true ratio", "noise", *map(str.upper, outcomes), "most SUPPORTED (family)"]]
    for (ratio, noise), cells in pd.DataFrame(study["verdicts"]).groupby(["ratio", "noise"]):
        most, where = max(zip(cells["supported"], cells["family"]))
        means = [_shown(cells[k].mean()) for k in outcomes]
        judged.append([f"{ratio:g}", f"{noise:g}", *means, f"{_shown(most)} ({where})"])
    return render(
        "calibration",
        n_coverage=sum(r["cases"] for r in study["coverage"]),
        n_cells=len(study["coverage"]),
        least=min(r["cases"] for r in study["coverage"]),
        judged=sum(r["cases"] for r in study["verdicts"]),
        minutes=study["minutes"],
        **{"inside": ", ".join(INSIDE), "held_out": ", ".join(HELD_OUT)},
        **{"fine": FINE, "margin": MARGIN, "intervals": tried},
        interval_families=", ".join(dict.fromkeys(r["family"] for r in tried)),
        interval_tables={
            v: _design_table(tried, v) for v in dict.fromkeys(r["reach"] for r in tried)
        },
        targets=targets(study),
        families=families,
        designs=by_design,
        verdicts=judged,
        flags=[
            ["family", "optimum", "flag right", "value or bound holds"],
            *(
                [r["family"], r["where"], *map(_shown, (r["right"], r["holds"]))]
                for r in study["flags"]
            ),
        ],
    )


def draw(study: Figures, inputs: str) -> None:
    """Draw how often intervals hold the truth by family, and verdicts over the true ratio."""
    fine, keys = _fine(study), ["parabola_coverage", "global_coverage"]
    families = list(dict.fromkeys(fine["family"]))
    simpler, at = 100 * fine.groupby("family")[keys].mean(), list(range(len(families)))
    series = [
        Series(
            f"noise {noise:g}",
            at,
            list(100 * cells.groupby("family")["coverage"].mean()[families]),
            style="o",
        )
        for noise, cells in fine.groupby("noise")
    ]
    for key, label, style in zip(keys, ("5-point parabola, bootstrap", "one parabola"), "x+"):
        series.append(Series(label, at, list(simpler[key][families]), style=style, colour="grey"))
    ticks: list[tuple[float, str]] = [
        (k, "\n" * (k % 2) + f.replace("_", " ")) for k, f in enumerate(families)
    ]
    asked, y = {"asked in each family: 93%": 93.0}, "intervals that hold the truth (%)"
    panel = Panel("", "family", y, series, lines=asked, ticks=ticks, y_range=(0, 103))
    plots.panels([panel], PAGE.figures.with_name("coverage.png"), inputs)
    panels = []
    for noise, cells in pd.DataFrame(study["verdicts"]).groupby("noise"):
        means = 100 * cells.groupby("ratio")[["supported", "refuted", "undecided"]].mean()
        series = [Series(k.upper(), list(means.index), list(means[k])) for k in means]
        ticks = [(v, f"{v:g}") for v in means.index]
        name = f"true ratio (margin {MARGIN[0]:g} to {MARGIN[1]:g})"
        panels.append(Panel(f"noise {noise:g} nats", name, "sweeps (%)", series, True, ticks=ticks))
    plots.panels(panels, PAGE.figures.with_name("verdicts.png"), inputs)


PAGE = Page(RESULTS / "calibration" / "calibration.json", "README.md", page, draw)


# ---------------------------------------------------------------- all conditions


def tasks(cases: int) -> Iterator[tuple[Any, ...]]:
    """Yield all conditions of the calibration: a function and its arguments."""
    for f in FAMILIES:
        for d in DESIGNS:
            yield from ((coverage, f, dataclasses.replace(d, noise=s), cases) for s in NOISES)
    for f in DESIGN_FAMILIES:
        for r in RATIOS:
            for s in (1e-3, 3e-3):
                yield verdicts, f, r, Design(7, 2.0, 1, 5, s), cases
    for f in ("linex", "plateau", "kink", "double_slope"):
        yield from ((flags, f, w, cases // 2) for w in POSITIONS)
    yield from ((designs, *cell, cases // 2) for cell in designs_tried())


def main(argv: Sequence[str] | None = None) -> None:
    """Run the calibration and write its numbers."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks calibration", description=__doc__)
    parser.add_argument(
        "--cases", type=int, default=500, help="sweeps per condition, each with four optima"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    kinds = ("coverage", "verdicts", "flags", "designs")
    parser.add_argument("--only", choices=kinds, help="rerun only this part")
    parser.add_argument("--out", type=Path, default=PAGE.figures.parent)
    args = parser.parse_args(argv)
    started, path = time.monotonic(), args.out / PAGE.figures.name
    study: Figures = {"cases": args.cases, "minutes": 0.0}
    if args.only:
        study = json.loads(path.read_text())
        study.pop(args.only, None)
    cells = [c for c in tasks(args.cases) if args.only in (None, c[0].__name__)]
    with ProcessPoolExecutor(args.jobs) as pool:
        rows = [pool.submit(*cell) for cell in cells]
        for k, (row, cell) in enumerate(zip(rows, cells)):
            kind = cell[0].__name__
            study.setdefault(kind, []).append(row.result())
            print(f"{k + 1} {kind} {row.result()}", flush=True)
    study["minutes"] = round(study["minutes"] + (time.monotonic() - started) / 60, 1)
    args.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(study, indent=1) + "\n")
    if path == PAGE.figures:
        PAGE.write()
