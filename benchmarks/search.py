"""Count the updates that `+sweep=tune` needs, a plain grid needs, and Optuna needs.

    python -m benchmarks search [--out FILE] [replays[:N]] [cells[:N]] [coverage[:N]] [tiny] [small]

`replays`: N replays of each kept table. `cells`: the same on each base of `quadrature`.
`coverage`: N simulated searches of each family. `tiny`, `small`: real runs; `small` needs the
weights of SmolLM2 and GSM8K.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.interpolate import Akima1DInterpolator

from analysis.inference.estimate import number, rate
from analysis.measures.regret import starts_of
from analysis.optimum.fit import Optimum, fit_all
from analysis.questions.base import Panel, Series
from analysis.questions.registry import analyse
from analysis.report import plots
from analysis.report.report import results_of
from analysis.report.text import Rows
from analysis.runs.curves import lr_curves, runs_of
from benchmarks import harness
from benchmarks.generators import FAMILIES
from benchmarks.harness import RESULTS, Figures, Log, Page, packages_of, render
from lorasweep.advise import rates
from lorasweep.config.compose import compose_request
from lorasweep.data.splits import load as load_data
from lorasweep.launch.torch_trainer import finetune
from lorasweep.methods.lora import LoRA
from lorasweep.methods.registry import spec_from
from lorasweep.models.load import load as load_model
from lorasweep.spec.metric import eval_steps
from lorasweep.spec.run import RunSpec
from lorasweep.spec.streams import stream
from lorasweep.store.exported import table_row
from lorasweep.sweep.grid import Point, around
from lorasweep.sweep.question import Search
from lorasweep.sweep.request import question
from lorasweep.sweep.search import Look, is_short, search
from lorasweep.work import answer
from lorasweep.work.search import start_of

RIGHT = 1.0
"""A learning rate is right if its regret is below this share of the gain, in percent."""
FAR = 10.0
"""Searches start at most this factor from the optimum."""
FULL_STEPS = 128
"""Updates of a full run of the sweep `tune` on simulated runs."""
N_GRID, APART = 9, 2.0
"""Learning rates of the plain grid, and the factor between neighbours. Its full runs per arm are
the budget of every method."""
TUNE, GRID, SHUFFLED = "tune", "plain grid", "plain grid, random order"
OPTUNA: dict[str, tuple[float, int, int]] = {
    "Optuna": (256.0, 3, 10),
    "Optuna, range of the grid": (16.0, 3, 10),
    "Optuna, range of the grid, set by hand": (16.0, 4, 5),
}
"""Name -> range (start divided and multiplied by this), reduction factor, random first trials."""
Losses = Callable[[float, int, int], float]
"""(learning rate, updates, number of the seed) -> loss; infinity if the run diverged."""
Path = list[tuple[float, float]]
"""(updates so far in full runs, regret in percent of the gain) after each run of a search."""


class Trial(NamedTuple):
    """A run that a method trained, or continued."""

    lr: float
    seed: int
    updates: int
    """Updates that were added."""
    loss: float | None
    """Loss of a full run; None: the run was not trained to its end."""


class Arm(NamedTuple):
    """An arm of a task: where a search starts, and how good a learning rate is."""

    start: Point
    losses: Losses
    evaluated: Sequence[int]
    """Updates with an evaluation, up to a full run's."""


@dataclass(frozen=True)
class Truth:
    """The fit of all runs of an arm."""

    optimum: Optimum
    gain: float
    """The untrained loss minus the lowest fitted loss, in nats."""

    def regret(self, lr: float) -> float:
        """Return the regret of a learning rate in percent of the gain."""
        assert self.optimum.shape is not None
        height = float(self.optimum.shape.height(np.array([math.log(lr)]))[0])
        return 100 * max(height, 0.0) / self.gain

    def figures(self) -> Figures:
        """Describe the fit."""
        o = self.optimum
        lrs = np.exp(np.unique(o.curve.x))
        ends = {"lrs": len(lrs), "low": float(lrs[0]), "high": float(lrs[-1])}
        noise = o.pooled.noise if o.pooled else None
        known = {"optimum": o.best_lr.value, "gain": self.gain, "noise": noise}
        return {"arm": o.curve.name, **ends, **known}


def truths(table: pd.DataFrame) -> list[Truth]:
    """Fit all runs of a table; full fine-tuning first, then by rank."""
    start = fmean(starts_of(table).values())
    return [Truth(o, start - (o.best_nll or math.nan)) for o in fit_all(lr_curves(table))]


# ---------------------------------------------------------------- methods


def tune(
    arms: Sequence[Arm],
    how: Search,
    look: Callable[[Sequence[Point]], Look] | None = None,
    losses: dict[str, float] | None = None,
) -> list[list[Trial]]:
    """Search as `+sweep=tune` does; return the trials of each arm.

    Args:
        look: the interim analysis; None: it asks for nothing and never ends the search.
        losses: gets the loss of each run, by its id.
    """
    losses = {} if losses is None else losses
    trials: list[list[Trial]] = [[] for _ in arms]
    seen: dict[tuple[int, float, int], int] = {}
    names = [(a.start.arm, a.start.spec.method) for a in arms]

    def train(known: Sequence[Point], new: Sequence[Point]) -> bool:
        for p in new:
            k = names.index((p.arm, p.spec.method))
            first = arms[k].start.spec
            lr, steps, seed = p.spec.lr, p.spec.steps, p.spec.seed - first.seed
            losses[p.id] = loss = arms[k].losses(lr, steps, seed)
            added = steps - seen.get((k, lr, seed), 0)
            seen[k, lr, seed] = steps
            trials[k].append(Trial(lr, seed, added, loss if steps == first.steps else None))
        return True

    starts, asks = [a.start for a in arms], look or (lambda _: (False, {}))
    search(starts, how, losses.get, train, asks, rates.law)
    return trials


def plain_grid(arm: Arm, rng: np.random.Generator | None = None) -> list[Trial]:
    """Train a grid around the start, from its middle outwards or in random order."""
    centre, steps = arm.start.spec.lr, arm.start.spec.steps
    lrs = sorted(around(centre, N_GRID, APART), key=lambda lr: abs(math.log(lr / centre)))
    if rng is not None:
        rng.shuffle(lrs)
    return [Trial(lr, 0, steps, arm.losses(lr, steps, 0)) for lr in lrs]


def optuna(arm: Arm, setting: str, budget: float, name: Sequence[object]) -> list[Trial]:
    """Search with Optuna's TPE and Hyperband, with one seed, until the budget is spent.

    The first trial is the start. `name`: of the sampler's random stream.
    """
    import optuna as package  # of extra `bench`

    package.logging.set_verbosity(package.logging.ERROR)
    (reach, factor, startup), spec = OPTUNA[setting], arm.start.spec
    prefix = Search().short_steps(spec.steps)
    seed = int(stream("optuna", setting, *name).integers(2**31))
    study = package.create_study(
        sampler=package.samplers.TPESampler(seed=seed, n_startup_trials=startup),
        pruner=package.pruners.HyperbandPruner(prefix, spec.steps, factor),
    )
    study.enqueue_trial({"lr": spec.lr})
    found: list[Trial] = []

    def train(trial: Any) -> float:
        lr = float(f"{trial.suggest_float('lr', spec.lr / reach, spec.lr * reach, log=True):.2e}")
        for step in (s for s in arm.evaluated if prefix <= s < spec.steps):
            trial.report(arm.losses(lr, step, 0), step)
            if trial.should_prune():
                found.append(Trial(lr, 0, step, None))
                raise package.TrialPruned
        found.append(Trial(lr, 0, spec.steps, arm.losses(lr, spec.steps, 0)))
        return arm.losses(lr, spec.steps, 0)

    def stop(study: Any, _: object) -> None:
        if sum(t.updates for t in found) >= budget * spec.steps:
            study.stop()

    study.optimize(train, callbacks=[stop])
    return found


def chosen(full: Iterable[Trial]) -> float | None:
    """Return the learning rate that full runs choose.

    It is the vertex of the parabola in ln(lr) through the best learning rate and its neighbours,
    or the best one if that is at an end or beside a diverged run. With several seeds, losses are
    corrected by the mean shift of each seed.
    """
    runs = list(full)
    if not runs:
        return None
    lrs, seeds = sorted({t.lr for t in runs}), sorted({t.seed for t in runs})
    table = np.full((len(seeds), len(lrs)), np.nan)
    for t in runs:
        table[seeds.index(t.seed), lrs.index(t.lr)] = t.loss
    diverged = np.isinf(table).any(0)
    y = np.where(diverged, np.inf, additive(np.where(np.isinf(table), np.nan, table))[0])
    at = int(np.argmin(y))
    near = slice(at - 1, at + 2)
    if 0 < at < len(lrs) - 1 and np.isfinite(y[near]).all():
        x = np.log(lrs[near])
        curve, slope, _ = np.polyfit(x - x[1], y[near], 2)
        if curve > 0:
            return float(np.exp(np.clip(x[1] - slope / 2 / curve, x[0], x[2])))
    return lrs[at]


def additive(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fit losses[seed, rate] by a value of the rate plus a shift of the seed; NaN is missing."""
    shift = np.zeros(len(table))
    there = ~np.isnan(table)
    filled, n = np.where(there, table, 0.0), np.maximum(there.sum(0), 1)
    for _ in range(30 if len(table) > 1 else 1):
        rate = np.where(there, filled - shift[:, None], 0).sum(0) / n
        shift = np.where(there, filled - rate, 0).sum(1) / np.maximum(there.sum(1), 1)
        shift -= shift.mean()
    return np.where(there.any(0), rate, np.inf), shift


def whole_search(
    arms: Sequence[Arm], how: Search, before: float
) -> tuple[list[list[Trial]], Figures]:
    """Search until the analysis has decided; return the trials of each arm, and the last analysis.

    `before`: the loss before training.
    """
    asked = swept()[1]
    starts, losses, judged = [a.start for a in arms], dict[str, float](), pd.DataFrame()

    def look(points: Sequence[Point]) -> Look:
        nonlocal judged
        full = [p for p in points if not is_short(p, starts)]
        judged = pd.DataFrame([row_of(p.spec, losses[p.id], before) for p in full])
        return answer.look(judged, asked)

    trials = tune(arms, how, look, losses)
    return trials, results_of(analyse(judged, asked), asked, judged)


@cache
def swept() -> tuple[list[Point], dict[str, Any]]:
    """Compose the sweep `tune` at scale tiny; return its points and its question."""
    request = compose_request(["+sweep=tune", "scale=tiny", f"steps={FULL_STEPS}"])
    return list(request.points), question(request)


def row_of(spec: RunSpec, loss: float, before: float) -> dict[str, Any]:
    """Return the row of a full run in a table of runs."""
    ended = {"state": "diverged"} if math.isinf(loss) else {"state": "done", "test_nll": loss}
    result = {"run_id": spec.id, **ended, "nll_start": before, "steps_done": spec.steps}
    return table_row(spec.plain(), result)


# ---------------------------------------------------------------- what a method needs


def updates_of(trials: Sequence[Sequence[Trial]], steps: int) -> float:
    """Return the mean updates of an arm, in full runs."""
    return fmean(sum(t.updates for t in own) for own in trials) / steps


def course(trials: Sequence[Trial], steps: int, truth: Truth) -> Path:
    """Return (updates so far in full runs, regret in percent of the chosen rate) after each run."""
    found, spent, full, regret = [], 0, [], math.inf
    for t in trials:
        spent += t.updates
        if t.loss is not None:
            full.append(t)
            lr = chosen(full)
            regret = truth.regret(lr) if lr else math.inf
        found.append((spent / steps, regret))
    return found


def until_right(path: Path) -> float:
    """Return the updates after which the choice stays right; infinity if it does not."""
    wrong = [k for k, (_, regret) in enumerate(path) if regret >= RIGHT]
    after = wrong[-1] + 1 if wrong else 0
    return path[after][0] if after < len(path) else math.inf


def regret_at(path: Path, updates: float) -> float:
    """Return the regret when this many updates are spent."""
    return next((r for spent, r in reversed(path) if spent <= updates + 1e-9), math.inf)


# ---------------------------------------------------------------- replays of kept tables

LOOKED = 100
"""Replays of a table in which the analysis decides when tune stops."""
TABLES: dict[str, Callable[[pd.DataFrame], pd.Series]] = {
    "lr_ratio-small": lambda t: t["steps"] > 0,
    "layers-tiny": lambda t: (
        (t["model"] == "tiny64-skills")
        & ((t["scope"] == "all") | ((t["rank"] == 4) & (t["layers"] == "attention+mlp")))
    ),
    "short_runs-tiny": lambda t: t["steps"] == 256,
}
"""Kept table -> its runs that are replayed: those with the widest grids."""


class Kept(NamedTuple):
    """Runs of a kept table, of two or more arms."""

    name: str
    table: pd.DataFrame
    truths: list[Truth]
    arms: list[Arm]
    """Each arm's first run, losses and evaluations."""

    def drawn(self, k: int) -> list[Arm]:
        """Return the arms of a replay: starts at random, seeds in random order."""
        rng = stream("replay", self.name, k)
        order = rng.permutation(self.table["seed"].nunique())

        def shuffled(losses: Losses) -> Losses:
            return lambda lr, steps, seed: losses(lr, steps, int(order[seed % len(order)]))

        arms = []
        for (start, losses, steps), truth in zip(self.arms, self.truths):
            far = math.log(FAR) * rng.uniform(-1, 1)
            lr = (truth.optimum.best_lr.value or math.nan) * math.exp(far)
            first = Point(start.arm, dataclasses.replace(start.spec, lr=lr, seed=0))
            arms.append(Arm(first, shuffled(losses), steps))
        return arms


def kept(name: str) -> Kept:
    """Read a kept table."""
    table = pd.read_parquet(RESULTS / name / "table.parquet")
    return kept_of(name, table[TABLES[name](table)].reset_index(drop=True))


def kept_of(name: str, table: pd.DataFrame) -> Kept:
    """Return runs of one base, data set and length as a table to replay."""
    found, arms = truths(table), []
    for truth in found:
        runs = runs_of(table, truth.optimum.curve)
        first = Point(runs["method"].iloc[0], spec_from(json.loads(runs["spec"].iloc[0])))
        missing = stream("missing", name, truth.optimum.curve.name)
        arms.append(Arm(first, *interpolated(runs, missing)))
    return Kept(name, table, found, arms)


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
    for step, every in by_step.items():
        table = every[:, alive]
        level, shift = additive(table)
        expected = level + shift[:, None]
        off = (table - expected)[:, (~np.isnan(table)).sum(0) > 1]
        drawn = expected + np.nanstd(off) * rng.standard_normal(expected.shape)
        filled = np.where(np.isnan(table), drawn, table)
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
    """Replay every method on every table, with a budget of N_GRID full runs per arm."""
    rows = []
    for name in TABLES:
        data = kept(name)
        spec, steps = data.arms[0].start.spec, data.arms[0].start.spec.steps
        paths: dict[str, list[Path]] = {}
        ends: dict[str, list[float]] = {}
        for k in range(n):
            arms = data.drawn(k)
            found = {TUNE: tune(arms, Search(seeds=1)), GRID: [plain_grid(a) for a in arms]}
            orders = [stream("order", name, k, i) for i in range(len(arms))]
            found[SHUFFLED] = list(map(plain_grid, arms, orders))
            for setting in OPTUNA:
                trials = (optuna(a, setting, N_GRID, (name, k, i)) for i, a in enumerate(arms))
                found[setting] = list(trials)
            for method, searches in found.items():
                for own, truth in zip(searches, data.truths):
                    paths.setdefault(method, []).append(course(own, steps, truth))
                    first = [t for t in own if t.seed == 0]
                    ends.setdefault(method, []).append(updates_of([first], steps))
        looked = [looked_at(data, k) for k in range(min(n, LOOKED))]
        row = {
            **{"table": name, "model": spec.model.name, "dataset": spec.dataset.name},
            **{"steps": steps, "prefix": Search().short_steps(steps)},
            **{"seeds": data.table["seed"].nunique(), "replays": n},
            "arms": [t.figures() for t in data.truths],
            "methods": {method: _needs(paths[method], ends[method]) for method in paths},
            "looked": {
                "replays": len(looked),
                "updates": fmean(u for u, _ in looked),
                "right": fmean(r < RIGHT for _, regrets in looked for r in regrets),
            },
        }
        log(str(row))
        rows.append(row)
    return rows


CELLS = {"quadrature-tiny": (32.0, 4.0), "quadrature-small": (64.0, 2.0)}
"""Kept table -> two alphas of LoRA, the first arm's first. The search was written before anybody
saw these runs."""


def cells(log: Log, n: int = 200) -> list[Figures]:
    """Replay searches over full fine-tuning and two alphas of LoRA, on each base of `quadrature`.

    Every arm's range is found with one seed, from a start up to FAR from its optimum.
    """
    rows = []
    for name, alphas in CELLS.items():
        table = pd.read_parquet(RESULTS / name / "table.parquet")
        free = (table["lr_b_ratio"].fillna(1) == 1) & table["alpha"].isin(alphas)
        table = table[free | (table["method"] == "fullft")]
        curves = lr_curves(table)
        for unit in dict.fromkeys(c.group for c in curves):
            mine = [c for c in curves if c.group == unit]
            if len(mine) == 1 + len(alphas):
                runs = pd.concat([runs_of(table, c) for c in mine], ignore_index=True)
                rows.append(_cell(unit, runs, alphas, n))
                log(str(rows[-1]))
    return rows


def _cell(unit: str, runs: pd.DataFrame, alphas: Sequence[float], n: int) -> Figures:
    """Replay `tune` and the plain grid on one base; the arm of the first alpha goes first."""
    data = kept_of(unit, runs)
    steps = data.arms[0].start.spec.steps

    def place(k: int) -> int:
        method = data.arms[k].start.spec.method
        return alphas.index(method.alpha) if isinstance(method, LoRA) else len(alphas)

    order = sorted(range(len(data.arms)), key=place)
    truths, every = [data.truths[k] for k in order], [data.arms[k] for k in order]
    found: dict[str, list[tuple[float, list[float]]]] = {TUNE: [], GRID: []}
    for k in range(n):
        arms = data._replace(truths=truths, arms=every).drawn(k)
        tuned = [[t for t in own if t.seed == 0] for own in tune(arms, Search(seeds=1))]
        for method, searches in ((TUNE, tuned), (GRID, [plain_grid(a) for a in arms])):
            ends = [course(own, steps, t)[-1][1] for own, t in zip(searches, truths)]
            found[method].append((updates_of(searches, steps), ends))
    return {
        **{"unit": unit, "replays": n, "steps": steps, "alphas": list(alphas)},
        "methods": {
            method: {
                "end": fmean(spent for spent, _ in every_search),
                "right": fmean(r < RIGHT for _, ends in every_search for r in ends),
                "regret": fmean(r for _, ends in every_search for r in ends),
            }
            for method, every_search in found.items()
        },
    }


def _needs(paths: Sequence[Path], ends: Sequence[float]) -> Figures:
    """Summarise many searches of a method; `ends`: the updates after which each one ends."""
    needed = sorted(map(until_right, paths))
    over = [round(0.5 * k, 1) for k in range(1, 2 * N_GRID + 1)]
    middle, most = (needed[min(int(p * len(needed)), len(needed) - 1)] for p in (0.5, 0.9))
    return {
        "searches": len(paths),
        "median": _or_none(middle),
        "most": _or_none(most),
        "end": fmean(ends),
        "right": fmean(regret_at(p, e) < RIGHT for p, e in zip(paths, ends)),
        "shares": {str(u): fmean(regret_at(p, u) < RIGHT for p in paths) for u in over},
    }


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def looked_at(data: Kept, k: int) -> tuple[float, list[float]]:
    """Replay a whole search with its interim analyses.

    Returns its full runs per arm, and the regret of the fitted learning rate of each arm.
    """
    start, arms = fmean(starts_of(data.table).values()), data.drawn(k)
    how = Search(seeds=data.table["seed"].nunique() - 1)
    trials, results = whole_search(arms, how, start)
    best = (found["best_lr"]["value"] or found["best_tried"] for found in results["arms"])
    regrets = [truth.regret(lr) for truth, lr in zip(data.truths, best)]
    return updates_of(trials, arms[0].start.spec.steps), regrets


# ---------------------------------------------------------------- simulated searches

SHAPES = [f for f in FAMILIES if f not in ("cliff", "unequal", "collapse")]
"""Families of simulated valleys; the others differ from `linex` in their noise or divergence."""
GAIN = 0.25
"""Loss before training minus the loss of full fine-tuning at its optimum, in nats."""
LEVELS = (-0.05, 0.1)
"""LoRA's loss minus full fine-tuning's, each at its optimum, as a share of the gain."""
STEEP = (0.08, 0.3)
"""Curvature at the optimum, as a share of the gain per unit of ln(lr) squared."""
NOISE = (0.003, 0.012)
"""Standard deviation of a run, as a share of the gain; of a seed's shift, three times as much."""
ERROR = 0.15
"""Standard deviation of ln(optimum / the law's), from the optimum of LoRA's first arm."""
LATER = 2.5
"""The optimum of a short run lies up to this factor above a full run's."""


class Valley(NamedTuple):
    """A simulated arm: expected losses of known shape, optimum and level, and noise."""

    shape: Callable[[float], float]
    """ln(lr / optimum) -> height above the minimum, at unit curvature."""
    optimum: float
    level: float
    steep: float
    noise: float
    later: float
    name: tuple[object, ...]
    """Of the random streams of seeds and runs."""

    def loss(self, lr: float, steps: int, seed: int) -> float:
        """Return the loss of a run of FULL_STEPS updates, or of a short one."""
        short = steps < FULL_STEPS
        u = math.log(lr / self.optimum / (self.later if short else 1.0))
        room = GAIN / 2 if short else GAIN - self.level
        height = self.steep * self.shape(u)
        if u < 0:  # a learning rate that is too low leaves the loss before training
            height = -room * math.expm1(-height / room)
        if height > 2 * room:
            return math.inf
        shift = 3 * stream(*self.name, "seed", seed).standard_normal()
        own = stream(*self.name, "run", seed, f"{lr:.2e}", steps).standard_normal()
        return GAIN - room + height + self.noise * float(shift + own)

    def regret(self, lr: float) -> float:
        """Return the regret of a learning rate, in percent of the gain."""
        return 100 * self.steep * self.shape(math.log(lr / self.optimum)) / (GAIN - self.level)


def simulated(family: str, k: int) -> tuple[list[Arm], list[Valley]]:
    """Simulate full fine-tuning and two ranks of LoRA, with valleys of one family, near the law."""
    rng = stream("tune", family, k)
    ranges, drawn = FAMILIES[family]
    parameters = [rng.uniform(*ends) for ends in ranges]
    near = np.linspace(-2, 2, 4001)
    heights = drawn(near, *parameters)
    at, lowest = float(near[np.argmin(heights)]), float(heights.min())

    def shape(u: float) -> float:
        return max(float(drawn(np.array([u + at]), *parameters)[0]) - lowest, 0.0)

    def log_uniform(low: float, high: float) -> float:
        return math.exp(rng.uniform(*np.log((low, high))))

    noise, arms, valleys = GAIN * log_uniform(*NOISE), [], []
    points = swept()[0]
    anchor, best = next(p for p in points if p.arm == "lora"), 1e-3 * log_uniform(1 / 3, 3)
    for p in points:
        lora = p.arm != "fullft"
        # where A rests, the law is silent about other ranks than the first arm's
        by_law = best if p == anchor else rates.law(p.spec, anchor.spec, best) or best
        valley = Valley(
            shape,
            by_law * math.exp(ERROR * rng.standard_normal() if p != anchor else 0.0),
            GAIN * rng.uniform(*LEVELS) if lora else 0.0,
            GAIN * log_uniform(*STEEP),
            noise,
            log_uniform(1, LATER),
            ("valley", family, k, p.id),
        )
        lr = valley.optimum * log_uniform(1 / FAR, FAR)
        start = Point(p.arm, dataclasses.replace(p.spec, lr=lr, seed=0))
        arms.append(Arm(start, valley.loss, [FULL_STEPS]))
        valleys.append(valley)
    return arms, valleys


def coverage(log: Log, n: int = 30) -> list[Figures]:
    """Run whole searches on simulated runs; count how often intervals hold the truth.

    Later runs of a search depend on earlier results, which may bias intervals.
    """
    rows = []
    for family in SHAPES:
        held: dict[str, list[bool]] = {"lr": [], "gap": []}
        updates, regrets = [], []
        for k in range(n):
            arms, valleys = simulated(family, k)
            trials, results = whole_search(arms, Search(), GAIN)
            updates.append(updates_of(trials, FULL_STEPS))
            for valley, found in zip(valleys, results["arms"]):
                best, gap = found["best_lr"], found["gap_percent"]
                regrets.append(valley.regret(best["value"] or found["best_tried"]))
                gap_percent = 100 * valley.level / GAIN
                for name, e, truth in (("lr", best, valley.optimum), ("gap", gap, gap_percent)):
                    if e and e["low"] is not None and e["high"] is not None:
                        held[name].append(e["low"] <= truth <= e["high"])
        row = {
            **{"family": family, "searches": n, "updates": fmean(updates)},
            "right": fmean(r < RIGHT for r in regrets),
            "intervals": {name: len(v) for name, v in held.items()},
            "held": {name: sum(v) for name, v in held.items()},
            "arms": len(regrets),
        }
        log(str(row))
        rows.append(row)
    return rows


# ---------------------------------------------------------------- real runs


class Case(NamedTuple):
    """A model and a data set on which every method trains runs."""

    overrides: tuple[str, ...]
    fresh: int
    """Fresh seeds of tune; 0: the search ends when the range is known."""
    budget: float
    """Full runs per arm that Optuna gets."""
    settings: tuple[str, ...] = tuple(OPTUNA)


CASES = {
    "tiny": Case(("scale=tiny", "steps=64", "sweep.arms.lora.rank=16"), 2, N_GRID),
    "small": Case(
        (
            *("scale=small", "steps=24", "batch_size=2", "sweep.arms.lora.rank=16"),
            *("dataset.max_length=96", "dataset.too_long=cut_or_skip"),
            *("dataset.n_test=12", "dataset.n_test_curve=12"),
        ),
        0,
        6,
        ("Optuna, range of the grid",),
    ),
}


class Trainer:
    """Trains runs evaluation by evaluation, and remembers the loss at each."""

    def __init__(self, spec: RunSpec, models: Sequence[str], data: Sequence[str]) -> None:
        """Load the base model and the rows of a run."""
        self.base = load_model(spec.model, models, spec.precision)
        self.data = load_data(spec.dataset, data, self.base.tokenizer)
        self.weights = {k: v.clone() for k, v in self.base.model.state_dict().items()}
        self.curves: dict[RunSpec, dict[int, float]] = {}
        self.before = math.nan
        """The loss before training; known when the first run has ended."""
        self._live: tuple[RunSpec | None, Any] = None, None

    def loss(self, spec: RunSpec, step: int) -> float:
        """Return the loss of a run after `step` updates, training no further than that."""
        curve = self.curves.setdefault(spec, {})
        while step not in curve and math.inf not in curve.values():
            if self._live[0] != spec:
                if self._live[1]:
                    self._live[1].close()
                self.base.model.load_state_dict(self.weights)
                self._live = spec, finetune([spec], self.base, self.data)
            event = next(self._live[1])
            for state, result in event.ended.values():
                curve[event.step] = result["test_nll"] if state == "done" else math.inf
                self.before = result["nll_start"]
            if not event.ended and "test_nll" in event.records[spec.id]:
                curve[event.step] = event.records[spec.id]["test_nll"]
        return curve.get(step, math.inf)

    def arm(self, p: Point) -> Arm:
        """Return an arm whose runs are trained when their losses are asked for."""

        def loss(lr: float, steps: int, seed: int) -> float:
            return self.loss(dataclasses.replace(p.spec, lr=lr, seed=p.spec.seed + seed), steps)

        return Arm(p, loss, eval_steps(p.spec.steps))


def real(name: str, log: Log) -> Figures:
    """Let every method train on a real case, from the published learning rates, on one thread."""
    torch.set_num_threads(1)
    case = CASES[name]
    request = compose_request(["+sweep=tune", *case.overrides])
    spec = request.points[0].spec
    trainer = Trainer(spec, request.exec.models_dir, request.exec.data_dir)
    arms = [trainer.arm(start_of(p)) for p in request.points]
    steps, how = spec.steps, Search(seeds=case.fresh)
    trainer.loss(arms[0].start.spec, steps)  # a run of the grid, so that `before` is known
    tuned = whole_search(arms, how, trainer.before)[0] if case.fresh else tune(arms, how)
    trials = {TUNE: tuned, GRID: [plain_grid(arm) for arm in arms]}
    for setting in case.settings:
        trials[setting] = [optuna(a, setting, case.budget, (name, a.start.arm)) for a in arms]
    log(str(trials))
    full = [s for s, c in trainer.curves.items() if steps in c or math.inf in c.values()]
    rows = [row_of(s, trainer.loss(s, steps), trainer.before) for s in full]
    found, methods = truths(pd.DataFrame(rows)), {}
    for method, own in trials.items():
        paths = [course(t, steps, truth) for t, truth in zip(own, found)]
        ends = [updates_of([[run for run in t if run.seed == 0]], steps) for t in own]
        methods[method] = {
            "needed": [_or_none(until_right(p)) for p in paths],
            "ends": ends,
            "regrets": [regret_at(p, e) for p, e in zip(paths, ends)],
        }
    return {
        **{"model": spec.model.name, "dataset": spec.dataset.name, "steps": steps},
        **{"prefix": how.short_steps(steps), "batch_size": spec.batch_size},
        "starts": [a.start.spec.lr for a in arms],
        "arms": [t.figures() for t in found],
        "runs": len(full),
        "methods": methods,
    }


# ---------------------------------------------------------------- the page

SETTINGS = "name|range (start / factor to start x factor)|reduction factor|random first trials"
HALF, OFTEN, COVERED, SLIGHT = 0.5, 0.95, 0.93, 0.1
"""Aims: tune's share of the grid's updates, the share of right choices, the coverage, and the mean
regret in percent of the gain."""


def page(content: Figures) -> str:
    """Render the page."""
    replayed, covered = content.get("replays", []), content.get("coverage", [])
    looked = [
        [r["table"], f"{r['looked']['updates']:.1f}", _percent(r["looked"]["right"], 1)]
        for r in replayed
    ]
    return render(
        "search",
        packages=packages_of(content),
        processor=content["machine"]["processor"],
        **{"right": RIGHT, "n_grid": N_GRID, "apart": APART, "far": FAR},
        **{"noise": NOISE, "levels": LEVELS, "later": LATER},
        aims=aims(content),
        settings=[SETTINGS.split("|"), *([k, *map("{:g}".format, v)] for k, v in OPTUNA.items())],
        tables=_tables(replayed),
        replays=_replays(replayed),
        cells=_cells(content.get("cells", [])),
        looked=[["table", "full runs per arm", "right"], *looked] if looked else [],
        looked_n=max((r["looked"]["replays"] for r in replayed), default=0),
        coverage=_coverage(covered),
        searches=sum(r["searches"] for r in covered),
        cases=[_case(content[name], name) for name in CASES if name in content],
    )


def aims(content: Figures) -> Rows:
    """Return the aims with what was found, one row for each aim and table."""
    rows = [["aim", "where", "found", "met"]]

    def add(aim: str, where: str, found: str, met: bool) -> None:
        rows.append([aim, where, found, "yes" if met else "**no**"])

    def halved(until: str, where: str, mine: float, other: float, name: str = "") -> None:
        shown = f"{mine:.1f} of {other:.0f}" if not name else f"{number(mine, 2)} of {other:.2g}"
        found = f"{shown}{name}: {_percent(mine / other)}"
        aim = f"at most {_percent(HALF)} of the grid's updates, {until}"
        add(aim, where, found, mine / other <= HALF)

    def least(needed: dict[str, Any], names: Sequence[str]) -> tuple[float, str]:
        return min((needed[n], n) for n in names if n in needed)

    def raced(where: str, needed: dict[str, float], what: str) -> None:
        best, name = least(needed, tuple(OPTUNA))
        found = f"{number(needed[TUNE], 2)} against {number(best, 2)} ({name})"
        aim = f"no more updates than Optuna until right, {what}"
        add(aim, where, found, needed[TUNE] <= best)

    for r in content.get("replays", []):
        m, where = r["methods"], r["table"]
        halved("each at its end", where, m[TUNE]["end"], m[GRID]["end"])
        median, most = ({n: _or_inf(v[k]) for n, v in m.items()} for k in ("median", "most"))
        grid, name = least(median, (GRID, SHUFFLED))
        halved("until right", where, median[TUNE], grid, f" ({name})")
        raced(where, median, "median")
        raced(where, most, "90% of searches")
        right = m[TUNE]["right"]
        add(f"right in {_percent(OFTEN)}", where, _percent(right, 1), right >= OFTEN)
    if asked := content.get("cells"):
        where = f"{len(asked)} bases with their data, new"
        tuned, gridded = ([c["methods"][m] for c in asked] for m in (TUNE, GRID))
        spent, plain = (fmean(float(c["end"]) for c in of) for of in (tuned, gridded))
        halved("over all arms", where, spent, plain)
        right, regret = (fmean(c[k] for c in tuned) for k in ("right", "regret"))
        add(f"right in {_percent(OFTEN)}", where, _percent(right, 1), right >= OFTEN)
        aim = f"mean regret below {SLIGHT:g}% of the gain"
        add(aim, where, f"{number(regret, 2)}%", regret < SLIGHT)
    for key, what in (("lr", "the best learning rate"), ("gap", "LoRA's gap")):
        n, held = (
            sum(c[k][key] for c in content.get("coverage", [])) for k in ("intervals", "held")
        )
        if n:
            aim = f"intervals of {what} hold the truth in {_percent(COVERED)}"
            add(aim, "simulated", f"{_percent(held / n, 1)} of {n}", held / n >= COVERED)
    for case in (content[name] for name in CASES if name in content):
        m, where = case["methods"], case["model"]
        halved("each at its end", where, fmean(m[TUNE]["ends"]), fmean(m[GRID]["ends"]))
        needed = {k: fmean(map(_or_inf, m[k]["needed"])) for k in m}
        raced(where, needed, "mean of the arms")
    return rows


def _tables(replays: Sequence[Figures]) -> Rows:
    head = "table|model and data|updates|short runs|seeds|arm|learning rates|optimum"
    rows = [[*head.split("|"), "noise, % of the gain"]]
    for r in replays:
        for k, arm in enumerate(r["arms"]):
            first = [
                *(f"[{r['table']}](../{r['table']}/report.md)", f"{r['model']} on {r['dataset']}"),
                *(str(r[key]) for key in ("steps", "prefix", "seeds")),
            ]
            lrs = f"{arm['lrs']}: {rate(arm['low'])} to {rate(arm['high'])}"
            noise = number(100 * arm["noise"] / arm["gain"], 2)
            own = [arm["arm"], lrs, rate(arm["optimum"]), noise]
            rows.append([*(first if k == 0 else [""] * len(first)), *own])
    return rows


def _replays(replays: Sequence[Figures]) -> Rows:
    head = "table|method|searches|until right: median|90%|at the end: updates|right"
    rows = [head.split("|")]
    for r in replays:
        for k, (method, m) in enumerate(r["methods"].items()):
            cells = [number(m[key], 2) for key in ("median", "most")]
            end = [f"{m['end']:.1f}", _percent(m["right"], 1)]
            rows.append(["" if k else r["table"], method, f"{m['searches']:,}", *cells, *end])
    return rows


def _cells(found: Sequence[Figures]) -> Rows:
    head = "base and data|method|full runs per arm|of the grid's|right|mean regret, % of the gain"
    rows = [head.split("|")]
    for c in found:
        grid = c["methods"][GRID]["end"]
        for k, (method, m) in enumerate(c["methods"].items()):
            cells = [f"{m['end']:.1f}", _percent(m["end"] / grid), _percent(m["right"], 1)]
            rows.append(["" if k else c["unit"], method, *cells, number(m["regret"], 2)])
    return rows if found else []


def _coverage(cells: Sequence[Figures]) -> Rows:
    head = (
        "family|arms|right|full runs per arm|best LR: intervals|hold the truth|gap: intervals|hold"
    )
    rows = [head.split("|")]
    for c in cells:
        found = []
        for key in ("lr", "gap"):
            n, held = c["intervals"][key], c["held"][key]
            found += [str(n), _percent(held / n, 1) if n else "-"]
        right = _percent(c["right"], 1)
        rows.append([c["family"], str(c["arms"]), right, f"{c['updates']:.1f}", *found])
    return rows if cells else []


def _case(found: Figures, name: str) -> Figures:
    """Return title, text and table of a real case."""
    whats = ("until right", "at the end", "regret")
    rows = [["method", *(f"{a['arm']}: {what}" for a in found["arms"] for what in whats)]]
    for method, m in found["methods"].items():
        cells = []
        for needed, end, regret in zip(m["needed"], m["ends"], m["regrets"]):
            cells += [number(needed, 2), f"{end:.1f}", f"{number(regret, 2)}%"]
        rows.append([method, *cells])
    starts = ", ".join(
        f"{a['arm']} {rate(lr)} (optimum {rate(a['optimum'])})"
        for a, lr in zip(found["arms"], found["starts"])
    )
    text = (
        f"Runs of {found['steps']} updates of {found['batch_size']} rows, short runs of "
        f"{found['prefix']}; one seed to the end of tune's range. Every method starts at the "
        f"published learning rate: {starts}. The optimum is the fit of the {found['runs']} full "
        f"runs of all methods. The grid and Optuna train the start in full first, so a start near "
        f"the optimum makes them right at once. Optuna spends {CASES[name].budget:g} full runs per "
        f"arm.{found.get('note', '')}"
    )
    return {"title": f"{found['model']} on {found['dataset']}", "text": text, "rows": rows}


def draw(content: Figures, inputs: str) -> None:
    """Draw the share of searches whose choice is right, over updates."""
    found = []
    for r in content["replays"]:
        shares = {name: m["shares"] for name, m in r["methods"].items()}
        series = [
            Series(name, list(map(float, v)), list(v.values()), style="-")
            for name, v in shares.items()
        ]
        found.append(Panel(r["table"], "full runs per arm", "share that is right", series))
    plots.panels(found, PAGE.figures.with_name("search.png"), inputs)


def _percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f}%"


def _or_inf(value: float | None) -> float:
    return math.inf if value is None else value


PAGE = Page(RESULTS / "search" / "search.json", "README.md", page, draw)


def main(arguments: Sequence[str]) -> None:
    """Measure the named parts, or all, and write the page."""
    parts: dict[str, Callable[..., Any]] = {
        "replays": replays,
        "cells": cells,
        "coverage": coverage,
        **{name: partial(real, name) for name in CASES},
    }
    harness.measure(PAGE, parts, arguments, "optuna", "torch")
