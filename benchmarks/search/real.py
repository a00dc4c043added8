"""Real runs: every method trains from the same start, on one machine with one thread."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch

from benchmarks.harness import Figures, Log
from benchmarks.search.methods import (
    N_GRID,
    OPTUNA,
    Arm,
    Losses,
    Trial,
    course,
    described,
    end_of,
    optuna,
    plain_grid,
    regret_at,
    row_of,
    truths,
    tune,
    until_right,
    whole_search,
)
from lorasweep.cli.points import start_of
from lorasweep.config.compose import compose_request
from lorasweep.data.load import load as load_data
from lorasweep.launch.trainer import finetune
from lorasweep.models.load import load as load_model
from lorasweep.spec.evaluations import eval_steps
from lorasweep.spec.run import RunSpec
from lorasweep.sweep.question import Search


@dataclass(frozen=True)
class Case:
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

    def ended(self, steps: int) -> list[RunSpec]:
        """Return the runs that have made `steps` updates, or diverged."""
        return [
            s for s, curve in self.curves.items() if steps in curve or math.inf in curve.values()
        ]


def real(name: str, log: Log) -> Figures:
    """Let every method train on a real case, from the published learning rates."""
    torch.set_num_threads(1)
    case = CASES[name]
    request = compose_request(["+sweep=tune", *case.overrides])
    trainer = Trainer(request.points[0].spec, request.exec.models_dir, request.exec.data_dir)
    points = [start_of(p) for p in request.points]
    steps = points[0].spec.steps
    arms = [Arm(p, _trained(trainer, p.spec), eval_steps(steps)) for p in points]
    trainer.loss(points[0].spec, steps)  # a run of the grid, so that `before` is known
    trials: dict[str, list[list[Trial]]] = {}
    how = Search(seeds=case.fresh)
    trials["tune"] = whole_search(arms, how, trainer.before)[0] if case.fresh else tune(arms, how)
    log(f"tune: {trials['tune']}")
    trials["plain grid"] = [plain_grid(arm) for arm in arms]
    log(f"grid: {trials['plain grid']}")
    for setting in case.settings:
        trials[setting] = [optuna(arm, setting, case.budget, (name, arm.start.arm)) for arm in arms]
        log(f"{setting}: {trials[setting]}")
    ended = {spec: trainer.loss(spec, steps) for spec in trainer.ended(steps)}
    found = truths(pd.DataFrame([row_of(s, v, trainer.before) for s, v in ended.items()]))
    methods = {}
    for method, own in trials.items():
        paths = [course(t, steps, truth) for t, truth in zip(own, found)]
        ends = [end_of(t, steps) for t in own]
        methods[method] = {
            "needed": [u if math.isfinite(u) else None for u in map(until_right, paths)],
            "ends": ends,
            "regrets": [regret_at(p, e) for p, e in zip(paths, ends)],
        }
    spec = points[0].spec
    return {
        "model": spec.model.name,
        "dataset": spec.dataset.name,
        "steps": steps,
        "prefix": how.short_steps(steps),
        "batch_size": spec.batch_size,
        "starts": [p.spec.lr for p in points],
        "arms": [described(t) for t in found],
        "runs": len(ended),
        "methods": methods,
    }


def _trained(trainer: Trainer, spec: RunSpec) -> Losses:
    def loss(lr: float, steps: int, seed: int) -> float:
        run = dataclasses.replace(spec, lr=lr, seed=spec.seed + seed)
        return trainer.loss(run, steps)

    return loss
