"""Read metrics of runs at each curve's optimal learning rate, or at a prescribed learning rate.

Metrics are interpolated to the optimum and to draws from its posterior. An interval over seeds at a
single learning rate would be too narrow for a metric that depends strongly on it.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import pandas as pd

from analysis.inference.decide import MIN_SEEDS, Gate, GateCode
from analysis.inference.estimate import AT_LEAST, Estimate, Part, from_sample, pooled_variance
from analysis.optimum.fit import Optimum
from analysis.runs.curves import runs_of

T = TypeVar("T")
U = TypeVar("U")
V = TypeVar("V")
K = TypeVar("K")

N_LR_DRAWS = 480
"""Number of posterior draws of the optimum at which metrics are read. With fewer, the draws of two
curves would be correlated by chance."""
UNREAD = 0.05
"""Largest share of the posterior draws that may lack a value. If more do, there is no interval."""
NEAR = math.log(1.5)
"""Largest distance in ln(lr) between the optimum and a single run that stands for it, if all tried
LRs lie on one side of the optimum."""
REACH = math.log(4.1)
"""Largest distance in ln(lr) from the optimum of the third learning rate that `weights` uses."""
Values = dict[Any, float]
"""Metrics of one run by name."""
ByLr = dict[int, dict[float, Values]]
"""Metrics of runs: seed -> ln(lr) -> metrics."""


@dataclass(frozen=True)
class AtBest(Generic[T]):
    """Values by seed at a curve's optimal LR (`best`), and at each posterior draw of that LR."""

    best: dict[int, T]
    draws: tuple[dict[int, T], ...] = ()

    def each(self, f: Callable[[dict[int, T]], dict[int, U]]) -> "AtBest[U]":
        """Apply f to the values by seed, at the optimum and at every draw."""
        return AtBest(f(self.best), tuple(map(f, self.draws)))

    def map(self, f: Callable[[T], U]) -> "AtBest[U]":
        """Apply f to every seed's value."""
        return self.each(lambda by_seed: {s: f(v) for s, v in by_seed.items()})

    def paired(self, other: "AtBest[U]", f: Callable[[T, U], V]) -> "AtBest[V]":
        """Apply f to the two values of each seed that both curves have.

        The k-th draws of both are paired, since the draws of two curves are independent. A curve
        without draws takes part with its values at the optimum.
        """
        n = max(len(self.draws), len(other.draws))
        mine, its = self.draws or (self.best,) * n, other.draws or (other.best,) * n
        best, *rest = (
            {s: f(a[s], b[s]) for s in sorted(a.keys() & b.keys())}
            for a, b in [(self.best, other.best), *zip(mine, its)]
        )
        return AtBest(best, tuple(rest))

    def minus(self: "AtBest[float]", other: "AtBest[float]") -> "AtBest[float]":
        """Subtract the values of another curve, seed by seed."""
        return self.paired(other, lambda a, b: a - b)


def over_seeds(
    values: AtBest[float], pooled: Part | None = None, flags: tuple[str, ...] = ()
) -> Estimate:
    """Average over seeds; the interval covers the spread over seeds and the error of the optimum.

    There is no interval if more than a share UNREAD of the draws have no value.
    """
    best = values.best
    moved = [[v[s] - best[s] for s in v.keys() & best.keys()] for v in values.draws]
    shifts = [float(np.mean(m)) for m in moved if m and np.isfinite(m).all()]
    sample = [best[s] for s in sorted(best)]
    if sample and len(shifts) < (1 - UNREAD) * len(values.draws):
        flags = (*flags, "unread_at_likely_rates")
        return Estimate(float(np.mean(sample)), n=len(sample), flags=flags)
    return from_sample(sample, pooled=pooled, shifts=shifts, flags=flags)


def pooled_over(values: Iterable[AtBest[float]]) -> Part | None:
    """Pool the variances over seeds of one metric that was measured on several curves."""
    return pooled_variance([list(v.best.values()) for v in values])


def mean_of(values: AtBest[float]) -> float:
    """Return the mean over seeds at the optimum; NaN without seeds."""
    return float(np.mean(list(values.best.values()))) if values.best else math.nan


def is_finite(values: AtBest[float]) -> bool:
    """Return whether there are seeds, and each has a finite value."""
    return bool(values.best) and all(map(math.isfinite, values.best.values()))


def best_and_draws(o: Optimum) -> list[float]:
    """Return the optimal learning rate, then N_LR_DRAWS equally likely posterior draws of it.

    Without a posterior the list has one value; without an optimum it is empty.
    """
    if o.best_lr.value is None or o.best_lr.draws is None:
        return [] if o.best_lr.value is None else [o.best_lr.value]
    lrs = np.quantile(o.best_lr.draws, (np.arange(N_LR_DRAWS) + 0.5) / N_LR_DRAWS)
    return [o.best_lr.value, *o.curve.stream("losses").permutation(lrs).tolist()]


def values_at_best(
    table: pd.DataFrame,
    optima: Sequence[Optimum],
    read: Callable[[pd.Series], Values],
    parts: bool = False,
) -> list[AtBest[Values]]:
    """Interpolate metrics of runs to each curve's optimal learning rate and to its draws, by seed.

    `read`: returns the metrics of a run by name; empty if the run has none. Their scale must suit
    interpolation by `weights`: losses, or logarithms of norms. `parts`: they are parts of the loss,
    in nats. Each takes a share of the fitted LR curve's height; the shares are fitted and add
    up to 1. A part's distance from its share is interpolated, so the parts add up to the loss.
    """
    finished, found = table[(table["status"] == "done") & (table["lr"] > 0)], []
    for o in optima:
        usable = _losses(o)
        runs: ByLr = {}
        for _, row in runs_of(finished, o.curve).iterrows() if o.best_lr.value is not None else ():
            seed, x = int(row["seed"]), round(math.log(row["lr"]), 6)
            if x in usable.get(seed, ()) and (values := read(row)):
                runs.setdefault(seed, {})[x] = values
        found.append((_parts if parts else _interpolated)(o, runs))
    return found


def losses_at_best(optima: Sequence[Optimum]) -> list[AtBest[float]]:
    """Return each curve's losses by seed, in nats, at its optimal learning rate and its draws.

    Each run's distance from the fitted LR curve is interpolated. Plain losses at three learning
    rates a factor 2 apart would miss the minimum of the curve by up to 2e-3 nats, in all seeds.
    """
    found = []
    for o in optima:
        runs = {s: {x: {"": y} for x, y in v.items()} for s, v in _losses(o).items()}
        found.append(_parts(o, runs).map(lambda v: v[""]))
    return found


def _parts(o: Optimum, runs: ByLr) -> AtBest[Values]:
    """Interpolate each part's distance from its share of the fitted LR curve's height."""
    shape = o.shape
    if shape is None or o.best_lr.value is None or not runs:
        return AtBest({})
    # A part's share is its slope over the loss, by least squares over the LRs of each seed.
    names = list(next(iter(next(iter(runs.values())).values())))
    seeds = [np.array([[v[n] for n in names] for v in lrs.values()]) for lrs in runs.values()]
    rise = np.concatenate([parts - parts.mean(0) for parts in seeds])
    total = rise.sum(1)
    share = dict.fromkeys(names, 1 / len(names))
    if total @ total > 0:
        share = dict(zip(names, (total @ rise / (total @ total)).tolist()))

    def moved(values: Values, height: float) -> Values:
        return {n: v + share[n] * height for n, v in values.items()}

    off = {
        seed: {x: moved(v, -float(shape.height(np.array([x]))[0])) for x, v in by_lr.items()}
        for seed, by_lr in runs.items()
    }
    read = _interpolated(o, off)
    heights = shape.height(np.log(best_and_draws(o))).tolist()
    best, *draws = (
        {s: moved(v, height) for s, v in by_seed.items()}
        for by_seed, height in zip([read.best, *read.draws], heights)
    )
    return AtBest(best, tuple(draws))


def _losses(o: Optimum) -> dict[int, dict[float, float]]:
    """Return the losses of a curve's usable runs by seed and ln(lr)."""
    out: dict[int, dict[float, float]] = {}
    for s, x, y, u in zip(o.curve.seed, o.curve.x, o.curve.y, o.curve.usable):
        if u:
            out.setdefault(int(s), {})[round(float(x), 6)] = float(y)
    return out


def _interpolated(o: Optimum, runs: ByLr) -> AtBest[Values]:
    if o.best_lr.value is None or not runs:
        return AtBest({})
    heights = pd.DataFrame(_losses(o)).mean(axis=1).to_dict()
    common = set.intersection(*(set(lrs) for lrs in runs.values()))

    def at(x: float) -> dict[int, Values]:
        # If LRs that all seeds have lie on both sides of x, only these are used, so that all seeds
        # are treated equally. Otherwise each seed uses all of its LRs.
        if common and min(common) <= x <= max(common):
            share = weights(list(common), x, heights)
            return {s: mixed(lrs, share) for s, lrs in runs.items()}
        own = {s: weights(list(lrs), x, heights) for s, lrs in runs.items()}
        # A seed is left out if it has neither LRs on both sides of x nor an LR within NEAR of x.
        near = {s: w for s, w in own.items() if len(w) > 1 or abs(next(iter(w)) - x) <= NEAR}
        return {s: mixed(runs[s], w) for s, w in near.items()}

    best, *draws = (at(math.log(lr)) for lr in best_and_draws(o))
    return AtBest(best, tuple(draws))


def mixed(by_lr: Mapping[float, Values], share: Mapping[float, float]) -> Values:
    """Average metrics over learning rates. Both arguments have ln(lr) as keys; see `weights`."""
    names = [n for n in by_lr[next(iter(share))] if all(n in by_lr[x] for x in share)]
    return {n: sum(w * by_lr[x][n] for x, w in share.items()) for n in names}


def weights(
    tried: Sequence[float], at: float, heights: Mapping[float, float]
) -> dict[float, float]:
    """Return Lagrange weights of tried ln(lr), to interpolate a value to ln(lr) `at`.

    Up to three LRs have weights: the two around `at` and, within REACH, the next one on the side of
    the lower loss (`heights`, by ln(lr)), away from divergence. If `at` was tried, or lies outside
    the tried LRs, only the nearest LR has a weight.
    """
    below = sorted((x for x in tried if x <= at), reverse=True)
    above = sorted(x for x in tried if x > at)
    nearest = min(tried, key=lambda x: abs(x - at))
    if not below or not above or abs(nearest - at) < 1e-6:
        return {nearest: 1.0}
    third = [x for x in (*below[1:2], *above[1:2]) if abs(x - at) < REACH]
    nodes = [below[0], above[0], *([min(third, key=lambda x: heights[x])] if third else [])]
    return {x: math.prod((at - y) / (x - y) for y in nodes if y != x) for x in nodes}


@dataclass(frozen=True)
class Cost:
    """The cost over seeds (`estimate`) of a prescribed learning rate on a curve, such as a regret.

    Only a lower bound if an LR next to the prescribed one diverged.
    """

    optimum: Optimum | None
    """None: the curve is missing."""
    lrs: Sequence[float]
    """The prescribed learning rate, then its posterior draws if it was estimated."""
    read_at: list[float]
    """The tried LRs from which the loss at the prescribed learning rate was interpolated."""
    near_diverged: list[bool]
    """For each of `lrs`: whether an LR next to it diverged, so that the loss may be higher."""
    estimate: Estimate

    def gates(self, highest: float) -> list[Gate]:
        """List the gates of a claim about the cost; `highest` is the upper end of its margin."""
        cost = self.estimate
        gates = [] if cost.n else [Gate(GateCode.RECIPE_OUTSIDE)]
        if self.optimum is None:
            gates = [Gate(GateCode.MISSING, "the recipe")]
        if 0 < cost.n < MIN_SEEDS:
            gates.append(Gate(GateCode.FEW_SEEDS_AT_RECIPE, cost.n))
        if any(self.near_diverged) and cost.low is not None and cost.low <= highest:
            gates.append(Gate(GateCode.RECIPE_BY_A_CLIFF, flags=("bounded_by_divergence",)))
        return gates


def costs_at(
    arms: Mapping[K, tuple[Optimum | None, Sequence[float]]],
    cost: Callable[[K, AtBest[float]], AtBest[float]],
) -> dict[K, Cost]:
    """Return each curve's cost at its prescribed LR; the variance over seeds is pooled over curves.

    `arms`: name -> (curve, `Cost.lrs`). `cost`: returns the cost by seed, given a name and the
    losses at the LR.
    """
    read = {name: _losses_at(o, lrs) for name, (o, lrs) in arms.items()}
    costs = {name: cost(name, losses) for name, (losses, _, _) in read.items()}
    pooled, found = pooled_over(costs.values()), {}
    for name, (_, read_at, near) in read.items():
        e = over_seeds(costs[name], pooled, (AT_LEAST,) if near[:1] == [True] else ())
        found[name] = Cost(*arms[name], read_at, near, e)
    return found


def _losses_at(
    o: Optimum | None, lrs: Sequence[float]
) -> tuple[AtBest[float], list[float], list[bool]]:
    """Return a curve's losses at `lrs`, and the fields `read_at` and `near_diverged` of `Cost`."""
    if o is None or not lrs:
        return AtBest({}), [], []
    c, near = o.curve, []
    found: list[dict[int, float]] = []
    read_at: set[float] = set()
    heights = {x: float(np.mean(c.y[c.usable & (c.x == x)])) for x in c.x[c.usable]}
    # A diverged run has the loss of the base model, which its user would keep.
    kept = np.where(c.usable | (c.y < c.nll_start), c.y, c.nll_start).tolist()
    for at in map(math.log, lrs):
        losses: dict[int, float] = {}
        near.append(False)
        for seed in sorted(set(c.seed)):
            rows = np.flatnonzero(c.seed == seed)
            loss, usable = ({c.x[k]: v[k] for k in rows} for v in (kept, c.usable))
            shares = weights(list(loss), at, {x: heights.get(x, math.inf) for x in loss})
            broken = not all(usable[x] for x in shares)
            if len(shares) == 1 or broken:  # tried, outside those tried, or next to a diverged LR
                nearest = min(loss, key=lambda x: abs(x - at))
                if abs(nearest - at) > NEAR:
                    continue
                shares, near[-1] = {nearest: 1.0}, near[-1] or bool(broken and usable[nearest])
            losses[int(seed)] = sum(w * loss[x] for x, w in shares.items())
            if not found:
                read_at |= {math.exp(x) for x in shares}
        found.append(losses)
    return AtBest(found[0], tuple(found[1:])), sorted(read_at), near
