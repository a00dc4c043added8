"""The best reward at stable learning rates: those at which few runs collapse.

A reward is often nearly flat up to the rate at which the first runs collapse. The best rate is then
only bounded, although the reward that can be had is known. So it is the top of a parabola in
ln(rate) through the mean rewards of the best stable rate and its neighbours, and at most at their
ends. The best of several noisy means would look better than it is. Means are over the runs that did
not collapse.

Which rates are stable, which of them is best, and where the parabola is highest depend on the
seeds. One seed more or less can change the choice, and a jackknife jumps where it does: in
simulations its intervals covered the truth in 78% of cases at 24 seeds (these: 94%). So the choice
is repeated on RESAMPLES bootstrap samples of the seeds, and the reward of each choice is read from
all seeds: that of the sample itself would look better than it is. The estimate is the mean over the
samples. Each seed's part of it is what the seed adds to the rewards that are read, and to the
choices by how often a sample has it: the infinitesimal jackknife of a smoothed estimate (Efron,
Journal of the American Statistical Association 109, 2014).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.inference.gates import MIN_SEEDS, Gate, GateCode
from analysis.measures.at_best import LIKELY, AtBest
from analysis.runs.lr_curves import LrCurve, runs_of
from analysis.runs.metric import collapsed

MAX_COLLAPSED = 0.1
"""Largest share of a rate's runs that may collapse at a stable rate. A share, so that more seeds do
not make it stricter: none of 6 runs, 1 of 12, 2 of 24."""
KEPT = 0.5
"""A rate enters the parabola if it keeps this share of the best stable rate's gain over the
untrained model. A rate at which every run is spoiled, and none collapses, would bend it."""
WINDOW = 5
"""Stable rates through which the parabola goes: the best one, and the next ones around it."""
RESAMPLES = 1000
"""Bootstrap samples of the seeds."""
SAME = 1e-6
"""Rates that differ by less in ln(rate) are one rate."""


@dataclass(frozen=True)
class Stable:
    """What a curve reaches at stable rates."""

    rate: float
    """ln of the tried rate next to the parabola's top."""
    loss: AtBest[float]
    """The loss at the top, by seed: their mean is the estimate, their spread its error."""
    likely: np.ndarray
    """ln of the tried rates next to the tops of LIKELY bootstrap samples."""


@dataclass(frozen=True)
class _Grid:
    """The runs at the rates at which all seeds ran."""

    seeds: list[int]
    x: np.ndarray
    """ln(rate), rising [rates]."""
    loss: np.ndarray
    """[rates, seeds]; 0 where the run broke down."""
    left: np.ndarray
    """1.0 where the run did not break down, else 0.0 [rates, seeds]."""
    start: float
    """Loss before training; NaN if unknown."""


def stable(curve: LrCurve) -> Stable | None:
    """Find the best stable rate of a curve; None if there is none."""
    grid = _grid(curve)
    n = len(grid.seeds)
    (at,), _ = _tops(grid, np.ones((1, n)))
    if math.isnan(at):
        return None
    draws = np.random.default_rng([20251127, n]).multinomial(n, np.full(n, 1 / n), RESAMPLES)
    tops, weights = _tops(grid, draws)
    found = np.isfinite(tops)  # in some samples no rate is stable
    tops, weights, times = tops[found], weights[found], draws[found]
    means, own = _losses(grid)
    choice = (times - times.mean(0)).T @ (weights @ means) / len(times)
    by_seed = weights.mean(0) @ own + n * (choice - choice.mean())
    return Stable(
        _nearest(grid.x, np.array([at]))[0],
        AtBest(dict(zip(grid.seeds, by_seed.tolist()))),
        _nearest(grid.x, tops[:LIKELY]),
    )


def _grid(curve: LrCurve) -> _Grid:
    found = {
        (round(float(x), 6), int(s)): math.nan if broke else float(y)
        for x, s, y, broke in zip(curve.x, curve.seed, curve.y, curve.broke_down)
    }
    seeds = sorted({s for _, s in found})
    rates = sorted({x for x, _ in found})
    x = [a for a in rates if all((a, s) in found for s in seeds)]
    loss = np.array([[found[a, s] for s in seeds] for a in x]).reshape(len(x), len(seeds))
    left = np.isfinite(loss) * 1.0
    return _Grid(seeds, np.array(x), np.nan_to_num(loss, nan=0.0), left, curve.nll_start)


def _losses(grid: _Grid) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean loss at each rate over the runs that are left, and each seed's part of it.

    A seed that broke down at a rate has the mean there. The parts' mean is the mean loss; their
    spread is as large as that of so many fewer runs [rates], [rates, seeds].
    """
    left = np.maximum(grid.left.sum(1, keepdims=True), 1)
    means = grid.loss.sum(1, keepdims=True) / left
    own = means + grid.left * (grid.loss - means) * len(grid.seeds) / left
    return means[:, 0], own


def _tops(grid: _Grid, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Choose the stable rates and find the top of the parabola, in each sample of the seeds.

    Returns ln(rate) of the tops, NaN where no rate is stable [samples], and the weights of the
    rates' means in the parabola's height there [samples, rates].

    Args:
        times: how often a sample has each seed [samples, seeds].
    """
    at, weights = np.full(len(times), math.nan), np.zeros((len(times), len(grid.x)))
    left = grid.left @ times.T  # runs that did not break down [rates, samples]
    steady = left >= (1 - MAX_COLLAPSED) * times.sum(1) - 1e-9
    means = np.where(steady, grid.loss @ times.T / np.maximum(left, 1), math.inf)
    lowest = np.where(steady.any(0), means.min(0, initial=math.inf), 0.0)
    # NaN if the start is unknown: the comparison is then False.
    used = steady & ~(means > lowest + (1 - KEPT) * (grid.start - lowest))
    for pattern in np.unique(used.T, axis=0):
        mine = np.flatnonzero((pattern == used.T).all(1))
        rates = np.flatnonzero(pattern)
        if not len(rates):
            continue
        best = means[np.ix_(rates, mine)].argmin(0)
        firsts = np.clip(best - WINDOW // 2, 0, max(0, len(rates) - WINDOW))
        for first in np.unique(firsts):
            here, window = mine[firsts == first], rates[first : first + WINDOW]
            top, share = _bottoms(grid.x[window], means[np.ix_(window, here)])
            at[here], weights[np.ix_(here, window)] = top, share
    return at, weights


def _bottoms(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where least-squares parabolas through y [rates, samples] are lowest within x.

    And the weights of y in their heights there [samples, rates].
    """
    middle, powers = float(x.mean()), range(min(3, len(x)))
    fit = np.linalg.pinv(np.stack([(x - middle) ** k for k in powers], 1))  # [powers, rates]
    line = np.zeros((3, y.shape[1]))
    line[: len(powers)] = fit @ y
    ends = x[[0, -1]] - middle
    turn = -line[1] / np.where(line[2] > 0, 2 * line[2], 1.0)
    turn = np.where(line[2] > 0, np.clip(turn, *ends), ends[0])
    tried = np.stack([np.full_like(turn, ends[0]), np.full_like(turn, ends[1]), turn])
    height = line[0] + (line[1] + line[2] * tried) * tried
    at = tried[height.argmin(0), np.arange(y.shape[1])]
    return at + middle, np.stack([at**k for k in powers], 1) @ fit


def _nearest(rates: np.ndarray, at: np.ndarray) -> np.ndarray:
    return rates[np.abs(rates[:, None] - at).argmin(0)]


def values_at_stable(
    table: pd.DataFrame, curve: LrCurve, read: Callable[[pd.Series], dict[Any, float]]
) -> AtBest[dict[Any, float]]:
    """Return by seed what `read` finds in the runs at the tried rate next to the best stable one.

    And at the rates that bootstrap samples find best. Runs that collapsed are left out, and seeds
    of which nothing is found.
    """
    best = stable(curve)
    if best is None:
        return AtBest({})
    runs = runs_of(table[(table["status"] == "done") & ~collapsed(table)], curve)

    def at(rate: float) -> dict[int, dict[Any, float]]:
        near = runs[(np.log(runs["lr"].astype(float)) - rate).abs() < SAME]
        found = {int(run["seed"]): read(run) for _, run in near.iterrows()}
        return {s: values for s, values in found.items() if values}

    by_rate = {rate: at(rate) for rate in {best.rate, *best.likely.tolist()}}
    return AtBest(by_rate[best.rate], tuple(by_rate[rate] for rate in best.likely.tolist()))


def collapsed_at_best(curve: LrCurve) -> tuple[int, int]:
    """Count the runs that collapsed at the best stable rate, and all runs there."""
    best = stable(curve)
    here = np.abs(curve.x - best.rate) < SAME if best else np.zeros(len(curve.x), bool)
    return int(curve.broke_down[here].sum()), int(here.sum())


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
