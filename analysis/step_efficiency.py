"""rho, step efficiency: full fine-tuning's steps to a loss that both reach, over LoRA's; each at its own best rate, which
lies between tried ones: what runs say is interpolated to it.

A gap in nats grows and shrinks with the place on the learning curve, rho does not: 0.9 means that LoRA needs 11% more
steps. Reads learning curves from a table of runs; fits no rate.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.lr_optimum import Optimum
from analysis.results import Estimate, exp_of, from_sample

Points = list[tuple[float, float]]


def steps_to_reach(points: Points, loss: float) -> float | None:
    """Return the step at which a held-out curve [(step, loss), ...] first reaches a loss, interpolated in ln(step);
    None if it never does."""
    before: tuple[float, float] | None = None
    for step, value in points:
        if value <= loss:
            if before is None or before[1] <= value:
                return step
            share = (before[1] - loss) / (before[1] - value)
            return math.exp(math.log(before[0]) + share * (math.log(step) - math.log(before[0])))
        before = (step, value)
    return None


def _reach(one: Points, other: Points) -> tuple[float, int]:
    """Return ln of the other's steps over the one's to the lowest loss that both reach, and what that is: 0 a value, -1 an
    upper bound (the other is there at its first evaluation), 1 a lower bound (the one is)."""
    loss = max(one[-1][1], other[-1][1])
    mine, theirs = steps_to_reach(one, loss), steps_to_reach(other, loss)
    assert mine is not None and theirs is not None  # both end at or below it
    bound = -1 if other[0][1] <= loss else 1 if one[0][1] <= loss else 0
    return math.log(theirs / mine), bound


def _reached(one: dict[int, Points], other: dict[int, Points]) -> dict[int, tuple[float, int]]:
    return {s: _reach(one[s], other[s]) for s in sorted(one.keys() & other.keys()) if one[s] and other[s]}


def per_seed(one: dict[int, Points], other: dict[int, Points]) -> dict[int, float]:
    """Return ln(rho) of one curve against another by seed; +-infinity where only a bound is known."""
    return {s: v if not bound else bound * math.inf for s, (v, bound) in _reached(one, other).items()}


def rho(lora: dict[int, Points], full: dict[int, Points]) -> Estimate:
    """Return rho from held-out curves by seed (step 0 and the last evaluation left out), paired by seed.

    Steps are counted to the lowest loss that both reach: LoRA's last one, or full fine-tuning's where that ends higher.
    Interval: Student's, over ln rho of the seeds; needs two or more. Where either is there at its first evaluation in any
    seed, only a bound is given.
    """
    found = _reached(lora, full)
    values = [math.exp(v) for v, _ in found.values()]
    bounds = {bound for _, bound in found.values()} - {0}
    if bounds:
        low, high = (min(values) if bounds == {1} else None), (max(values) if bounds == {-1} else None)
        return Estimate(None, low, high, len(found), ("one is there at its first evaluation",))
    return exp_of(from_sample([math.log(v) for v in values])) if values else Estimate(None)


def of_curves(table: pd.DataFrame, optima: Sequence[Optimum]) -> list[Estimate | None]:
    """Return rho of every curve against the full fine-tuning one of its group, in order; None for that one itself."""
    curves = at_best(table, optima)
    out: list[Estimate | None] = []
    for o, mine in zip(optima, curves):
        full = [k for k, f in enumerate(optima) if f.curve.group == o.curve.group and f.curve.key["method"] == "fullft"]
        compared = o.curve.key["method"] != "fullft" and len(full) == 1
        out.append(rho(mine, curves[full[0]]) if compared else None)
    return out


def at_best(
    table: pd.DataFrame, optima: Sequence[Optimum], rates: Sequence[float | None] | None = None
) -> list[dict[int, Points]]:
    """Return, for every curve, its held-out learning curves by seed at its best rate (or at `rates`); step 0 and the last
    evaluation, which uses more rows, left out."""
    found = values_at_best(table, optima, lambda row: dict(before_last(_curve_of(row))), rates)
    return [{seed: sorted(v.items()) for seed, v in mine.items()} for mine in found]


NEAR = math.log(1.5)
"""A run within this of the best rate may stand for it where no other lies on its other side."""
REACH = math.log(4.1)
"""A tried rate further than a factor 4 from the best one says nothing about it."""


def values_at_best(
    table: pd.DataFrame, optima: Sequence[Optimum], read: Callable[[pd.Series], dict[Any, float]],
    rates: Sequence[float | None] | None = None,
) -> list[dict[int, dict[Any, float]]]:  # fmt: skip
    """Return, for every curve and seed, what `read` finds in its runs, at the curve's fitted best rate.

    The best rate lies between tried ones, and what a run is after few updates, or how far it moved, differs much between
    them: taking the nearest one would let the grid decide. So values are interpolated in ln(rate), by `weights`. `read`
    gives values by name, which interpolate well as they are (losses, logarithms of norms). `rates`: where to read instead,
    one a curve; None: at its best.
    """
    out = []
    finished = table[table["status"] == "done"]
    for k, o in enumerate(optima):
        at = o.best_lr.value if rates is None or rates[k] is None else rates[k]
        usable = {(int(s), round(float(x), 6)): float(y)
                  for s, x, y, u in zip(o.curve.seed, o.curve.x, o.curve.y, o.curve.usable) if u}  # fmt: skip
        runs: dict[int, dict[float, dict[Any, float]]] = {}
        for _, row in finished[finished["lr"] > 0].iterrows() if at is not None else ():
            where = (int(row["seed"]), round(math.log(row["lr"]), 6))
            if where in usable and same(row, o) and (values := read(row)):
                runs.setdefault(where[0], {})[where[1]] = values
        heights = {x: float(np.mean([y for (_, v), y in usable.items() if v == x])) for _, x in usable}
        shares = _shares_by_seed(runs, math.log(at), heights) if runs else {}
        out.append({seed: _mixed(runs[seed], share) for seed, share in shares.items()})
    return out


def _shares_by_seed(
    runs: dict[int, dict[float, Any]], at: float, heights: Mapping[float, float]
) -> dict[int, dict[float, float]]:  # fmt: skip
    """Return the weights by seed: of the rates that all seeds have, if those lie on both sides of the best one, so that seeds
    are alike; else of each seed's own. A seed without a rate on both sides, or NEAR, is left out."""
    common = set.intersection(*(set(by_rate) for by_rate in runs.values()))
    if common and min(common) <= at <= max(common):
        return dict.fromkeys(runs, weights(list(common), at, heights))
    own = {seed: weights(list(by_rate), at, heights) for seed, by_rate in runs.items()}
    return {seed: w for seed, w in own.items() if len(w) > 1 or abs(next(iter(w)) - at) <= NEAR}


def _mixed(by_rate: dict[float, dict[Any, float]], share: dict[float, float]) -> dict[Any, float]:
    names = set.intersection(*(set(by_rate[x]) for x in share))
    return {n: sum(w * by_rate[x][n] for x, w in share.items()) for n in by_rate[next(iter(share))] if n in names}


def weights(tried: Sequence[float], at: float, heights: Mapping[float, float]) -> dict[float, float]:
    """Return how much each tried ln(rate) counts for a value at ln(rate) `at`: Lagrange's weights.

    Of the two rates around it and of the next one, on the side where the loss (`heights`) is lower, away from a cliff; of the
    two alone where there is no third within REACH; the nearest alone where `at` is one, or lies outside of those tried.
    """
    below, above = sorted((x for x in tried if x <= at), reverse=True), sorted(x for x in tried if x > at)
    nearest = min(tried, key=lambda x: abs(x - at))
    if not below or not above or abs(nearest - at) < 1e-6:
        return {nearest: 1.0}
    third = [x for x in (*below[1:2], *above[1:2]) if abs(x - at) < REACH]
    nodes = [below[0], above[0], *([min(third, key=lambda x: heights[x])] if third else [])]
    return {x: math.prod((at - y) / (x - y) for y in nodes if y != x) for x in nodes}


def _curve_of(row: pd.Series) -> pd.DataFrame:
    """Return a run's held-out curve with columns step and test_nll; empty if the run carries none."""
    curve = json.loads(row["result"]).get("curve") if isinstance(row.get("result"), str) else None
    return pd.DataFrame(curve or [], columns=None if curve else ["step", "test_nll"])


def before_last(points: pd.DataFrame) -> Points:
    """Return the evaluations on the same held-out rows: from step 1 to the last but one."""
    kept = points[(points["step"] >= 1) & points["test_nll"].notna()].iloc[:-1]
    return list(zip(kept["step"].astype(float), kept["test_nll"].astype(float)))


def same(row: pd.Series, o: Optimum) -> bool:
    """Say whether a run belongs to a curve."""
    return all(row.get(k) == v or (pd.isna(v) and pd.isna(row.get(k))) for k, v in o.curve.key.items() if k in row.index)
