"""rho, step efficiency: full fine-tuning's steps to reach LoRA's loss, over LoRA's steps; each at its own best rate.

A gap in nats grows and shrinks with the place on the learning curve, rho does not: 0.9 means that LoRA needs 11% more
steps. Reads learning curves from a table of runs; fits no rate.
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from analysis.lr_optimum import Optimum
from analysis.results import LEVEL, Estimate, exp_of, from_sample
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


def rho(lora: dict[int, Points], full: dict[int, Points]) -> Estimate:
    """Return rho from held-out curves by seed (step 0 and the last evaluation left out), paired by seed.

    Interval: Student's, over ln rho of the seeds; needs two or more. Where full fine-tuning ends above LoRA's loss in any
    seed, rho is beyond the ratio of steps seen, and where it is below that at its first evaluation, rho is short of it: only
    that bound is given.
    """
    logs, censored, early = [], [], []
    for seed in sorted(lora.keys() & full.keys()):
        if not lora[seed] or not full[seed]:
            continue
        steps, loss = lora[seed][-1]
        reached = steps_to_reach(full[seed], loss)
        if full[seed][0][1] <= loss:
            early.append(full[seed][0][0] / steps)
        elif reached is None:
            censored.append(full[seed][-1][0] / steps)
        else:
            logs.append(math.log(reached / steps))
    if early:
        high = None if censored else max([*early, *(math.exp(v) for v in logs)])
        return Estimate(None, None, high, len(logs) + len(early), ("FullFT is there at its first evaluation",))
    if censored:
        return Estimate(None, min([*censored, *(math.exp(v) for v in logs)]), None, len(logs) + len(censored),
                        ("FullFT does not reach LoRA's loss",))  # fmt: skip
    if not logs:
        return Estimate(None)
    mean = float(np.mean(logs))
    if len(logs) < 2:
        return Estimate(math.exp(mean), n=len(logs))
    half = float(stats.t.ppf(0.5 + LEVEL / 2, len(logs) - 1) * np.std(logs, ddof=1) / math.sqrt(len(logs)))
    return Estimate(math.exp(mean), math.exp(mean - half), math.exp(mean + half), len(logs))


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


def per_seed(one: dict[int, Points], other: dict[int, Points]) -> dict[int, float]:
    """Return ln(rho) of one curve against another by seed: the other's steps to the one's loss over its steps. +-infinity
    where the other never gets there, or is there at its first evaluation."""
    out = {}
    for seed in sorted(one.keys() & other.keys()):
        if one[seed] and other[seed]:
            steps, loss = one[seed][-1]
            reached = steps_to_reach(other[seed], loss)
            early = other[seed][0][1] <= loss
            out[seed] = -math.inf if early else math.inf if reached is None else math.log(reached / steps)
    return out


def rho_by_seed(one: dict[int, Points], other: dict[int, Points]) -> Estimate:
    """Return rho with Student's interval and draws over seeds; only a bound where the other curve never gets there."""
    logs = per_seed(one, other)
    known = [v for v in logs.values() if math.isfinite(v)]
    if len(known) < len(logs):
        return rho(one, other)
    return exp_of(from_sample(known))


def _near(o: Optimum) -> float | None:
    x = o.curve.x[o.curve.usable]
    if o.best_lr.value is None or not len(x):
        return None
    return float(x[np.argmin(np.abs(x - math.log(o.best_lr.value)))])


def same(row: pd.Series, o: Optimum) -> bool:
    """Say whether a run belongs to a curve."""
    return all(row.get(k) == v or (pd.isna(v) and pd.isna(row.get(k))) for k, v in o.curve.key.items() if k in row.index)
