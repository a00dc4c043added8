"""Values of runs at each curve's best rate, which lies between tried ones and has an interval.

Values are interpolated to the best rate, and to others that are as likely to be the best. A loss
after few updates, or how far weights moved, differs much between rates: an interval over seeds at
one rate alone would be too narrow.
"""

import math
from collections.abc import Callable, Mapping, Sequence
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
"""Equally likely best rates that values are read at; with fewer, the draws of two curves are
correlated by chance."""
UNREAD = 0.05
"""Share of them that may have no value (only a bound, or no run near); with more there is no
interval."""
NEAR = math.log(1.5)
"""A run within this of the best rate may stand for it where no other lies on its other side."""
REACH = math.log(4.1)
"""A tried rate further than a factor 4 from the best one does not count."""


@dataclass(frozen=True)
class AtBest(Generic[T]):
    """A value by seed at a curve's best rate, and at LIKELY rates that are as likely to be best."""

    best: dict[int, T]
    likely: tuple[dict[int, T], ...] = ()

    def map(self, f: Callable[[T], U]) -> "AtBest[U]":
        """Apply f to every seed's value."""
        return AtBest(
            {s: f(v) for s, v in self.best.items()},
            tuple({s: f(v) for s, v in w.items()} for w in self.likely),
        )

    def paired(self, other: "AtBest[U]", f: Callable[[T, U], V]) -> "AtBest[V]":
        """Apply f to the values of seeds that both have; rates of two curves are independent."""

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
    """Return the mean over seeds, with an interval for the spread of the seeds and the error of the
    best rates together; no interval where more than UNREAD of the likely rates have no value."""
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
    """Return LIKELY equally likely best rates of a curve, in the random order of its place `which`;
    none where there is no interval."""
    if o.best_lr.value is None or o.best_lr.draws is None:
        return []
    rates = np.quantile(o.best_lr.draws, (np.arange(LIKELY) + 0.5) / LIKELY)
    return [float(v) for v in np.random.default_rng([20251126, which]).permutation(rates)]


def values_at_best(
    table: pd.DataFrame, optima: Sequence[Optimum], read: Callable[[pd.Series], dict[Any, float]]
) -> list[AtBest[dict[Any, float]]]:
    """Return, for every curve, what `read` finds in its runs, at the curve's best rates.

    Taking the nearest tried rate would let the grid decide, so values are interpolated in ln(rate),
    by `weights`. `read` gives values by name, which interpolate well as they are (losses,
    logarithms of norms).
    """
    out = []
    finished = table[(table["status"] == "done") & (table["lr"] > 0)]
    for k, o in enumerate(optima):
        best = o.best_lr.value
        usable = {
            (int(s), round(float(x), 6)): float(y)
            for s, x, y, u in zip(o.curve.seed, o.curve.x, o.curve.y, o.curve.usable)
            if u
        }
        runs: dict[int, dict[float, dict[Any, float]]] = {}
        for _, row in runs_of(finished, o.curve).iterrows() if best is not None else ():
            where = (int(row["seed"]), round(math.log(row["lr"]), 6))
            if where in usable and (values := read(row)):
                runs.setdefault(where[0], {})[where[1]] = values
        heights = {
            x: float(np.mean([y for (_, v), y in usable.items() if v == x])) for _, x in usable
        }
        at = [
            _at(runs, math.log(lr), heights) if runs else {}
            for lr in ([best, *likely_rates(o, k)] if best else [])
        ]
        out.append(AtBest(at[0] if at else {}, tuple(at[1:])))
    return out


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
    """Return the weights by seed: of the rates that all seeds have, if those lie on both sides of
    the best one, so that seeds are treated equally; else of each seed's own. A seed without a rate
    on both sides, or NEAR, is left out."""
    common = set.intersection(*(set(by_rate) for by_rate in runs.values()))
    if common and min(common) <= at <= max(common):
        return dict.fromkeys(runs, weights(list(common), at, heights))
    own = {seed: weights(list(by_rate), at, heights) for seed, by_rate in runs.items()}
    return {seed: w for seed, w in own.items() if len(w) > 1 or abs(next(iter(w)) - at) <= NEAR}


def mixed(by_rate: dict[float, dict[Any, float]], share: dict[float, float]) -> dict[Any, float]:
    """Return values by name at the rate that these weights are of, from values by ln(rate)."""
    names = set.intersection(*(set(by_rate[x]) for x in share))
    return {
        n: sum(w * by_rate[x][n] for x, w in share.items())
        for n in by_rate[next(iter(share))]
        if n in names
    }


def weights(
    tried: Sequence[float], at: float, heights: Mapping[float, float]
) -> dict[float, float]:
    """Return the weight of each tried ln(rate) for a value at ln(rate) `at`, by Lagrange's formula.

    Of the two rates around it and of the next one, on the side where the loss (`heights`) is lower,
    away from a cliff; of the two alone where there is no third within REACH; the nearest alone
    where `at` is one, or lies outside of those tried.
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
