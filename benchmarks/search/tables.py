"""Replays: every method asks for runs of a kept table.

A learning rate between two of the table gets an interpolated loss.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean

import numpy as np
import pandas as pd
from scipy.interpolate import Akima1DInterpolator

from analysis.measures.regret import starts_of
from analysis.runs.lr_curves import runs_of
from benchmarks.harness import RESULTS, Figures, Log
from benchmarks.search.methods import (
    FAR,
    N_GRID,
    OPTUNA,
    RIGHT,
    Arm,
    Losses,
    Path,
    Trial,
    Truth,
    additive,
    course,
    described,
    end_of,
    optuna,
    plain_grid,
    summary,
    truths,
    tune,
    updates_of,
    whole_search,
)
from lorasweep.methods.registry import spec_from
from lorasweep.spec.streams import stream
from lorasweep.sweep.grid import Point
from lorasweep.sweep.question import Search

LOOKED = 100
"""Replays of a table in which the analysis decides when tune stops."""


@dataclass(frozen=True)
class Kept:
    """Runs of a kept table, of two or more arms."""

    name: str
    table: pd.DataFrame
    truths: list[Truth]
    points: list[Point]
    losses: list[Losses]
    evaluated: list[list[int]]
    n_seeds: int

    def arms(self, k: int) -> list[Arm]:
        """Return the arms of a replay: starts at random, seeds in random order."""
        rng, arms = stream("replay", self.name, k), []
        order = rng.permutation(self.n_seeds)
        for p, truth, losses, steps in zip(self.points, self.truths, self.losses, self.evaluated):
            far = math.log(FAR) * rng.uniform(-1, 1)
            lr = (truth.optimum.best_lr.value or math.nan) * math.exp(far)
            start = Point(p.arm, dataclasses.replace(p.spec, lr=lr, seed=0))
            arms.append(Arm(start, _reordered(losses, order), steps))
        return arms


def _reordered(losses: Losses, order: np.ndarray) -> Losses:
    return lambda lr, steps, seed: losses(lr, steps, int(order[seed % len(order)]))


def _of_lr_ratio(t: pd.DataFrame) -> pd.Series:
    return t["steps"] > 0


def _of_short_runs(t: pd.DataFrame) -> pd.Series:
    return t["steps"] == 256


def _of_layers(t: pd.DataFrame) -> pd.Series:
    lora = (t["rank"] == 4) & (t["layers"] == "attention+mlp")
    return (t["model"] == "tiny64-skills") & ((t["scope"] == "all") | lora)


TABLES = {
    "lr_ratio-small": _of_lr_ratio,
    "layers-tiny": _of_layers,
    "short_runs-tiny": _of_short_runs,
}
"""Kept table -> its runs that are replayed: those with the widest grids."""


def kept(name: str) -> Kept:
    """Read a kept table."""
    table = pd.read_parquet(RESULTS / name / "table.parquet")
    table = table[TABLES[name](table)].reset_index(drop=True)
    points, losses, evaluated = [], [], []
    found = truths(table)
    for truth in found:
        runs = runs_of(table, truth.optimum.curve)
        points.append(Point(runs["method"].iloc[0], spec_from(json.loads(runs["spec"].iloc[0]))))
        values, steps = interpolated(runs, stream("missing", name, truth.optimum.curve.name))
        losses.append(values)
        evaluated.append(steps)
    return Kept(name, table, found, points, losses, evaluated, table["seed"].nunique())


def interpolated(runs: pd.DataFrame, rng: np.random.Generator) -> tuple[Losses, list[int]]:
    """Return the losses of an arm at any learning rate, and the updates with an evaluation.

    Between learning rates, the loss of a seed is interpolated in ln(lr). Beyond the ends it is
    extended by a line, below them at most to the loss before training. A run that is missing gets
    the value of its learning rate plus the shift of its seed plus noise, as estimated from the
    others.
    """
    x, seeds = np.log(sorted(runs["lr"].unique())), sorted(runs["seed"].unique())
    full = int(runs["steps"].max())
    by_step: dict[int, np.ndarray] = {}
    for _, run in runs[runs["status"] == "done"].iterrows():
        at = seeds.index(run["seed"]), int(np.argmin(abs(x - math.log(run["lr"]))))
        points = [(p["step"], p["test_nll"]) for p in json.loads(run["result"])["curve"]]
        for step, nll in [*(p for p in points if 0 < p[0] < full), (full, run["test_nll"])]:
            by_step.setdefault(step, np.full((len(seeds), len(x)), np.nan))[at] = nll
    alive = ~np.isnan(by_step[full]).all(0)
    last = math.inf if alive.all() else (x[alive][-1] + x[~alive][0]) / 2
    curves, before = {}, float(runs["nll_start"].mean())
    for step, table in by_step.items():
        rate, shift = additive(table[:, alive])
        expected = rate + shift[:, None]
        off = (table[:, alive] - expected)[:, (~np.isnan(table[:, alive])).sum(0) > 1]
        filled = np.where(
            np.isnan(table[:, alive]),
            expected + np.nanstd(off) * rng.standard_normal(expected.shape),
            table[:, alive],
        )
        curves[step] = [_line(x[alive], y, before) for y in filled]

    def loss(lr: float, steps: int, seed: int) -> float:
        return curves[steps][seed](math.log(lr)) if math.log(lr) <= last else math.inf

    return cache(loss), sorted(by_step)


def _line(x: np.ndarray, y: np.ndarray, highest: float) -> Callable[[float], float]:
    """Return a smooth line through losses over ln(lr)."""
    inside = Akima1DInterpolator(x, y, method="makima")
    slope = np.diff(y)[[0, -1]] / np.diff(x)[[0, -1]]

    def value(at: float) -> float:
        if at < x[0]:
            return float(max(min(y[0] + slope[0] * (at - x[0]), highest), y[0]))
        return float(inside(at) if at <= x[-1] else y[-1] + max(slope[1], 0.0) * (at - x[-1]))

    return value


def replays(log: Log, n: int = 1000) -> list[Figures]:
    """Replay every method on every table."""
    rows = []
    for name in TABLES:
        data = kept(name)
        steps = data.points[0].spec.steps
        paths: dict[str, list[Path]] = {}
        ends: dict[str, list[float]] = {}
        for k in range(n):
            arms = data.arms(k)
            for method, trials in replay(arms, (name, k)).items():
                for own, truth in zip(trials, data.truths):
                    paths.setdefault(method, []).append(course(own, steps, truth))
                    ends.setdefault(method, []).append(end_of(own, steps))
        looked = [looked_at(data, k) for k in range(min(n, LOOKED))]
        spec = data.points[0].spec
        methods = {method: summary(paths[method], ends[method]) for method in paths}
        row = {
            "table": name,
            "model": spec.model.name,
            "dataset": spec.dataset.name,
            "steps": steps,
            "prefix": Search().short_steps(steps),
            "seeds": data.n_seeds,
            "replays": n,
            "arms": [described(t) for t in data.truths],
            "methods": methods,
            "looked": {
                "replays": len(looked),
                "updates": fmean(u for u, _ in looked),
                "right": fmean(r < RIGHT for _, regrets in looked for r in regrets),
            },
        }
        for method, found in methods.items():
            shown = ", ".join(f"{k} {v}" for k, v in found.items() if k != "shares")
            log(f"{name}, {method}: {shown}")
        log(f"{name}, with interim analyses: {row['looked']}")
        rows.append(row)
    return rows


def replay(arms: Sequence[Arm], name: tuple[object, ...]) -> dict[str, list[list[Trial]]]:
    """Let every method search, with a budget of N_GRID full runs per arm."""
    found = {
        "tune": tune(arms, Search(seeds=1)),
        "plain grid": [plain_grid(arm) for arm in arms],
        "plain grid, random order": [
            plain_grid(arm, stream("order", *name, k)) for k, arm in enumerate(arms)
        ],
    }
    for setting in OPTUNA:
        found[setting] = [optuna(a, setting, N_GRID, (*name, k)) for k, a in enumerate(arms)]
    return found


def looked_at(data: Kept, k: int) -> tuple[float, list[float]]:
    """Replay a whole search with its interim analyses.

    Returns its full runs per arm, and the regret of the fitted learning rate of each arm.
    """
    start = fmean(starts_of(data.table).values())
    arms = data.arms(k)
    trials, results = whole_search(arms, Search(seeds=data.n_seeds - 1), start)
    regrets = [
        truth.regret(found["best_lr"]["value"] or found["best_tried"])
        for truth, found in zip(data.truths, results["arms"])
    ]
    return updates_of(trials, arms[0].start.spec.steps), regrets
