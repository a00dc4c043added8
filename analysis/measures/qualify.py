"""Check whether a task is fit for questions about learning rates, for a model.

Five checks, from runs of full fine-tuning and of LoRA. On a task that fails, a difference between
methods means little: there is nothing to learn, or nothing left. Verdicts on such a task are
UNDECIDED (task). Noise is only a warning, since it already widens the interval.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.inference.estimate import Estimate, number, with_interval
from analysis.inference.gates import Gate, GateCode
from analysis.inference.seeds import from_sample
from analysis.measures.speed import curves_at_best
from analysis.optimum.fit import fit_all
from analysis.optimum.optimum import Optimum
from analysis.runs.lr_curves import lr_curves
from analysis.runs.prefixes import MIN_GAIN, MIN_REST, gain_in_noise

EDGES = ("at_edge", "bounded_by_divergence", "flat", "no_usable_points")
"""Flags of an optimum that is not a single minimum inside the LRs tried."""
MAX_NOISE = 0.1
"""Largest ratio of the standard deviation between seeds to the rise of the loss at a factor 2 from
the optimum."""


@dataclass(frozen=True)
class Check:
    """One requirement.

    `ok` is None if the runs cannot tell. A check that only `warns` does not disqualify a task.
    """

    group: str
    name: str
    measured: str
    needed: str
    ok: bool | None
    warns: bool = False


def qualify(table: pd.DataFrame) -> list[Check]:
    """Check every model and data set (batch and updates) of a table."""
    optima = fit_all(lr_curves(table))
    points = [found.best for found in curves_at_best(table, optima)]
    found: list[Check] = []
    for group in dict.fromkeys(o.curve.group for o in optima):
        mine = [(o, p) for o, p in zip(optima, points) if o.curve.group == group]
        found += _group(group, [o for o, _ in mine], [p for _, p in mine])
    return found


def _group(group: str, optima: Sequence[Optimum], points: Sequence[Any]) -> list[Check]:
    start, floor = optima[0].curve.nll_start, optima[0].curve.floor
    lowest = min((o.best_nll for o in optima if o.best_nll is not None), default=math.nan)
    left = (lowest - floor) / (start - floor)
    noise = optima[0].pooled.noise if optima[0].pooled else math.nan
    gain = gain_in_noise(start, lowest, noise)
    shown = f"{number(gain)} standard deviations of the difference between two runs"
    checks = [
        Check(group, "to be learned", shown, f"{MIN_GAIN:g} or more", _at_least(gain, MIN_GAIN)),
        Check(
            group,
            "not solved",
            f"{number(left)} of that is left at the best",
            f"{MIN_REST} or more",
            _at_least(left, MIN_REST),
        ),
    ]
    for o, mine in zip(optima, points):
        checks += _of_curve(group, o, mine)
    return checks


def _at_least(value: float, least: float) -> bool | None:
    return None if math.isnan(value) else value >= least


def _of_curve(group: str, o: Optimum, points: dict[int, Any]) -> list[Check]:
    slope = _still(points)
    edge = [f for f in o.flags if f in EDGES]
    rise = _rise(o)
    share = math.nan
    if rise is not None and o.likelihood is not None and o.pooled is not None and o.pooled.df:
        share = o.pooled.noise / rise
    return [
        Check(
            group,
            f"still learning, {o.curve.name}",
            f"{with_interval(slope)} nats in the last doubling",
            "above 0",
            None if slope.value is None else not _has_stalled(slope),
        ),
        Check(
            group,
            f"one minimum inside, {o.curve.name}",
            ", ".join(edge) or "inside",
            "inside",
            not edge,
        ),
        Check(
            group,
            f"noise is small, {o.curve.name}",
            f"{number(share)} of the rise a factor 2 off",
            f"{MAX_NOISE} or less",
            None if math.isnan(share) else share <= MAX_NOISE,
            True,
        ),
    ]


def _last_doubling(points: Sequence[tuple[float, float]]) -> float | None:
    """Return the loss at half the last step minus that at the last step; None if unknown."""
    found = dict(points)
    last = max(found, default=0)
    return found[last / 2] - found[last] if last / 2 in found else None


def _still(points: dict[int, Any]) -> Estimate:
    """Return what the last doubling of the updates gains, in nats, over the seeds."""
    return from_sample([g for p in points.values() if (g := _last_doubling(p)) is not None])


def _has_stalled(gain: Estimate) -> bool:
    """Return whether a gain is not above 0; one seed, without an interval, by its value."""
    least = gain.value if gain.low is None else gain.low
    return least is not None and least <= 0


def _rise(o: Optimum) -> float | None:
    if o.shape is None or o.best_lr.value is None:
        return None
    return float(
        np.mean(o.shape.height(np.array([o.shape.m - math.log(2), o.shape.m + math.log(2)])))
    )


def stalled(optima: Sequence[Optimum], points: Sequence[dict[int, Any]]) -> list[Gate]:
    """Return a gate for each curve that has stopped learning by the end of its runs."""
    found = []
    for o, mine in zip(optima, points):
        gain = _still(mine)
        if _has_stalled(gain):
            last = with_interval(gain)
            why = f"{o.curve.name} gains {last} nats in the last doubling, not clearly any"
            found.append(Gate(GateCode.TASK, why))
    return found


def verdict(checks: Sequence[Check]) -> dict[str, bool]:
    """Return whether each group qualifies: no check fails, except those that only warn.

    A check with an unknown outcome does not fail.
    """
    groups = dict.fromkeys(c.group for c in checks)
    return {g: all(c.ok is not False or c.warns for c in checks if c.group == g) for g in groups}


def rows(checks: Sequence[Check]) -> list[list[str]]:
    """Return the checks as a table; the first row is its head."""
    met = {True: "yes", False: "NO", None: "unknown"}
    out = [["task", "check", "measured", "needed", "met"]]
    for c in checks:
        outcome = "no: a warning" if c.warns and c.ok is False else met[c.ok]
        out.append([c.group, c.name, c.measured, c.needed, outcome])
    return out
