"""The best reward of the rates at which no run collapses.

A reward is often nearly flat up to the rate at which the first runs collapse. The best rate is then
only bounded, although the reward that can be had is known. So it is the top of a parabola in
ln(rate) through the mean rewards of the best stable rate and its neighbours, and at most at their
ends. The best of several noisy means would look better than it is. Each seed's share is its
jackknife pseudo-value; their mean and spread give the interval (Miller, Biometrika 61, 1974).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.inference.censored import pseudo_values
from analysis.inference.gates import MIN_SEEDS, Gate, GateCode
from analysis.measures.at_best import AtBest
from analysis.runs.lr_curves import LrCurve, runs_of

WINDOW = 5
"""Stable rates through which the parabola goes: the best one, and the next ones around it."""
SAME = 1e-6
"""Rates that differ by less in ln(rate) are one rate."""


@dataclass(frozen=True)
class Stable:
    """What a curve reaches at stable rates."""

    rate: float
    """ln of the tried rate next to the parabola's top."""
    loss: AtBest[float]
    """Pseudo-values of the loss at the top, by seed."""


def stable(curve: LrCurve) -> Stable | None:
    """Find the best stable rate of a curve; None if there is none.

    Stable rates are those at which all seeds ran and none collapsed.
    """
    seeds, rates, losses = _stable_runs(curve)
    if not len(rates):
        return None
    best = int(losses.mean(1).argmin())
    first = min(max(0, best - WINDOW // 2), max(0, len(rates) - WINDOW))
    x, y = rates[first : first + WINDOW], losses[first : first + WINDOW]
    at, lowest = _bottom(x, y.mean(1))
    n = len(seeds)
    rest = [_bottom(x, np.delete(y, k, 1).mean(1))[1] for k in range(n)] if n > 1 else [lowest]
    by_seed = dict(zip(seeds, pseudo_values(lowest, rest)))
    return Stable(float(x[np.abs(x - at).argmin()]), AtBest(by_seed))


def _stable_runs(curve: LrCurve) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Return the seeds, the stable rates, ascending, and losses [rates, seeds]."""
    found = {
        (round(float(x), 6), int(s)): float(y) if u else math.nan
        for x, s, y, u in zip(curve.x, curve.seed, curve.y, curve.usable)
    }
    seeds = sorted({s for _, s in found})
    by_rate = {
        x: [found.get((x, s), math.nan) for s in seeds] for x in sorted({x for x, _ in found})
    }
    kept = {x: losses for x, losses in by_rate.items() if np.isfinite(losses).all()}
    return seeds, np.array(list(kept)), np.array(list(kept.values()))


def _bottom(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Return where the least-squares parabola is lowest within x, and how low."""
    middle = float(x.mean())
    parabola = np.polyfit(x - middle, y, min(2, len(x) - 1))
    low, high = float(x[0]) - middle, float(x[-1]) - middle
    tried = [low, high]
    if len(parabola) == 3 and parabola[0] > 0:
        tried.append(min(max(low, float(-parabola[1] / (2 * parabola[0]))), high))
    at = min(tried, key=lambda v: float(np.polyval(parabola, v)))
    return at + middle, float(np.polyval(parabola, at))


def values_at_stable(
    table: pd.DataFrame, curve: LrCurve, read: Callable[[pd.Series], dict[Any, float]]
) -> AtBest[dict[Any, float]]:
    """Return by seed what `read` finds in the runs at the tried rate next to the best stable one.

    Seeds of which it finds nothing are left out.
    """
    best = stable(curve)
    found = {
        int(run["seed"]): read(run)
        for _, run in runs_of(table[table["status"] == "done"], curve).iterrows()
        if best is not None and abs(math.log(run["lr"]) - best.rate) < SAME
    }
    return AtBest({s: values for s, values in found.items() if values})


def gates_on_stable(curves: Sequence[LrCurve]) -> list[Gate]:
    """Return what forbids a verdict about rewards at stable rates.

    Too few seeds at the same rates, or a best rate that is the lowest or the highest one tried.
    """
    gates = []
    for curve in curves:
        best = stable(curve)
        n = 0 if best is None else len(best.loss.best)
        if best is None or n < MIN_SEEDS:
            gates.append(Gate(GateCode.FEW_SEEDS, n, f"{curve.name}: "))
        elif min(abs(best.rate - curve.x.min()), abs(best.rate - curve.x.max())) < SAME:
            gates.append(Gate(GateCode.FLAGGED, place=f"{curve.name}: ", flags=("at_edge",)))
    return gates
