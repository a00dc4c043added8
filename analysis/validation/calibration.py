"""How far the analysis can be trusted: planted sweeps, fitted and judged exactly as real ones.

    python -m analysis.validation.calibration [--cases 1000] [--jobs 2]         (make calibrate)

Writes analysis/results/calibration/calibration.json; `analysis.validation.calibration_page` renders
the table and figures from it. A case is a sweep of four curves of one shape: four optima and three
ratios. Constants of the model were chosen on other draws, with some families never looked at
(generators.HELD_OUT).
"""

import argparse
import json
import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from analysis.inference.decide import MIN_SEEDS, judge
from analysis.inference.estimate import Estimate
from analysis.measures.ratio import ratio_of
from analysis.optimum.fit import fit_sweeps
from analysis.optimum.optimum import Optimum, seeds_at_best
from analysis.runs.lr_curves import LrCurve
from analysis.validation.generators import FAMILIES, Design, plant

FOLDER = Path(__file__).resolve().parents[1] / "results" / "calibration"
NOISES = (1e-4, 1e-3, 1e-2)
DESIGNS = (
    *(Design(7, 2.0, s) for s in (1, 2, 8)),
    Design(7, 2.0, 1, 3),
    Design(9, 1.78, 2),
    Design(5, 2.0, 2),
    Design(7, 3.3, 2),
    Design(4, 3.0, 2),
    Design(5, 3.3, 1),
)
RATIOS = (3.0, 6.0, 7.1, 10.0, 14.1, 20.0)
MARGIN = (7.1, 14.1)
CLAIM = {"margin": MARGIN, "expected": 10, "primary": True}
PLACES = ("inside", "below", "above")
KINDS = (
    "value",
    "bound",
    "empty",
    "error",
    "width",
    "ratio",
    "ratio_error",
    "argmin",
    "parabola",
    "parabola_error",
    "global",
    "global_error",
)
_BATCH = 100


def _covers(e: Estimate, truth: float) -> bool:
    return (e.low is None or e.low <= truth) and (e.high is None or truth <= e.high)


def _rng(*key: Any) -> np.random.Generator:
    """A stream of the cell's own, none of which served to choose constants."""
    return np.random.default_rng([77, *(int.from_bytes(str(k).encode()[:8], "big") for k in key)])


def coverage(family: str, design: Design, cases: int) -> dict[str, Any]:
    """Fit one cell's sweeps: how often intervals and bounds hold the truth, how far off the values
    are."""
    rng = _rng(
        "coverage", family, design.rates, design.factor, design.seeds, design.fresh, design.noise
    )
    rows: dict[str, list[float]] = {k: [] for k in KINDS}
    for start in range(0, cases, _BATCH):
        planted = [plant(family, design, rng) for _ in range(min(_BATCH, cases - start))]
        for (curves, truths), optima in zip(planted, fit_sweeps([c for c, _ in planted])):
            for o, truth in zip(optima, truths):
                _tally(rows, o, float(truth))
            for o, truth in zip(optima[1:], truths[1:]):
                r = ratio_of([o], optima[0])
                if r.value is not None and r.has_interval():
                    rows["ratio"].append(_covers(r, math.exp(truth - truths[0])))
                    rows["ratio_error"].append(abs(math.log(r.value) - (truth - truths[0])))
            if start < 200:
                for c, truth in zip(curves, truths):
                    _rivals(rows, c, float(truth), rng)
    answers = rows["value"] + rows["bound"]  # an answer that says nothing is no success
    return {
        "family": family,
        **design.__dict__,
        "cases": design.curves * cases,
        "sweeps": cases,
        "coverage": _share(answers),
        "coverage_value": _share(rows["value"]),
        "coverage_bound": _share(rows["bound"]),
        "empty": len(rows["empty"]) / (design.curves * cases),
        "valued": len(rows["value"]) / (design.curves * cases),
        "error": _factor(rows["error"]),
        "width": _middle(rows["width"]),
        "ratio_coverage": _share(rows["ratio"]),
        "ratio_cases": len(rows["ratio"]),
        "ratio_error": _factor(rows["ratio_error"]),
        "argmin_error": _factor(rows["argmin"]),
        "parabola_coverage": _share(rows["parabola"]),
        "parabola_error": _factor(rows["parabola_error"]),
        "global_coverage": _share(rows["global"]),
        "global_error": _factor(rows["global_error"]),
    }


def _tally(rows: dict[str, list[float]], o: Optimum, truth: float) -> None:
    e = o.best_lr
    if e.value is None and e.low is None and e.high is None:
        rows["empty"].append(1.0)
    elif e.value is None:
        rows["bound"].append(_covers(e, math.exp(truth)))
    elif e.has_interval():
        rows["value"].append(_covers(e, math.exp(truth)))
        rows["width"].append(math.log(e.high / e.low))
        rows["error"].append(abs(math.log(e.value) - truth))
    else:
        rows["error"].append(abs(math.log(e.value) - truth))


def _share(hits: Sequence[float]) -> float | None:
    return float(np.mean(hits)) if hits else None


def _factor(errors: Sequence[float]) -> float | None:
    return float(np.exp(np.median(errors))) if errors else None


def _middle(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if values else None


# ---------------------------------------------------------------- what others do, on the same cases


def _rivals(
    rows: dict[str, list[float]], curve: LrCurve, truth: float, rng: np.random.Generator
) -> None:
    """Grid argmin; the 5-point parabola with a bootstrap over seeds; one parabola through all
    points, least squares."""
    x = np.unique(curve.x[curve.usable])
    seeds = [s for s in np.unique(curve.seed) if (curve.usable & (curve.seed == s)).sum() == len(x)]
    if not seeds or len(x) < 5:
        return
    y = np.array([curve.y[curve.usable & (curve.seed == s)] for s in seeds])
    mean = y.mean(0)
    best = int(np.argmin(mean))
    rows["argmin"].append(abs(x[best] - truth))
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
            rows["global"].append(
                abs(x.mean() + m - truth) <= 2.3 * error
            )  # about t at 4 degrees of freedom


def _vertex(x: np.ndarray, y: np.ndarray, best: int) -> np.ndarray:
    """Vertices of parabolas through the five rates around the best, rows of y [n, P]; NaN where one
    opens downward."""
    at = slice(max(0, best - 2), best + 3)
    if len(x[at]) < 3:
        return np.full(len(y), np.nan)
    c = np.polyfit(x[at] - x[best], y[:, at].T, 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(c[0] > 0, x[best] - c[1] / (2 * c[0]), np.nan)


# ---------------------------------------------------------------- verdicts, flags, shared curvature


def verdicts(family: str, ratio: float, design: Design, cases: int) -> dict[str, Any]:
    """Judge 'the ratio lies in 7.1 to 14.1' where it is known: full fine-tuning against three
    ranks."""
    rng = _rng("verdicts", family, ratio, design.noise)
    count = {"SUPPORTED": 0, "REFUTED": 0, "UNDECIDED": 0}
    for start in range(0, cases, _BATCH):
        planted = [
            plant(family, design, rng, steep=(0.05, 0.3)) for _ in range(min(_BATCH, cases - start))
        ]
        for (_, truths), optima in zip(planted, fit_sweeps([c for c, _ in planted])):
            measured = ratio_of(optima[1:], optima[0])
            offset = ratio / math.exp(
                float(np.mean(truths[1:])) - truths[0]
            )  # the arms' grids lie this far apart
            if measured.draws is not None:
                measured = Estimate(
                    measured.value * offset,
                    measured.low * offset,
                    measured.high * offset,
                    draws=measured.draws * offset,
                )
            seeds = min(seeds_at_best(o) for o in optima)
            gates = [] if seeds >= MIN_SEEDS and measured.has_interval() else ["seeds or edge"]
            count[judge("ratio", CLAIM, "planted", measured, gates, seeds, True).outcome] += 1
    return {
        "family": family,
        "ratio": ratio,
        "noise": design.noise,
        "cases": cases,
        **{k.lower(): v / cases for k, v in count.items()},
    }


def flags(family: str, where: str, cases: int) -> dict[str, Any]:
    """Plant optima 1.5 spacings inside, or up to 1.5 beyond an end by at least half of one: is it
    said so?"""
    rng = _rng("flags", family, where)
    design = Design(7, 2.0, 2, noise=1e-3)
    reach = design.rates - 1
    place = {"inside": (1.5, 1.5), "below": (-1.5, reach + 0.5), "above": (reach + 0.5, -1.5)}[
        where
    ]
    right = holds = n = 0
    for start in range(0, cases, _BATCH):
        planted = [
            plant(family, design, rng, place, (0.05, 0.3))
            for _ in range(min(_BATCH, cases - start))
        ]
        for (_, truths), optima in zip(planted, fit_sweeps([c for c, _ in planted])):
            for o, truth in zip(optima, truths):
                n += 1
                if where == "inside":
                    right += o.best_lr.value is not None or "bounded_by_divergence" in o.flags
                else:
                    right += o.best_lr.value is None and "at_edge" in o.flags
                holds += _covers(o.best_lr, math.exp(float(truth)))
    return {"family": family, "where": where, "cases": n, "right": right / n, "holds": holds / n}


def sharing(family: str, rates: int, factor: float, noise: float, cases: int) -> dict[str, Any]:
    """Ranks that share their curvature: what lending it to each other saves, and whether coverage
    survives."""
    rng = _rng("sharing", family, rates, factor, noise)
    told: dict[str, Any] = {
        "family": family,
        "rates": rates,
        "factor": factor,
        "noise": noise,
        "sweeps": cases,
    }
    planted = [_kindred(family, rates, factor, noise, rng) for _ in range(cases)]
    for name, share in (("alone", False), ("shared", True)):
        hits, widths = [], []
        for (_, truths), optima in zip(planted, fit_sweeps([c for c, _ in planted], share=share)):
            for o, truth in list(zip(optima, truths))[2:]:
                if o.best_lr.has_interval() and o.best_lr.value is not None:
                    hits.append(_covers(o.best_lr, math.exp(float(truth))))
                    widths.append(math.log(o.best_lr.high / o.best_lr.low))
        told[name] = {"answers": len(hits), "coverage": _share(hits), "width": _middle(widths)}
    return told


def _kindred(
    family: str, rates: int, factor: float, noise: float, rng: np.random.Generator
) -> tuple[list[LrCurve], np.ndarray]:
    """Plant six ranks of one shape, curvatures within 20%: the first two at seven rates, the others
    at fewer."""
    steep = math.exp(rng.uniform(math.log(0.05), math.log(0.2)))
    curves, truths = plant(
        family,
        Design(7, factor, 2, noise=noise, curves=6),
        rng,
        (2.0, 2.0),
        (steep / 1.1, steep * 1.1),
    )
    out = []
    for k, (c, truth) in enumerate(zip(curves, truths)):
        x = np.unique(c.x)
        near = int(np.argmin(np.abs(x - truth)))
        first = min(max(near - rates // 2, 0), 7 - rates)
        keep = np.isin(c.x, x[first : first + rates]) if k > 1 else np.ones(len(c.x), bool)
        key = {**c.key, "method": "lora", "rank": 2.0**k}
        out.append(
            LrCurve(
                key,
                c.x[keep],
                c.y[keep],
                c.seed[keep],
                c.block[keep],
                c.usable[keep],
                c.nll_start,
                c.floor,
            )
        )
    return out, truths


def tasks(cases: int) -> list[tuple[Any, ...]]:
    """List every cell of the study."""
    from dataclasses import replace

    cells: list[tuple[Any, ...]] = [
        (coverage, f, replace(d, noise=s), cases) for f in FAMILIES for d in DESIGNS for s in NOISES
    ]
    judged = Design(7, 2.0, 1, 5)
    cells += [
        (verdicts, f, r, replace(judged, noise=s), cases)
        for f in ("linex", "plateau", "kink", "well")
        for r in RATIOS
        for s in (1e-3, 3e-3)
    ]
    cells += [
        (flags, f, w, cases // 2)
        for f in ("linex", "plateau", "kink", "double_slope")
        for w in PLACES
    ]
    return cells + [
        (sharing, f, r, w, s, cases // 4)
        for f in ("linex", "plateau", "well")
        for r in (7, 5, 4, 3)
        for w in (2.0, 3.0)
        for s in (1e-3, 5e-3)
    ]


def _do(cell: tuple[Any, ...]) -> tuple[str, dict[str, Any]]:
    return cell[0].__name__, cell[0](*cell[1:])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study and keep its figures."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.validation.calibration", description=__doc__
    )
    parser.add_argument(
        "--cases", type=int, default=500, help="sweeps a cell: four optima and three ratios each"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--only", choices=("coverage", "verdicts", "flags", "sharing"), help="run this part again"
    )
    parser.add_argument("--out", type=Path, default=FOLDER)
    args = parser.parse_args(argv)
    started = time.monotonic()
    told: dict[str, Any] = {"cases": args.cases, "minutes": 0.0}
    if args.only:
        told = json.loads((args.out / "calibration.json").read_text())
        told.pop(args.only, None)
    cells = [c for c in tasks(args.cases) if args.only in (None, c[0].__name__)]
    with ProcessPoolExecutor(args.jobs) as pool:
        for k, (kind, row) in enumerate(pool.map(_do, cells)):
            told.setdefault(kind, []).append(row)
            print(f"{k + 1} {kind} {row}", flush=True)
    told["minutes"] = round(told["minutes"] + (time.monotonic() - started) / 60, 1)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "calibration.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
