"""Measure on simulated sweeps how often intervals contain the truth, also for simpler estimators.

A condition is a family of shapes and a design; a case is a sweep of four curves with one shape.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from analysis.inference.estimate import Estimate
from analysis.measures.ratio import ratio_of
from analysis.optimum.fit import fit_sweeps
from analysis.optimum.optimum import Optimum
from analysis.runs.lr_curves import LrCurve
from benchmarks.calibration.generators import Design, plant

ERRORS = ("error", "ratio_error", "argmin_error", "parabola_error", "global_error")
"""Errors as factors between estimate and truth; only the median of each is kept."""
BATCH = 100
"""Number of sweeps fitted together."""
WITH_BASELINES = 200
"""Number of sweeps of a condition to which the simpler estimators are applied, too."""


def fitted(
    family: str, design: Design, rng: np.random.Generator, sweeps: int, **options: Any
) -> Iterator[tuple[list[LrCurve], np.ndarray, list[Optimum]]]:
    """Simulate sweeps by `plant` and fit BATCH at a time; yield curves, true optima, and fits."""
    for start in range(0, sweeps, BATCH):
        planted = [plant(family, design, rng, **options) for _ in range(min(BATCH, sweeps - start))]
        for (curves, truths), optima in zip(planted, fit_sweeps([c for c, _ in planted])):
            yield curves, truths, optima


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


def coverage(family: str, design: Design, cases: int) -> dict[str, Any]:
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
    rows["argmin_error"].append(abs(x[best] - truth))
    vertex = _vertex(x, mean[None], best)[0]
    if np.isfinite(vertex):
        rows["parabola_error"].append(abs(vertex - truth))
    if len(seeds) > 1:
        drawn = _vertex(x, y[rng.integers(0, len(seeds), (200, len(seeds)))].mean(1), best)
        low, high = (
            np.nanquantile(drawn, [0.025, 0.975]) if np.isfinite(drawn).any() else (np.nan, np.nan)
        )
        rows["parabola"].append(low <= truth <= high)
    (c2, c1, _), cov = np.polyfit(x - x.mean(), mean, 2, cov="unscaled" if len(x) < 6 else True)
    if c2 > 0:
        m = -c1 / (2 * c2)
        error = math.sqrt(max(cov[1, 1] + 4 * m * m * cov[0, 0] + 4 * m * cov[0, 1], 0.0)) / (
            2 * c2
        )
        rows["global_error"].append(abs(x.mean() + m - truth))
        if len(x) >= 6:
            # 2.3 is Student's t (95%) at 8 degrees of freedom; the fit has len(x) - 3.
            rows["global"].append(abs(x.mean() + m - truth) <= 2.3 * error)


def _vertex(x: np.ndarray, y: np.ndarray, best: int) -> np.ndarray:
    """Return the vertices [n] of parabolas through the five LRs around index `best`; else NaN.

    Args:
        x: ln(lr), [P].
        y: losses, [n, P].
    """
    at = slice(max(0, best - 2), best + 3)
    if len(x[at]) < 3:
        return np.full(len(y), np.nan)
    c = np.polyfit(x[at] - x[best], y[:, at].T, 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(c[0] > 0, x[best] - c[1] / (2 * c[0]), np.nan)
