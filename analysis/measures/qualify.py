"""Check whether a task (a model and data set) can answer questions about learning rates.

On an unfit task there is too little to learn, or too little left to learn at the end: verdicts are
UNDECIDED (gate TASK). Noise is no check, since it already widens the interval.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from analysis.inference.decide import Gate, GateCode
from analysis.inference.estimate import Estimate, from_sample, number, with_interval
from analysis.measures.speed import curves_at_best, losses_before
from analysis.optimum.fit import Optimum, fit_all
from analysis.runs.learning_curves import MIN_GAIN, MIN_REST, Points, gain_in_noise
from analysis.runs.lr_curves import lr_curves

EDGES = ("at_edge", "bounded_by_divergence", "flat", "no_usable_points")
"""Flags of an optimum that is not a single minimum inside the LRs tried."""


@dataclass(frozen=True)
class Check:
    """One requirement of a task; `ok` is None if unknown."""

    group: str
    name: str
    measured: str
    needed: str
    ok: bool | None


def qualify(table: pd.DataFrame) -> list[Check]:
    """Check every group of a table: a model, data set, batch size and number of updates."""
    optima = fit_all(lr_curves(table))
    points = dict(zip(map(id, optima), curves_at_best(table, optima)))
    found: list[Check] = []
    for group, mine in itertools.groupby(optima, key=lambda o: o.curve.group):
        curves = list(mine)
        start, floor, pooled = curves[0].curve.nll_start, curves[0].curve.floor, curves[0].pooled
        lowest = min((o.best_nll for o in curves if o.best_nll is not None), default=math.nan)
        noise = pooled.noise if pooled else math.nan
        gain, left = gain_in_noise(start, lowest, noise), (lowest - floor) / (start - floor)
        of_gain = f"{number(gain)} standard deviations of the difference between two runs"
        of_rest = f"{number(left)} of that is left at the best"
        for name, value, least, shown in (
            ("to be learned", gain, MIN_GAIN, of_gain),
            ("not solved", left, MIN_REST, of_rest),
        ):
            enough = None if math.isnan(value) else value >= least
            found.append(Check(group, name, shown, f"{least:g} or more", enough))
        for o in curves:
            (slope, has_stalled), name = _last_gain(points[id(o)].best), o.curve.name
            shown = f"{with_interval(slope)} nats in the last doubling"
            learns = None if slope.value is None else not has_stalled
            found.append(Check(group, f"still learning, {name}", shown, "above 0", learns))
            edge = [f for f in o.flags if f in EDGES]
            shown = ", ".join(edge) or "inside"
            found.append(Check(group, f"one minimum inside, {name}", shown, "inside", not edge))
    return found


def _last_gain(points: dict[int, Points]) -> tuple[Estimate, bool]:
    """Return how much the loss falls in the last doubling of the updates, in nats, over seeds.

    Also whether learning has stalled: the interval's lower end, or the value without an interval,
    is at most 0. Seeds whose curve begins after half of the updates are left out.
    """
    ends = (losses_before(mine, 2, 1) for mine in points.values())
    gain = from_sample([half - last for half, last in ends if half == half])
    least = gain.value if gain.low is None else gain.low
    return gain, least is not None and least <= 0


def stalled(optima: Sequence[Optimum], points: Sequence[dict[int, Points]]) -> list[Gate]:
    """Return a gate for each curve that has stopped learning by the end of its runs."""
    found = []
    for o, mine in zip(optima, points):
        gain, has_stalled = _last_gain(mine)
        if has_stalled:
            last = f"{o.curve.name} gains {with_interval(gain)} nats in the last doubling"
            found.append(Gate(GateCode.TASK, f"{last}, not clearly any"))
    return found


def verdict(checks: Sequence[Check]) -> dict[str, bool]:
    """Return whether each group qualifies."""
    groups = dict.fromkeys(c.group for c in checks)
    return {g: all(c.ok is not False for c in checks if c.group == g) for g in groups}


def rows(checks: Sequence[Check]) -> list[list[str]]:
    """Return the checks as a table; the first row has the names of the columns."""
    met = {True: "yes", False: "NO", None: "unknown"}
    head = ["task", "check", "measured", "needed", "met"]
    return [head, *([c.group, c.name, c.measured, c.needed, met[c.ok]] for c in checks)]
