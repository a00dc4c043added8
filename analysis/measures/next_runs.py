"""Suggest the runs that are likeliest to decide the undecided claims."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from analysis.inference.decide import MIN_SEEDS, GateCode
from analysis.inference.estimate import SEEDS
from analysis.optimum.fit import Optimum, lowest_loss, rate_means, seeds_at_best
from analysis.runs.curves import LrCurve, full_names

MAX_NEW_SEEDS = 5
"""The most new seeds that are suggested for one curve at a time."""
N_AROUND = 3
"""Number of learning rates around the optimum that get new seeds."""
HOPELESS = {GateCode.TASK, GateCode.BY_TASK, GateCode.MISSING, GateCode.WITHDRAWN}
"""Gates that no run of the grid lifts."""


class Suggestion(NamedTuple):
    """Runs to add to one curve."""

    curve: LrCurve
    lr: float
    seeds: tuple[int, ...]
    why: str


def suggest(found: Any) -> list[Suggestion]:
    """Suggest runs for undecided claims: runs that lift a gate, else runs that narrow the interval.

    Empty if every claim is decided, or if another task, arm or rank is needed. `found`: the
    `Analysis` of a question, or another object with its verdicts, members and of_rates.
    """
    wanted: list[Suggestion] = []
    for verdict in found.verdicts:
        if verdict.outcome != "UNDECIDED" or any(g.code in HOPELESS for g in verdict.gates):
            continue
        curves, spread = found.members.get(verdict.group, []), verdict.estimate.spread
        if found.of_rates and not verdict.log:
            curves = [o for o in curves if o.curve.key["method"] == "lora"]
        n, of_rates = verdict.missing or MAX_NEW_SEEDS, found.of_rates and spread is None
        if gated := [s for o in curves for s in _open_gates(o)]:
            wanted += gated
        elif of_rates or spread is None or spread.of == SEEDS:  # else no run adds its units
            for o in curves:
                if of_rates and n >= MAX_NEW_SEEDS:  # other LRs narrow an optimum too
                    x, why = _around(o), "halfway between the learning rates around the optimum"
                    used, counts = np.unique(o.curve.seed, return_counts=True)  # the most used
                    seeds = used[np.argsort(-counts, kind="stable")][:MIN_SEEDS].tolist()
                    wanted += [_make(o, v, seeds, why) for v in (x[1:] + x[:-1]) / 2]
                what = "optimum" if of_rates else "interval"
                wanted += _more_seeds(o, min(n, MAX_NEW_SEEDS), f"narrows the {what}")
    merged: dict[tuple[int, float], Suggestion] = {}
    for s in wanted:
        known = merged.get((id(s.curve), s.lr), s)
        tried = s.curve.seed[np.abs(s.curve.x - math.log(s.lr)) < 2e-3].tolist()
        if fresh := {*known.seeds, *s.seeds} - set(tried):
            merged[id(s.curve), s.lr] = known._replace(seeds=tuple(sorted(fresh)))
    return list(merged.values())


def _make(o: Optimum, x: float, seeds: Iterable[int], why: str) -> Suggestion:
    """Suggest seeds at ln(lr) x."""
    return Suggestion(o.curve, float(f"{math.exp(x):.2e}"), tuple(int(s) for s in seeds), why)


def _open_gates(o: Optimum) -> list[Suggestion]:
    """Suggest LRs or seeds that lift the gates of one curve; empty if none is open."""
    lrs, why = missing_lrs(o)
    if lrs:
        # Those of the learning rate with the most, and MIN_SEEDS at least: one look is enough.
        x, fresh = o.curve.x, int(o.curve.seed.max()) + 1 + np.arange(MIN_SEEDS)
        most = max((o.curve.seed[x == v] for v in np.unique(x)), key=len)
        seeds = [*most, *fresh[: max(0, MIN_SEEDS - len(most))]]
        return [_make(o, math.log(lr), seeds, why) for lr in lrs]
    if (have := seeds_at_best(o)) < MIN_SEEDS:
        return _more_seeds(o, MIN_SEEDS - have, f"{MIN_SEEDS} seeds at the optimum")
    flat = "the LR curve is too flat for its noise"
    return _more_seeds(o, MIN_SEEDS, flat) if "flat" in o.flags else []


def missing_lrs(o: Optimum) -> tuple[list[float], str]:
    """Return learning rates that a curve needs for a verdict, and why; none if it has enough.

    They lie beyond the edge of the LRs tried, below a diverged one, or around the best.
    """
    (x, means), every = rate_means(o.curve), np.unique(o.curve.x)
    ln_2, found, why = math.log(2), [], ""
    if not len(x):
        found, why = [every[0] - k * ln_2 for k in (1, 2, 3)], "every learning rate broke down"
    else:
        step = float(np.median(np.diff(x))) if len(x) > 1 else ln_2
        first_diverged, side = min(every[every > x[-1]], default=math.inf), o.open_side
        if side > 0 and math.isfinite(first_diverged):
            found = [x[-1] + (first_diverged - x[-1]) * k / 3 for k in (1, 2)]
            why = "between the best learning rate and the first that breaks down"
        elif side:
            end = x[-1] if side > 0 else every[0]
            found = [end + side * k * step for k in (1, 2)]
            why = "beyond the edge of the learning rates tried"
        elif "few_points" in o.flags or "no_variance" in o.flags:
            best, why = x[lowest_loss(means)], "more learning rates around the best one"
            found = [best - step / 2, best + step / 2]
    return [math.exp(v) for v in found], why


def _more_seeds(o: Optimum, n: int, why: str) -> list[Suggestion]:
    fresh = int(o.curve.seed.max()) + 1 + np.arange(n)
    return [_make(o, v, fresh, why) for v in _around(o)]


def _around(o: Optimum) -> np.ndarray:
    """Return the N_AROUND tried learning rates around the optimum, in ln(lr)."""
    x, means = rate_means(o.curve)
    at = math.log(o.best_lr.value) if o.best_lr.value else x[lowest_loss(means)]
    first = int(np.argmin(np.abs(x - at))) - N_AROUND // 2
    first = min(max(first, 0), max(len(x) - N_AROUND, 0))
    return x[first : first + N_AROUND]


def rows(suggestions: Sequence[Suggestion]) -> list[list[str]]:
    """Return suggestions as rows of text: group, curve, learning rate, seeds, reason."""
    names = full_names([s.curve for s in suggestions])
    return [
        [s.curve.group, name, f"{s.lr:g}", ", ".join(map(str, s.seeds)), s.why]
        for name, s in zip(names, suggestions)
    ]


def lines(suggestions: Sequence[Suggestion]) -> list[str]:
    """Format suggestions as lines of text, which say in what curves differ."""
    text = "{1} ({0}): lr {2}, seeds {3}: {4}"
    return [text.format(*row) for row in rows(suggestions)]
