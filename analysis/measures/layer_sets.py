"""The arms of a `layers` sweep: the matrices and parameters each trains, and its runs."""

import math
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from analysis.inference.estimate import Estimate, exp_of
from analysis.inference.seeds import PooledVariance
from analysis.measures.at_best import AtBest, losses_at_best, over_seeds
from analysis.measures.efficiency import at_best, log_rho
from analysis.measures.regret import Gap, gain_from, starts_of
from analysis.optimum.fit import fit_all
from analysis.optimum.optimum import Optimum
from analysis.runs.learning_curves import Points, learning_curves
from analysis.runs.lr_curves import lr_curves, runs_of

SETS = (
    "attention",
    "mlp",
    "attention+mlp",
    "attention+unembedding",
    "mlp+unembedding",
    "attention+mlp+unembedding",
)
PARAMETERS_AGREE = 0.1
"""Two curves count as equal in size if their trained parameters differ by at most this share."""


@dataclass(frozen=True)
class Arm:
    """One layer set of one task, trained with LoRA or by full fine-tuning of its matrices."""

    optimum: Optimum
    layers: str
    rank: int | None
    n_trainable: int
    points: AtBest[Points]
    nll: float | None
    losses: AtBest[float]
    """Loss at the end by seed, in nats."""
    share: float | None
    """Share of full fine-tuning's squared gradient at the start that lies in the layer set."""


@dataclass(frozen=True)
class Task:
    """All arms on one model and data set."""

    name: str
    full: Arm | None
    lora: list[Arm]
    restricted: list[Arm]
    start: dict[int, float] = field(default_factory=dict)
    """Loss before training by seed, in nats."""

    @property
    def arms(self) -> list[Arm]:
        """All arms, full fine-tuning first."""
        return [*([self.full] if self.full else []), *self.restricted, *self.lora]

    def get(self, layers: str, rank: int | None = None) -> Arm | None:
        """Return LoRA's arm of a layer set and rank (default: the highest); None without one."""
        found = [a for a in self.lora if a.layers == layers and rank in (None, a.rank)]
        return max(found, key=lambda a: a.rank or 0, default=None)


def tasks_of(table: pd.DataFrame) -> list[Task]:
    """Split a table into tasks and arms."""
    optima = fit_all(lr_curves(table))
    points, losses = at_best(table, optima), losses_at_best(optima)
    shares = _shares(table)
    found: dict[str, Task] = {}
    for o, p, ends in zip(optima, points, losses):
        key, full = o.curve.key, o.curve.key["method"] == "fullft"
        layers = str(key["layers"])
        layers = "attention+mlp+unembedding" if layers == "all" else layers
        share = shares.get(o.curve.group, {})
        total = sum(share.get(s, math.nan) for s in layers.split("+")) if share else None
        runs = runs_of(table, o.curve)
        n = int(runs["n_trainable"].iloc[0])
        arm = Arm(o, layers, None if full else int(key["rank"]), n, p, o.best_nll, ends, total)
        task = found.setdefault(o.curve.group, Task(o.curve.group, None, [], []))
        if full and key.get("scope") == "all":
            found[o.curve.group] = replace(task, full=arm, start=starts_of(runs))
        else:
            (task.restricted if full else task.lora).append(arm)
    return list(found.values())


def _shares(table: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Return the share of the squared gradient at step 0 by group and layer set.

    A mean over full fine-tuning's runs.
    """
    full = table[(table["method"] == "fullft") & (table["scope"] == "all")]
    out: dict[str, list[dict[str, float]]] = {}
    for curve in lr_curves(full) if len(full) else []:
        rows = full[
            (full["model"] == curve.key["model"]) & (full["dataset"] == curve.key["dataset"])
        ]
        first = learning_curves(rows).drop_duplicates("run")
        out[curve.group] = list(first["grad_share"].dropna())
    return {
        g: {k: float(np.mean([f[k] for f in fs])) for k in fs[0]} for g, fs in out.items() if fs
    }


def equal_pair(task: Task) -> tuple[Arm, Arm] | None:
    """Return the attention arm and the MLP arm with the most similar numbers of parameters.

    Neither includes the unembedding. None if no pair agrees within PARAMETERS_AGREE.
    """
    known = [a for a in task.lora if a.n_trainable]
    both = [(a, m) for a in known if a.layers == "attention" for m in known if m.layers == "mlp"]
    pairs = [
        (abs(math.log(a.n_trainable / m.n_trainable)), k, a, m) for k, (a, m) in enumerate(both)
    ]
    if not pairs or min(pairs)[0] > math.log(1 + PARAMETERS_AGREE):
        return None
    return min(pairs)[2:]


def log_ratio(a: Arm, b: Arm, full: Arm) -> AtBest[float]:
    """Return ln(rho of `a` / rho of `b`), by seed.

    Infinite or NaN where only a bound of one of them is known.
    """
    return log_rho(a.points, full.points).paired(log_rho(b.points, full.points), lambda x, y: x - y)


def ratio_of(logs: AtBest[float], pooled: PooledVariance | None = None) -> Estimate:
    """Return the ratio, with an interval over seeds and likely best rates.

    Without a value if a seed has only a bound.
    """
    known = bool(logs.best) and all(map(math.isfinite, logs.best.values()))
    return exp_of(over_seeds(logs, pooled)) if known else Estimate(None, n=len(logs.best))


def gap_of(a: Arm, b: Arm, task: Task, full: Arm) -> Gap:
    """Return what arm `a` gives up against arm `b` in nats, beside full fine-tuning's gain."""
    nats = a.losses.paired(b.losses, lambda x, y: x - y)
    gain = gain_from(task.start, full.losses)
    return Gap(a.rank or 0, a.optimum, full.optimum, nats, gain, None)
