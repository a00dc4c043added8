"""The methods: tune, a plain grid, and Optuna; and what each of them needs."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from analysis.measures.regret import starts_of
from analysis.optimum.fit import fit_all
from analysis.optimum.optimum import Optimum
from analysis.questions.registry import analyse
from analysis.report.report import results_of
from analysis.runs.lr_curves import lr_curves
from benchmarks.harness import Figures
from lorasweep.cli import answer
from lorasweep.config.compose import compose_request
from lorasweep.spec.run import RunSpec
from lorasweep.spec.streams import stream
from lorasweep.store.table import table_row
from lorasweep.sweep.grid import Point, around
from lorasweep.sweep.question import Search
from lorasweep.sweep.request import question
from lorasweep.sweep.search import Look, is_short, search

RIGHT = 1.0
"""A learning rate is right if its regret is below this share of the gain, in percent."""
FAR = 10.0
"""Searches start at most this factor from the optimum."""
FULL_STEPS = 128
"""Updates of a full run of the sweep `tune` on simulated runs."""
N_GRID, APART = 9, 2.0
"""Learning rates of the plain grid, and the factor between neighbours. Its full runs per arm are
the budget of every method."""
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


@dataclass(frozen=True)
class Arm:
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


def truths(table: pd.DataFrame) -> list[Truth]:
    """Fit all runs of a table; full fine-tuning first, then by rank."""
    start = fmean(starts_of(table).values())
    return [Truth(o, start - (o.best_nll or math.nan)) for o in fit_all(lr_curves(table))]


def described(truth: Truth) -> Figures:
    """Describe the fit of an arm."""
    o = truth.optimum
    lrs = np.exp(np.unique(o.curve.x))
    return {
        "arm": o.curve.name,
        "lrs": len(lrs),
        "low": float(lrs[0]),
        "high": float(lrs[-1]),
        "optimum": o.best_lr.value,
        "gain": truth.gain,
        "noise": o.pooled.noise if o.pooled else None,
    }


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

    def train(known: Sequence[Point], new: Sequence[Point]) -> bool:
        for p in new:
            k = next(k for k, arm in enumerate(arms) if _same_arm(arm.start, p))
            first = arms[k].start.spec
            lr, steps, seed = p.spec.lr, p.spec.steps, p.spec.seed - first.seed
            losses[p.id] = loss = arms[k].losses(lr, steps, seed)
            added = steps - seen.get((k, lr, seed), 0)
            seen[k, lr, seed] = steps
            trials[k].append(Trial(lr, seed, added, loss if steps == first.steps else None))
        return True

    search([a.start for a in arms], how, losses.get, train, look or (lambda _: Look(False, {})))
    return trials


def _same_arm(start: Point, p: Point) -> bool:
    return start.arm == p.arm and start.spec.method == p.spec.method


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
    asked = swept().question
    starts, losses, judged = [a.start for a in arms], dict[str, float](), pd.DataFrame()

    def look(points: Sequence[Point]) -> Look:
        nonlocal judged
        full = [p for p in points if not is_short(p, starts)]
        judged = pd.DataFrame([row_of(p.spec, losses[p.id], before) for p in full])
        return Look(*answer.look(judged, asked))

    trials = tune(arms, how, look, losses)
    return trials, results_of(analyse(judged, asked), asked, judged)


class Asked(NamedTuple):
    """The sweep `tune` at scale tiny."""

    points: list[Point]
    question: dict[str, Any]


@cache
def swept() -> Asked:
    """Compose the sweep `tune`."""
    request = compose_request(["+sweep=tune", "scale=tiny", f"steps={FULL_STEPS}"])
    return Asked(list(request.points), question(request))


def row_of(spec: RunSpec, loss: float, before: float) -> dict[str, Any]:
    """Return the row of a full run in a table of runs."""
    ended = {"state": "diverged"} if math.isinf(loss) else {"state": "done", "test_nll": loss}
    result = {"run_id": spec.id, **ended, "nll_start": before, "steps_done": spec.steps}
    return table_row(spec.plain(), result)


def updates_of(trials: Sequence[Sequence[Trial]], steps: int) -> float:
    """Return the mean updates of an arm, in full runs."""
    return fmean(sum(t.updates for t in own) for own in trials) / steps


# ---------------------------------------------------------------- what a method needs


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


def summary(paths: Sequence[Path], ends: Sequence[float]) -> Figures:
    """Summarise many searches of a method; `ends`: the updates after which each one ends."""
    needed = sorted(map(until_right, paths))
    over = [round(0.5 * k, 1) for k in range(1, 2 * N_GRID + 1)]

    def at(share: float) -> float | None:
        found = needed[min(int(share * len(needed)), len(needed) - 1)]
        return found if math.isfinite(found) else None

    return {
        "searches": len(paths),
        "median": at(0.5),
        "most": at(0.9),
        "end": fmean(ends),
        "right": fmean(regret_at(p, e) < RIGHT for p, e in zip(paths, ends)),
        "shares": {str(u): fmean(regret_at(p, u) < RIGHT for p in paths) for u in over},
    }


def end_of(trials: Sequence[Trial], steps: int) -> float:
    """Return the updates of the first seed, in full runs."""
    return sum(t.updates for t in trials if t.seed == 0) / steps
