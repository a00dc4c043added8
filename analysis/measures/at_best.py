"""Values of runs at each curve's best rate, which usually lies between two tried rates.

Values are interpolated to the best rate, and to draws from its posterior ("likely rates"). A loss
after few updates, or the distance that weights moved, depends strongly on the rate: an interval
over seeds at one rate alone would be too narrow.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import pandas as pd

from analysis.inference.estimate import Estimate
from analysis.inference.seeds import PooledVariance, from_sample
from analysis.optimum.optimum import Optimum
from analysis.runs.lr_curves import runs_of

T = TypeVar("T")
U = TypeVar("U")
V = TypeVar("V")

LIKELY = 120
"""Number of draws of the best rate at which values are read. With fewer, the draws of two curves
would be correlated by chance."""
UNREAD = 0.05
"""Share of the likely rates that may lack a value (only a bound, or no run nearby). With more there
is no interval."""
NEAR = math.log(1.5)
"""A run this close to the best rate, in ln(lr), may represent it when there is no run on the other
side."""
REACH = math.log(4.1)
"""Tried rates further than a factor 4 from the best one are not used."""


@dataclass(frozen=True)
class AtBest(Generic[T]):
    """A value per seed at a curve's best rate, and at LIKELY draws of that rate."""

    best: dict[int, T]
    likely: tuple[dict[int, T], ...] = ()

    def map(self, f: Callable[[T], U]) -> "AtBest[U]":
        """Apply f to every seed's value."""
        return AtBest(
            {s: f(v) for s, v in self.best.items()},
            tuple({s: f(v) for s, v in w.items()} for w in self.likely),
        )

    def without(self, seeds: Collection[int | None]) -> "AtBest[T]":
        """Leave out seeds."""

        def rest(by_seed: dict[int, T]) -> dict[int, T]:
            return {s: v for s, v in by_seed.items() if s not in seeds}

        return AtBest(rest(self.best), tuple(map(rest, self.likely)))

    def paired(self, other: "AtBest[U]", f: Callable[[T, U], V]) -> "AtBest[V]":
        """Apply f to the values of the seeds that both have.

        The likely rates of the two curves are independent of each other.
        """

        def pair(a: dict[int, T], b: dict[int, U]) -> dict[int, V]:
            return {s: f(a[s], b[s]) for s in sorted(a.keys() & b.keys())}

        likely = (
            [*zip(self.likely, other.likely)]
            if self.likely and other.likely
            else [(a, other.best) for a in self.likely] or [(self.best, b) for b in other.likely]
        )
        return AtBest(pair(self.best, other.best), tuple(pair(a, b) for a, b in likely))


def over_seeds(
    values: AtBest[float], pooled: PooledVariance | None = None, flags: tuple[str, ...] = ()
) -> Estimate:
    """Average over seeds; the interval covers the seeds' spread and the best rates' error together.

    There is no interval if more than UNREAD of the likely rates have no value.
    """
    best = values.best
    moved = [[v[s] - best[s] for s in v.keys() & best.keys()] for v in values.likely]
    shifts = [float(np.mean(m)) for m in moved if m and np.isfinite(m).all()]
    sample = [best[s] for s in sorted(best)]
    if sample and len(shifts) < (1 - UNREAD) * len(values.likely):
        return Estimate(
            float(np.mean(sample)), n=len(sample), flags=(*flags, "unread_at_likely_rates")
        )
    return from_sample(sample, pooled=pooled, shifts=shifts, flags=flags)


def likely_rates(o: Optimum, which: int) -> list[float]:
    """Draw LIKELY equally likely best rates of a curve; none if it has no interval.

    Args:
        which: index of the curve, which seeds the random order.
    """
    if o.best_lr.value is None or o.best_lr.draws is None:
        return []
    rates = np.quantile(o.best_lr.draws, (np.arange(LIKELY) + 0.5) / LIKELY)
    return [float(v) for v in np.random.default_rng([20251126, which]).permutation(rates)]


def values_at_best(
    table: pd.DataFrame, optima: Sequence[Optimum], read: Callable[[pd.Series], dict[Any, float]]
) -> list[AtBest[dict[Any, float]]]:
    """Interpolate values of runs to each curve's best rate and likely rates.

    The nearest tried rate would make the answer depend on the grid, so values are interpolated in
    ln(rate), by `weights`.

    Args:
        read: a run's values by name, on a scale on which they interpolate well (losses, logarithms
            of norms); empty if it has none.
    """
    return [_read(o, k, _values_of(table, o, read)) for k, o in enumerate(optima)]


def _values_of(
    table: pd.DataFrame, o: Optimum, read: Callable[[pd.Series], dict[Any, float]]
) -> dict[int, dict[float, dict[Any, float]]]:
    """Return what `read` finds in a curve's usable runs, by seed and ln(rate)."""
    finished = table[(table["status"] == "done") & (table["lr"] > 0)]
    usable = _losses(o)
    runs: dict[int, dict[float, dict[Any, float]]] = {}
    for _, row in runs_of(finished, o.curve).iterrows() if o.best_lr.value is not None else ():
        seed, x = int(row["seed"]), round(math.log(row["lr"]), 6)
        if x in usable.get(seed, ()) and (values := read(row)):
            runs.setdefault(seed, {})[x] = values
    return runs


def parts_at_best(
    table: pd.DataFrame, optima: Sequence[Optimum], read: Callable[[pd.Series], dict[Any, float]]
) -> list[AtBest[dict[Any, float]]]:
    """Return the parts of each curve's losses by seed, in nats, at its best and likely rates.

    Like the losses themselves, a part is interpolated as its distance from the fitted valley, of
    which it has the share that fits its runs best. So the parts add up to the loss.

    Args:
        read: the parts of a run's loss, which add up to it; empty if they are not known.
    """
    return [_parts_of(o, k, _values_of(table, o, read)) for k, o in enumerate(optima)]


def _parts_of(
    o: Optimum, which: int, runs: dict[int, dict[float, dict[Any, float]]]
) -> AtBest[dict[Any, float]]:
    shape = o.shape
    if shape is None or o.best_lr.value is None or not runs:
        return AtBest({})
    share = _shares_of_height(runs)

    def moved(parts: dict[Any, float], height: float) -> dict[Any, float]:
        return {n: v + share[n] * height for n, v in parts.items()}

    off = {
        seed: {x: moved(v, -float(shape.height(np.array([x]))[0])) for x, v in by_rate.items()}
        for seed, by_rate in runs.items()
    }
    read = _read(o, which, off)
    heights = shape.height(np.log([o.best_lr.value, *likely_rates(o, which)]))
    best, *likely = (
        {s: moved(v, float(height)) for s, v in by_seed.items()}
        for by_seed, height in zip([read.best, *read.likely], heights)
    )
    return AtBest(best, tuple(likely))


def _shares_of_height(runs: dict[int, dict[float, dict[Any, float]]]) -> dict[Any, float]:
    """Return how much each part rises where the loss rises by 1, over the rates of a seed.

    By least squares, so the shares add up to 1.
    """
    names = list(next(iter(next(iter(runs.values())).values())))
    deviations = []
    for by_rate in runs.values():
        parts = np.array([[v[n] for n in names] for v in by_rate.values()])
        deviations.append(parts - parts.mean(0))
    rise = np.concatenate(deviations)
    total = rise.sum(1)
    if not total @ total > 0:
        return dict.fromkeys(names, 1 / len(names))
    return dict(zip(names, (total @ rise / (total @ total)).tolist()))


def losses_at_best(optima: Sequence[Optimum]) -> list[AtBest[float]]:
    """Return each curve's losses by seed, in nats, at its best rate and likely rates.

    What is interpolated is the distance of each run from the fitted valley: three rates a factor 2
    apart, interpolated by themselves, miss a valley's bottom by up to 2e-3 nats, the same way for
    all seeds.
    """
    return [_losses_of(o, k) for k, o in enumerate(optima)]


def _losses_of(o: Optimum, which: int) -> AtBest[float]:
    shape = o.shape
    if shape is None or o.best_lr.value is None:
        return AtBest({})
    runs = {
        seed: {x: {"off": y - float(shape.height(np.array([x]))[0])} for x, y in losses.items()}
        for seed, losses in _losses(o).items()
    }
    off = _read(o, which, runs)
    heights = shape.height(np.log([o.best_lr.value, *likely_rates(o, which)]))
    best, *likely = (
        {s: v["off"] + float(height) for s, v in by_seed.items()}
        for by_seed, height in zip([off.best, *off.likely], heights)
    )
    return AtBest(best, tuple(likely))


def _losses(o: Optimum) -> dict[int, dict[float, float]]:
    """Return the losses of a curve's usable runs by seed and ln(rate)."""
    out: dict[int, dict[float, float]] = {}
    for s, x, y, u in zip(o.curve.seed, o.curve.x, o.curve.y, o.curve.usable):
        if u:
            out.setdefault(int(s), {})[round(float(x), 6)] = float(y)
    return out


def _read(
    o: Optimum, which: int, runs: dict[int, dict[float, dict[Any, float]]]
) -> AtBest[dict[Any, float]]:
    """Interpolate runs' values to a curve's best rate and likely rates.

    Args:
        which: index of the curve, as for `likely_rates`.
        runs: values by seed, ln(rate) and name.
    """
    best = o.best_lr.value
    if best is None or not runs:
        return AtBest({})
    by_rate: dict[float, list[float]] = {}
    for of_seed in _losses(o).values():
        for x, y in of_seed.items():
            by_rate.setdefault(x, []).append(y)
    heights = {x: float(np.mean(ys)) for x, ys in by_rate.items()}
    at = [_at(runs, math.log(lr), heights) for lr in [best, *likely_rates(o, which)]]
    return AtBest(at[0], tuple(at[1:]))


def _at(
    runs: dict[int, dict[float, dict[Any, float]]], at: float, heights: Mapping[float, float]
) -> dict[int, dict[Any, float]]:
    """Interpolate to ln(rate) `at`, by seed."""
    return {
        seed: mixed(runs[seed], share) for seed, share in _shares_by_seed(runs, at, heights).items()
    }


def _shares_by_seed(
    runs: dict[int, dict[float, Any]], at: float, heights: Mapping[float, float]
) -> dict[int, dict[float, float]]:
    """Return the interpolation weights of the rates, by seed.

    If the rates that all seeds have lie on both sides of the best one, only those are used, so that
    all seeds are treated equally; else each seed uses its own rates. A seed is left out if it has
    neither rates on both sides nor one within NEAR.
    """
    common = set.intersection(*(set(by_rate) for by_rate in runs.values()))
    if common and min(common) <= at <= max(common):
        return dict.fromkeys(runs, weights(list(common), at, heights))
    own = {seed: weights(list(by_rate), at, heights) for seed, by_rate in runs.items()}
    return {seed: w for seed, w in own.items() if len(w) > 1 or abs(next(iter(w)) - at) <= NEAR}


def mixed(by_rate: dict[float, dict[Any, float]], share: dict[float, float]) -> dict[Any, float]:
    """Average values by name with the weights that `weights` gave.

    Args:
        by_rate: ln(rate) -> name -> value.
        share: ln(rate) -> weight.
    """
    names = set.intersection(*(set(by_rate[x]) for x in share))
    return {
        n: sum(w * by_rate[x][n] for x, w in share.items())
        for n in by_rate[next(iter(share))]
        if n in names
    }


def weights(
    tried: Sequence[float], at: float, heights: Mapping[float, float]
) -> dict[float, float]:
    """Return the weights of tried rates for a value at ln(rate) `at`: Lagrange interpolation.

    Uses the two rates around `at` and a third, the next one on the side where the loss (`heights`)
    is lower, away from divergence. Without a third within REACH, uses the two alone; if `at` is a
    tried rate or lies outside them, the nearest alone.

    Args:
        tried: ln(rate) of the runs.
        heights: ln(rate) -> loss.
    """
    below, above = (
        sorted((x for x in tried if x <= at), reverse=True),
        sorted(x for x in tried if x > at),
    )
    nearest = min(tried, key=lambda x: abs(x - at))
    if not below or not above or abs(nearest - at) < 1e-6:
        return {nearest: 1.0}
    third = [x for x in (*below[1:2], *above[1:2]) if abs(x - at) < REACH]
    nodes = [below[0], above[0], *([min(third, key=lambda x: heights[x])] if third else [])]
    return {x: math.prod((at - y) / (x - y) for y in nodes if y != x) for x in nodes}
