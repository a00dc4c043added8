"""Question: does LoRA need 2/3 of full fine-tuning's compute, per update and to the same loss.

Operations are counted by the study's formula (`flops_ratio`), at the model's real shapes. The goal
is full fine-tuning's loss after SHARE of the updates. Each method uses the learning rate that is
optimal for runs of the length at which it reaches the goal.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from analysis.inference.decide import Gate, GateCode
from analysis.inference.estimate import Estimate, exactly, exp_of, from_draws
from analysis.measures.at_best import AtBest, pooled_over, values_at_best
from analysis.measures.speed import curves_at_best, log_rho, rho
from analysis.optimum.fit import Optimum
from analysis.questions import base
from analysis.runs.learning_curves import (
    Points,
    at_step,
    learning_curves,
    steps_seen,
    while_unsolved,
)
from analysis.runs.lr_curves import runs_of

SHARE = 1 / 6
FASTEST = 0.1
"""Quantile of an arm's update times that is compared; other work only slows a run down."""
QUIET = 1.5
"""Largest ratio of the 90% to the 10% quantile of an arm's update times on an idle machine."""
MIN_RUNS = 5
"""Fewest runs from which the update time of an arm is estimated."""


def flops_ratio(spec: dict[str, Any], n_trainable: int) -> float:
    """Return a LoRA update's number of operations over that of a full fine-tuning update.

    (4 P + 6 T) / 6 P, with P weights in matrix products and T trained weights (source: the study).
    """
    m = spec["model"]
    h, q, kv = m["hidden_size"], m["n_heads"] * m["head_size"], m["n_kv_heads"] * m["head_size"]
    p = m["n_layers"] * (2 * h * q + 2 * h * kv + 3 * h * m["mlp_size"]) + h * m["vocab_size"]
    return (4 * p + 6 * n_trainable) / (6 * p)


@dataclass(frozen=True)
class Reached:
    """How a rank reaches the goal: the optimum and learning curves of runs of `length` updates."""

    optimum: Optimum
    length: int
    points: AtBest[Points]


@dataclass(frozen=True)
class Arms(base.TwoArms):
    """Full fine-tuning and the ranks of one model and data set."""

    @cached_property
    def last(self) -> int:
        return int(self.runs["steps"].max())

    @cached_property
    def short(self) -> int:
        """Updates after which full fine-tuning has the goal's loss; 0 if none were evaluated."""
        seen = (s for s in steps_seen(self.runs) if s <= self.last * SHARE)
        return max(seen, default=0)

    @cached_property
    def goal(self) -> tuple[Optimum | None, AtBest[Points]]:
        """Full fine-tuning's optimum after `short` updates, and its learning curves by seed."""
        if not self.short:
            return None, AtBest({})
        optima = base.fit(at_step(self.runs, self.short))
        full = base.full_of(optima)
        if full is None:  # no such run came as far
            return None, AtBest({})
        k = next(k for k, o in enumerate(optima) if o is full)
        return optima[k], self.read(optima, self.short, self.short)[k]

    def read(self, optima: Sequence[Optimum], length: int, until: int) -> list[AtBest[Points]]:
        """Return learning curves to update `until`, at the optima of runs of `length` updates."""
        longer = at_step(self.runs, until).assign(steps=length)  # to match the optima's curves
        learned = learning_curves(longer).query("step >= 1")
        points = {
            run: dict(zip(c["step"].tolist(), c["test_nll"].tolist()))
            for run, c in learned.groupby("run")
        }
        found = values_at_best(longer, optima, lambda run: points.get(run.name, {}))
        return [runs.map(lambda by_step: sorted(by_step.items())) for runs in found]

    @cached_property
    def reached(self) -> dict[int, Reached]:
        """The shortest runs of every rank that reach the goal's loss; its whole runs if none do.

        A rank's length is the first evaluated step at which runs, at the optimum for that length,
        have reached the loss. Learning curves end at twice that length, since single seeds may
        reach it later. All optima of one length are fitted together, so that they share one noise
        level.
        """

        def lowest(o: Optimum) -> float:
            """Return the loss at the optimum; without it, the lowest mean loss at a usable LR."""
            c = o.curve
            means = (float(np.mean(c.y[c.usable & (c.x == x)])) for x in set(c.x[c.usable]))
            return min(means, default=np.inf) if o.best_nll is None else o.best_nll

        at_goal = [points[-1][1] for points in self.goal[1].best.values()]
        loss = float(np.mean(at_goal)) if at_goal else -np.inf
        found: dict[int, Reached] = {}
        seen = steps_seen(self.runs)
        for length in seen:
            optima = base.fit(at_step(self.runs, length))
            there = {
                r: k for k, o in enumerate(optima) if (r := base.rank_of(o)) and lowest(o) <= loss
            }
            if there.keys() - found.keys():
                twice = next((s for s in seen if s >= 2 * length), seen[-1])
                each = self.read(optima, length, twice)
                found = {r: Reached(optima[k], length, each[k]) for r, k in there.items()} | found
        for o, runs in zip(self.optima, curves_at_best(self.runs, self.optima)):
            if base.rank_of(o):
                found.setdefault(base.rank_of(o), Reached(o, self.last, runs))
        return found

    def seconds(self, method: str, rank: int | None = None) -> list[float]:
        """Return the median seconds per update of an arm's runs, where recorded."""
        if "step_s" not in self.runs:
            return []
        part = self.runs[(self.runs["method"] == method) & self.runs["step_s"].notna()]
        return list((part if rank is None else part[part["rank"] == rank])["step_s"])

    @cached_property
    def costs(self) -> dict[int, dict[str, Estimate]]:
        """Costs relative to full fine-tuning's, by rank and estimand."""
        goal, reached = self.goal[1], self.reached
        pooled = pooled_over(log_rho(goal, r.points) for r in reached.values())
        found = {}
        for rank, o in self.lora.items():
            row = runs_of(self.runs, o.curve).iloc[0]
            operations = exactly(flops_ratio(json.loads(row["spec"]), int(row["n_trainable"])))
            seconds = ratio_of_times(self.seconds("lora", rank), self.seconds("fullft"))
            steps = rho(goal, reached[rank].points, pooled)  # LoRA's steps over full fine-tuning's
            found[rank] = {
                "flops_per_step": operations,
                "seconds_per_step": seconds,
                "steps": steps,
                "flops_to_loss": _times(steps, operations),
                "seconds_to_loss": _times(steps, seconds),
            }
        return found

    @property
    def ends(self) -> list[Optimum]:
        """Full fine-tuning's optimum at the goal, and the highest rank's optimum in `reached`."""
        return [o for o in (self.goal[0], self.reached[self.top].optimum) if o is not None]

    @property
    def seeds(self) -> int:
        return base.fewest_seeds(self.ends)

    def gates_to_loss(self) -> list[Gate]:
        aim, goal = self.goal
        shorter = "full fine-tuning's shorter runs"
        gates = base.gates_on_speed(self.ends) if aim else base.missing(shorter)
        highest = self.reached[self.top].points.best
        both = highest.keys() & goal.best.keys()
        if any(highest[s][-1][1] > goal.best[s][-1][1] for s in both):
            gates = [*gates, Gate(GateCode.NOT_REACHED)]
        return gates

    def gates_on_time(self) -> list[Gate]:
        """Return a gate if an arm's update times vary too much to reflect only the method."""
        arms = [v for v in (self.seconds("fullft"), self.seconds("lora", self.top)) if v]
        most = max((float(np.quantile(v, 0.9) / np.quantile(v, 0.1)) for v in arms), default=1.0)
        return [] if most <= QUIET else [Gate(GateCode.BUSY, f"{most:.2g}")]


def ratio_of_times(a: list[float], b: list[float]) -> Estimate:
    """Return the ratio of two arms' 10% quantiles of time, bootstrapped over runs."""
    if len(a) < MIN_RUNS or len(b) < MIN_RUNS:
        return base.UNKNOWN
    rng = np.random.default_rng(20251125)
    x, y = (np.quantile(rng.choice(v, (4000, len(v))), FASTEST, axis=1) for v in (a, b))
    return exp_of(from_draws(np.log(x) - np.log(y), len(a) + len(b)))


def _times(a: Estimate, b: Estimate) -> Estimate:
    """Return the product of two independent estimates; a bound stays a bound."""
    if a.value is None or b.value is None:
        low, high = (None if v is None or b.value is None else v * b.value for v in (a.low, a.high))
        return Estimate(None, low, high, n=a.n, flags=a.flags)
    if a.draws is None or b.draws is None:
        return Estimate(a.value * b.value, n=a.n)
    few = b.draws if len(b.draws) == len(a.draws) else np.full(len(a.draws), b.value)
    logs = np.log(a.draws) + np.log(np.random.default_rng(7).permutation(few))
    spread = a.spread and a.spread.sharing(float(np.std(np.log(few))))
    return exp_of(from_draws(logs, a.n, spread=spread))


def conditions(table: pd.DataFrame) -> list[Arms]:
    """Return the one condition of a model and data set."""
    runs, note = while_unsolved(table)
    optima = base.fit(runs)
    return [Arms(optima[0].curve.group, runs, optima, note)]


def _cost(
    name: str, gates: Callable[[Arms], Sequence[Gate]], place: str = ""
) -> base.Estimand[Arms]:
    """Declare a cost of the highest rank relative to full fine-tuning's."""
    return base.Estimand(
        name,
        lambda c: c.costs[c.top][name],
        gates,
        log=True,
        read=lambda c: f"rank {c.top}" + place.format(c),
    )


TO_LOSS = ", the loss of full fine-tuning after {0.short} of {0.last} updates"
ESTIMANDS = [
    _cost("flops_per_step", lambda c: []),
    _cost("seconds_per_step", Arms.gates_on_time),
    _cost("flops_to_loss", Arms.gates_to_loss, TO_LOSS),
    _cost("seconds_to_loss", lambda c: c.gates_to_loss() + c.gates_on_time(), TO_LOSS),
]


def measures(found: Sequence[Arms], asked: base.Asked) -> dict[str, Any]:
    """Return all costs by rank, and the lengths at which ranks reach the loss."""
    (c,) = found
    return {"compute": c.costs, "lengths": {str(r): v.length for r, v in c.reached.items()}}


def sections(found: Sequence[Arms], asked: base.Asked) -> list[base.Section]:
    """Return the costs by rank, and their figure."""
    (c,) = found
    rows = []
    for rank, cost in c.costs.items():
        lr, length = base.best_lr(c.reached[rank].optimum), c.reached[rank].length
        per_update = [cost["flops_per_step"].value, cost["seconds_per_step"]]
        to_loss = [cost[k] for k in ("steps", "flops_to_loss", "seconds_to_loss")]
        rows.append([rank, *per_update, lr, length, *to_loss])
    head = (
        "rank | operations per update | seconds per update [95%] | optimal LR to FullFT's loss "
        "[95%] | of runs of | updates to it [95%] | operations to it [95%] | seconds to it [95%]"
    )
    text = [
        f"The claims are judged at rank {c.top}. The loss to be reached is full fine-tuning's "
        f"after {c.short} updates; if a rank does not reach it, the lowest loss that both reach. "
        "Each method uses the learning rate that is optimal for runs of the length at which it "
        "reaches that loss. Peak memory is measured in the benchmark and compared with the plan's "
        "estimate.",
        c.note,
    ]
    return [base.Section.of("Compute", head, rows, text)]


QUESTION = base.Question(ESTIMANDS, conditions, measures, sections, split_by=base.TASK)
