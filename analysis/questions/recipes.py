"""Question: how much popular recipes lose against tuned LoRA, and how much fine-tuning forgets.

A recipe's cost is its loss at the learning rate that it prescribes minus tuned LoRA's loss at the
optimum, as a share of tuned LoRA's gain over the base model. Losses are paired by seed.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from analysis.inference.decide import MIN_SEEDS, Gate, GateCode
from analysis.inference.estimate import number, rate, signed
from analysis.inference.rows import Row
from analysis.measures import at_best
from analysis.measures.speed import curves_at_best, rho
from analysis.optimum.fit import Optimum
from analysis.questions import base
from analysis.runs.curves import full_names, runs_of

EVERY_LAYER = "attention+mlp+unembedding"
RECIPES = ["attention_at_full_lr", "alpha_twice_rank", "default_rate", "original", "ten_times"]
STEPS = 200
"""Number of LRs of full fine-tuning among which equal learning with LoRA is searched for."""
Losses = dict[str, float]
"""Losses in nats: `test` on the new task; `before` and `after` fine-tuning on the pretraining task;
`lost` is the increase of the latter."""


@dataclass(frozen=True)
class Recipes(base.Condition):
    """The recipes, tuned LoRA and full fine-tuning on a model's main data set."""

    main: list[Optimum]
    """Curves on the main data set; `few` are those on the data set of few rows."""
    few: list[Optimum]

    @property
    def missing(self) -> str:
        return "fullft" if self.full is None else "" if self.tuned else "lora, tuned"

    @property
    def keys(self) -> list[dict[str, Any]]:
        return [o.curve.key for o in self.main]

    @property
    def rests(self) -> list[Optimum]:
        return [self.full, self.tuned]

    def one(self, **wanted: Any) -> Optimum | None:
        """Return the curve with these settings that has the most runs; see `check_one`."""

        def setting(o: Optimum, k: str) -> Any:
            value = o.curve.key.get(k)
            return EVERY_LAYER if k == "layers" and value == "all" else value

        found = [o for o in self.main if all(setting(o, k) == v for k, v in wanted.items())]
        one = base.check_one(found, "rank")  # of as many runs, the highest rank
        return max(one, key=lambda o: (len(o.curve.x), base.rank_of(o)), default=None)

    @cached_property
    def full(self) -> Optimum | None:
        return base.full_of(self.main)

    @cached_property
    def tuned(self) -> Optimum | None:
        return self.one(method="lora", layers=EVERY_LAYER, alpha=32.0, schedule="constant")

    @property
    def gain(self) -> float:
        """How much tuned LoRA lowers the loss of the base model, in nats."""
        return self.tuned.curve.nll_start - (self.tuned.best_nll or math.nan)

    @cached_property
    def recipes(self) -> dict[str, at_best.Cost]:
        """The cost of each recipe, as a share of tuned LoRA's gain."""
        one, rank = self.one, float(self.tuned.curve.key["rank"])
        of_full = at_best.best_and_draws(self.full)
        of_tuned = at_best.best_and_draws(self.tuned)
        every = {"layers": EVERY_LAYER, "schedule": "constant"}
        attention = one(method="lora", layers="attention", schedule="constant")
        arms: dict[str, tuple[Optimum | None, list[float]]] = {
            "attention_at_full_lr": (attention, of_full),
            "alpha_twice_rank": (one(method="lora", alpha=2 * rank, **every), of_tuned),
            "default_rate": (one(method="lora", layers="attention+mlp"), [2e-4]),
            "original": (one(method="lora", schedule="linear"), [2e-4]),
            "ten_times": (self.tuned, [10 * lr for lr in of_full]),
        }
        (reference,), gain = at_best.losses_at_best([self.tuned]), self.gain
        return at_best.costs_at(
            arms, lambda _, losses: losses.paired(reference, lambda a, b: (a - b) / gain)
        )

    @property
    def few_ends(self) -> list[Optimum]:
        """The lowest and the highest rank on few rows; empty with fewer than two ranks."""
        lora = base.lora_of(self.few)
        return [lora[0], lora[-1]] if len(lora) > 1 else []

    # ---- the pretraining task

    @property
    def is_retained(self) -> bool:
        """Whether the pretraining task was evaluated."""
        return "retain_nll" in self.runs and not self.runs["retain_nll"].isna().all()

    @cached_property
    def retained(self) -> dict[int, at_best.AtBest[Losses]]:
        """id of an optimum -> losses on both tasks at it, by seed."""
        found = at_best.values_at_best(self.runs, self.main, losses_of)
        return dict(zip(map(id, self.main), found))

    def lost(self, o: Optimum) -> at_best.AtBest[float]:
        """Return the increase of the loss on the pretraining task at a curve's optimum."""
        return self.retained[id(o)].map(lambda v: v["lost"])

    @cached_property
    def equal(self) -> at_best.AtBest[Losses]:
        """Losses of full fine-tuning where it has learned as much as tuned LoRA, by seed.

        The LR is the lowest one, up to full fine-tuning's optimum, with tuned LoRA's loss on the
        new task. Seeds without such an LR are left out. A draw is left out if it has other seeds
        than the optimum: the mean would be over seeds selected by their losses.
        """
        (runs,) = at_best.values_at_best(self.runs, [self.tuned], losses_of)
        full_lr = self.full.best_lr.value
        if full_lr is None:
            return at_best.AtBest({})
        paths: dict[int, dict[float, Losses]] = {s: {} for s in runs.best}
        mine = runs_of(self.runs[self.runs["status"] == "done"], self.full.curve)
        for _, row in mine.sort_values("lr").iterrows():
            if row["seed"] in paths and (losses := losses_of(row)):
                paths[row["seed"]][math.log(row["lr"])] = losses

        def where_equal(by_lr: dict[float, Losses], mine: Losses) -> Losses:
            """Return the losses at that LR, interpolated in ln(lr); empty if there is none."""
            heights = {x: v["test"] for x, v in by_lr.items()}
            before: Losses = {}
            for x in np.linspace(min(by_lr), math.log(full_lr), STEPS):
                here = at_best.mixed(by_lr, at_best.weights(list(by_lr), float(x), heights))
                if here["test"] <= mine["test"]:
                    return {**here, "lr": math.exp(x), "lora": mine["lost"]} if before else {}
                before = here
            return {}

        def equal(by_seed: dict[int, Losses]) -> dict[int, Losses]:
            found = {s: where_equal(paths[s], v) for s, v in by_seed.items() if paths.get(s)}
            return {s: v for s, v in found.items() if v}

        best = equal(runs.best)
        draws = (w if w.keys() == best.keys() else {} for w in map(equal, runs.draws))
        return at_best.AtBest(best, tuple(draws))

    def gates_on_equal(self) -> list[Gate]:
        """List the gates: too few seeds in which full fine-tuning learned as much as LoRA."""
        both = self.lost(self.tuned).best.keys() & self.lost(self.full).best.keys()
        needed, n = max(len(both), MIN_SEEDS), len(self.equal.best)
        few = [] if n >= needed else [Gate(GateCode.FEW_SEEDS_AS_GOOD, f"{n} of {needed}")]
        return base.gates_on(self.rests) + few


def losses_of(row: pd.Series) -> Losses:
    """Return a run's losses on both tasks; empty if the pretraining task was not evaluated."""
    if pd.isna(row["retain_nll"]):
        return {}
    test, after, before = (float(row[k]) for k in ("test_nll", "retain_nll", "retain_start"))
    return {"test": test, "after": after, "before": before, "lost": after - before}


def conditions(table: pd.DataFrame) -> list[Recipes]:
    """Return the one condition of a model, on the data set with the most arms."""
    arms = table[["dataset", "method", "layers", "alpha", "schedule"]].drop_duplicates()
    main = str(arms.groupby("dataset").size().idxmax())
    is_main = table["dataset"] == main
    optima = base.fit(table[is_main])
    few = [] if is_main.all() else base.fit(table[~is_main])
    base.check_same((o.curve for o in few), "rank")
    return [Recipes(f"{table['model'].iloc[0]} on {main}", table, optima + few, optima, few)]


def _cost(name: str) -> base.Estimand:
    """Declare the cost of a recipe."""
    return base.Estimand(
        name,
        lambda c: c.recipes[name].estimate,
        lambda c: base.gates_on(c.rests),
        margin_gates=lambda c, high: c.recipes[name].gates(high),
    )


PRETRAINING = "the pretraining task"
ESTIMANDS = [
    *map(_cost, RECIPES),
    base.Estimand(
        "small_data_rank",
        lambda c: (
            rho((ends := curves_at_best(c.runs, c.few_ends))[0], ends[1]) if c.few_ends else None
        ),
        lambda c: base.gates_on_speed(c.few_ends),
        absent="two ranks on few rows",
        log=True,
        used=lambda c: c.few_ends,
        at=lambda c: (
            f"ranks {' and '.join(str(base.rank_of(o)) for o in c.few_ends)} on few rows, "
            f"{c.full.curve.key['steps']:.0f} updates"
        ),
    ),
    base.Estimand(
        "retention",  # tuned LoRA's loss on the pretraining task over full fine-tuning's (`lost`)
        lambda c: (
            at_best.over_seeds(c.lost(c.tuned).paired(c.lost(c.full), lambda x, y: x / y))
            if c.is_retained
            else None
        ),
        lambda c: base.gates_on(c.rests),
        absent=PRETRAINING,
    ),
    base.Estimand(
        "retention_equal",  # the same, with full fine-tuning at the LR of `equal`
        lambda c: (
            at_best.over_seeds(c.equal.map(lambda v: v["lora"] / v["lost"]))
            if c.is_retained
            else None
        ),
        Recipes.gates_on_equal,
        absent=PRETRAINING,
        at=lambda c: f"{len(c.equal.best)} seed(s), {c.full.curve.key['steps']:.0f} updates",
    ),
]


def report(asked: base.Asked, c: Recipes) -> tuple[list[Row], list[base.Section]]:
    """Return every estimand, and the sections on the recipes' costs and on forgetting."""
    rows: list[list[Any]] = []
    for name, r in c.recipes.items():
        o, share, own, near = r.optimum, r.estimate, None, []
        if o is not None and o.best_nll is not None and o is not c.tuned:
            own = o.best_nll - c.tuned.best_nll
        if any(r.near_diverged):
            of_draws = f"{np.mean(r.near_diverged):.0%}"
            near = [f"next to an LR that diverged, in {of_draws} of the posterior draws"]
        read_at = ", ".join([*map(rate, r.read_at), *near]) or "-"
        nats = signed(None if share.value is None else share.value * c.gain)
        lr, name = rate(r.lrs[0]) if r.lrs else "-", name.replace("_", " ")
        rows.append([name, lr, read_at, nats, share, share.n, signed(own)])
    head = (
        "recipe | LR | read at | regret (nats) | share of tuned LoRA's gain [95%] | seeds | "
        "at its own optimal LR (nats)"
    )
    text = (
        f"Tuned LoRA (rank {float(c.tuned.curve.key['rank']):g}) gains {number(c.gain)} nats over "
        "the base. A recipe whose LR was not tried is interpolated in ln(lr) between the LRs "
        "around it. Next to an LR that diverged the nearest LR counts, and the recipe loses at "
        "least that much."
    )
    costs = base.Section.of("Recipes", head, rows, [text])
    rows, at = [], ("test", "after", "before")
    pooled = at_best.pooled_over(c.lost(o) for o in c.main) if c.is_retained else None
    names = full_names([o.curve for o in c.main])
    for o, name in zip(c.main, names) if c.is_retained else ():
        if runs := c.retained[id(o)].best.values():
            losses = [number(float(np.mean([v[k] for v in runs])), 4) for k in at]
            forgotten = at_best.over_seeds(c.lost(o), pooled)
            rows.append([name, rate(o.best_lr.value), *losses, forgotten])
    for seed, v in c.equal.best.items() if c.is_retained else ():
        name = (
            "full fine-tuning at the lower LR at which it has learned as much as tuned LoRA: seed "
            f"{seed}, for which LoRA forgot {number(v['lora'])}"
        )
        rows.append([name, rate(v["lr"]), *(number(v[k], 4) for k in at), v["lost"]])
    head = (
        "curve | at LR | test NLL on the new task | NLL on the pretraining task | before | "
        "forgotten (nats) [95%]"
    )
    return [], [costs, base.Section.of("What is forgotten", head, rows)]


QUESTION = base.Question(ESTIMANDS, conditions, report, split_by=("model",))
