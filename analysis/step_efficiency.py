"""rho, step efficiency: full fine-tuning's steps to a loss that both reach, over LoRA's; each at its own best rate.

A gap in nats grows and shrinks with the place on the learning curve, rho does not: 0.9 means that LoRA needs 11% more
steps. Reads learning curves from a table of runs; fits no rate.
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from analysis.lr_optimum import Optimum
from analysis.results import Estimate, exp_of, from_sample
from analysis.table import learning_curves

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
    """Return rho of every curve against the full fine-tuning one of its group, in order; None for that one itself.

    Each arm's runs are those at the tried rate nearest its optimum. Evaluations before the last one use the same held-out
    rows in all runs, the last one uses more: it is left out.
    """
    curves = at_best(table, optima)
    out: list[Estimate | None] = []
    for o, mine in zip(optima, curves):
        full = [k for k, f in enumerate(optima) if f.curve.group == o.curve.group and f.curve.key["method"] == "fullft"]
        compared = o.curve.key["method"] != "fullft" and len(full) == 1
        out.append(rho(mine, curves[full[0]]) if compared else None)
    return out


def at_best(table: pd.DataFrame, optima: Sequence[Optimum]) -> list[dict[int, Points]]:
    """Return, for every curve, the held-out curves by seed of its runs at the tried rate nearest its optimum; step 0 and the
    last evaluation, which uses more rows, left out."""
    best = [_near(o) for o in optima]
    found: list[dict[int, Points]] = [{} for _ in optima]
    for row, points in learning_curves(table):
        for o, at, mine in zip(optima, best, found):
            if at is not None and abs(math.log(row["lr"]) - at) < 1e-6 and same(row, o):
                mine[int(row["seed"])] = before_last(points)
    return found


def runs_at_best(table: pd.DataFrame, optima: Sequence[Optimum]) -> list[list[pd.Series]]:
    """Return, for every curve, its finished runs at the tried rate nearest its optimum."""
    best = [_near(o) for o in optima]
    found: list[list[pd.Series]] = [[] for _ in optima]
    for _, row in table[table["status"] == "done"].iterrows():
        for o, at, mine in zip(optima, best, found):
            if at is not None and abs(math.log(row["lr"]) - at) < 1e-6 and same(row, o):
                mine.append(row)
    return found


def before_last(points: pd.DataFrame) -> Points:
    """Return the evaluations on the same held-out rows: from step 1 to the last but one."""
    kept = points[(points["step"] >= 1) & points["test_nll"].notna()].iloc[:-1]
    return list(zip(kept["step"].astype(float), kept["test_nll"].astype(float)))


def _near(o: Optimum) -> float | None:
    x = o.curve.x[o.curve.usable]
    if o.best_lr.value is None or not len(x):
        return None
    return float(x[np.argmin(np.abs(x - math.log(o.best_lr.value)))])


def same(row: pd.Series, o: Optimum) -> bool:
    """Say whether a run belongs to a curve."""
    return all(row.get(k) == v or (pd.isna(v) and pd.isna(row.get(k))) for k, v in o.curve.key.items() if k in row.index)
