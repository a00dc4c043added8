"""Calibrate the analysis on simulated sweeps, which are fitted and judged exactly like real ones.

    python -m benchmarks calibration [--cases 1000] [--jobs 2]         (make calibrate)

Writes analysis/results/calibration/calibration.json, and the page and figures from it. A case is a
sweep of four curves with one shape: four optima and three ratios. The model's constants were chosen
on other draws, and without some of the families (generators.HELD_OUT).
"""

import argparse
import dataclasses
import json
import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from analysis.inference.decide import judge
from analysis.inference.estimate import from_draws
from analysis.inference.gates import MIN_SEEDS, Gate, GateCode
from analysis.measures.ratio import ratio_of
from analysis.optimum.fit import fit_sweeps
from analysis.optimum.optimum import seeds_at_best
from analysis.runs.lr_curves import LrCurve
from benchmarks.calibration import page
from benchmarks.calibration.coverage import coverage, covers, fitted, middle, share, stream
from benchmarks.calibration.designs import designs, designs_tried
from benchmarks.calibration.generators import FAMILIES, MARGIN, Design, plant

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
CLAIM = {"margin": MARGIN, "expected": 10, "primary": True}
POSITIONS = ("inside", "below", "above")


def verdicts(family: str, ratio: float, design: Design, cases: int) -> dict[str, Any]:
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
    return {
        "family": family,
        "ratio": ratio,
        "noise": design.noise,
        "cases": cases,
        **{k.lower(): v / cases for k, v in count.items()},
    }


def flags(family: str, where: str, cases: int) -> dict[str, Any]:
    """Count how often the flags of optima at the edge of the learning rates are right.

    True optima lie at least 1.5 grid spacings inside the learning rates tried, or 0.5 to 1.5 beyond
    an end.
    """
    rng = stream("flags", family, where)
    design = Design(7, 2.0, 2, noise=1e-3)
    reach = design.rates - 1
    position = {"inside": (1.5, 1.5), "below": (-1.5, reach + 0.5), "above": (reach + 0.5, -1.5)}
    options = {"place": position[where], "steep": (0.05, 0.3)}
    right = holds = n = 0
    for _, truths, optima in fitted(family, design, rng, cases, **options):
        for o, truth in zip(optima, truths):
            n += 1
            if where == "inside":
                right += o.best_lr.value is not None or "bounded_by_divergence" in o.flags
            else:
                right += o.best_lr.value is None and "at_edge" in o.flags
            holds += covers(o.best_lr, math.exp(float(truth)))
    return {"family": family, "where": where, "cases": n, "right": right / n, "holds": holds / n}


def sharing(family: str, rates: int, factor: float, noise: float, cases: int) -> dict[str, Any]:
    """Compare coverage and width of fits with and without a shape prior from other ranks."""
    rng = stream("sharing", family, rates, factor, noise)
    row: dict[str, Any] = {
        "family": family,
        "rates": rates,
        "factor": factor,
        "noise": noise,
        "sweeps": cases,
    }
    planted = [_related(family, rates, factor, noise, rng) for _ in range(cases)]
    for name, with_prior in (("alone", False), ("shared", True)):
        hits, widths = [], []
        for (_, truths), optima in zip(
            planted, fit_sweeps([c for c, _ in planted], share=with_prior)
        ):
            for o, truth in list(zip(optima, truths))[2:]:
                if o.best_lr.has_interval() and o.best_lr.value is not None:
                    hits.append(covers(o.best_lr, math.exp(float(truth))))
                    low, high = o.best_lr.interval
                    widths.append(math.log(high / low))
        row[name] = {"answers": len(hits), "coverage": share(hits), "width": middle(widths)}
    return row


def _related(
    family: str, rates: int, factor: float, noise: float, rng: np.random.Generator
) -> tuple[list[LrCurve], np.ndarray]:
    """Simulate six ranks of one shape, with curvatures within about 20%.

    Two have seven learning rates, four have fewer.
    """
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
        arrays = {a: getattr(c, a)[keep] for a in ("x", "y", "seed", "block", "usable")}
        out.append(dataclasses.replace(c, key=key, **arrays))
    return out, truths


def tasks(cases: int) -> list[tuple[Any, ...]]:
    """List all conditions of the calibration: a function and its arguments."""
    cells: list[tuple[Any, ...]] = [
        (coverage, f, dataclasses.replace(d, noise=s), cases)
        for f in FAMILIES
        for d in DESIGNS
        for s in NOISES
    ]
    judged = Design(7, 2.0, 1, 5)
    cells += [
        (verdicts, f, r, dataclasses.replace(judged, noise=s), cases)
        for f in ("linex", "plateau", "kink", "well")
        for r in RATIOS
        for s in (1e-3, 3e-3)
    ]
    cells += [
        (flags, f, w, cases // 2)
        for f in ("linex", "plateau", "kink", "double_slope")
        for w in POSITIONS
    ]
    cells += [
        (sharing, f, r, w, s, cases // 4)
        for f in ("linex", "plateau", "well")
        for r in (7, 5, 4, 3)
        for w in (2.0, 3.0)
        for s in (1e-3, 5e-3)
    ]
    return cells + [(designs, *cell, cases // 2) for cell in designs_tried()]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the calibration and write its numbers."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks calibration", description=__doc__)
    parser.add_argument(
        "--cases", type=int, default=500, help="sweeps per condition, each with four optima"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--only",
        choices=("coverage", "verdicts", "flags", "sharing", "designs"),
        help="rerun only this part",
    )
    parser.add_argument("--out", type=Path, default=page.FOLDER)
    args = parser.parse_args(argv)
    started = time.monotonic()
    study: dict[str, Any] = {"cases": args.cases, "minutes": 0.0}
    if args.only:
        study = json.loads((args.out / "calibration.json").read_text())
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
    (args.out / "calibration.json").write_text(json.dumps(study, indent=1) + "\n")
    if args.out == page.FOLDER:
        page.write()
