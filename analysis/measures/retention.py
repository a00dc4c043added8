"""How much of the pretraining task a model forgets during fine-tuning."""

import math

import numpy as np
import pandas as pd

from analysis.measures.at_best import AtBest, mixed, values_at_best, weights
from analysis.optimum.optimum import Optimum
from analysis.runs.lr_curves import runs_of

STEPS = 200
"""Number of rates at which equal learning is searched for."""


def retained(row: pd.Series) -> dict[str, float]:
    """Return a run's losses on both tasks, and the loss it gained on the old one.

    In nats; empty if that was not measured.
    """
    if pd.isna(row["retain_nll"]):
        return {}
    return {
        "test": float(row["test_nll"]),
        "after": float(row["retain_nll"]),
        "before": float(row["retain_start"]),
        "lost": float(row["retain_nll"] - row["retain_start"]),
    }


def frontier(table: pd.DataFrame, o: Optimum, seed: int | None = None) -> list[dict[str, float]]:
    """Return what a curve's finished runs learned and forgot, by increasing rate.

    Args:
        seed: of this seed only; None: the mean over seeds.
    """
    found: dict[float, list[dict[str, float]]] = {}
    for _, row in runs_of(table[table["status"] == "done"], o.curve).iterrows():
        if seed in (None, row["seed"]) and (losses := retained(row)):
            found.setdefault(float(row["lr"]), []).append(losses)
    return [
        {"lr": lr, **{k: float(np.mean([v[k] for v in found[lr]])) for k in found[lr][0]}}
        for lr in sorted(found)
    ]


def at_equal_learning(
    table: pd.DataFrame, full: Optimum, tuned: Optimum
) -> AtBest[dict[str, float]]:
    """Return what full fine-tuning forgets when it has learned as much as tuned LoRA, by seed.

    That is at the lowest rate, up to its best one, at which its loss on the new task equals tuned
    LoRA's of the same seed. Seeds without such a rate are left out. A likely rate is left out if
    the seeds that have one there differ from those at the best rate: the mean would otherwise be
    over seeds selected by what they learned.
    """
    (runs,) = values_at_best(table, [tuned], retained)
    paths = {s: {v["lr"]: v for v in frontier(table, full, s)} for s in runs.best}
    full_lr = full.best_lr.value
    if full_lr is None:
        return AtBest({})

    def equal(by_seed: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
        found = {
            s: _where_equal(paths[s], full_lr, mine) for s, mine in by_seed.items() if paths.get(s)
        }
        return {s: v for s, v in found.items() if v}

    best = equal(runs.best)
    return AtBest(
        best, tuple(w if w.keys() == best.keys() else {} for w in map(equal, runs.likely))
    )


def _where_equal(
    path: dict[float, dict[str, float]], best: float, mine: dict[str, float]
) -> dict[str, float]:
    """Return full fine-tuning's losses at the lowest rate at which it has learned as much as LoRA.

    Interpolated in ln(rate), up to the best rate; empty if there is no such rate.

    Args:
        path: full fine-tuning's losses by rate.
        mine: LoRA's losses.
    """
    tried = [math.log(lr) for lr in path]
    heights = {math.log(lr): v["test"] for lr, v in path.items()}
    before: dict[str, float] = {}
    for x in np.linspace(min(tried), math.log(best), STEPS):
        share = weights(tried, float(x), heights)
        here = {
            k: v
            for k, v in mixed({math.log(lr): v for lr, v in path.items()}, share).items()
            if k != "lr"
        }
        if here["test"] <= mine["test"]:
            return {**here, "lr": math.exp(x), "lora": mine["lost"]} if before else {}
        before = here
    return {}
