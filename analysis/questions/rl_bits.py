"""Question: is rank 1 enough in reinforcement learning because an episode carries few bits.

A bandit's labels have 4 bits per context. Rank 1 should match full fine-tuning while its capacity,
at 2 bits per parameter, suffices for the labels, and fall behind with more labels. Supervised runs,
which learn the same labels by cross-entropy, show how much the adapter can store. If some LoRA runs
adapt the unembedding and some do not, those without are judged; the others show its effect.
"""

import functools
import json
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from analysis.inference.estimate import Estimate, exp_of, number, with_interval
from analysis.inference.gates import Gate, GateCode
from analysis.measures.at_best import AtBest, over_seeds
from analysis.measures.regret import BITS_PER_PARAMETER
from analysis.measures.rewards import gates_on_stable, reward_of, stable, values_at_stable
from analysis.optimum.optimum import Optimum
from analysis.questions import base, rl
from analysis.runs.lr_curves import runs_of
from analysis.runs.table import TableError

ACTIONS, LABEL_BITS = 16, 4
"""Labels to choose from, and their bits (lorasweep/data/synthetic/facts.py)."""
ALL = 0.99
"""A curve that knows more than this share of the labels' bits cannot gain from other LRs."""
Bits = dict[int, Estimate]
"""Rank -> bits; rank 0 is full fine-tuning."""


def share_known(o: Optimum) -> AtBest[float]:
    """Return the share (at most 1) of the labels' bits known at the best stable LR, by seed."""
    found = stable(o.curve)
    if found is None:
        return AtBest({})
    return found.loss.map(lambda nll: min(1, 1 - nll / math.log(ACTIONS)))


@dataclass(frozen=True)
class Contexts(rl.Rewarded):
    """One number of contexts: curves of rewarded runs and of supervised ones."""

    contexts: int
    rewarded: list[Optimum]
    supervised: dict[int, Optimum]
    """Rank -> curve; rank 0 is full fine-tuning."""
    with_unembedding: dict[int, Optimum]
    """Rank -> curve of rewarded runs that adapt the unembedding too; empty if all LoRA runs do."""

    @cached_property
    def by_rank(self) -> dict[int, Optimum]:
        """Rank -> curve of rewarded runs; rank 0 is full fine-tuning."""
        return _by_rank(self.rewarded)

    @property
    def rests(self) -> list[Optimum]:
        return self.optima

    @property
    def seeds(self) -> int:
        return base.fewest_seeds(list(self.by_rank.values()))

    @cached_property
    def load(self) -> float | None:
        """The labels' bits divided by the capacity of rank 1; None without rank 1."""
        if 1 not in self.lora:
            return None
        size = float(runs_of(self.runs, self.lora[1].curve)["n_trainable"].mean())
        return LABEL_BITS * self.contexts / (BITS_PER_PARAMETER * size)

    @property
    def is_complete(self) -> bool:
        """Whether there are rewarded runs of full fine-tuning and of rank 1."""
        return {0, 1} <= self.by_rank.keys()

    @property
    def is_below(self) -> bool:
        """Whether rank 1 has the capacity for the labels."""
        return self.load is not None and self.load < 1

    @cached_property
    def episode(self) -> Bits:
        """Bits learned per sampled completion, as a mean over the whole run."""

        def learned(run: pd.Series) -> dict[str, float]:
            bits = json.loads(run["result"]).get("bits_per_answer")
            return {"bits": math.log(bits)} if bits else {}

        runs = {r: values_at_stable(self.runs, o.curve, learned) for r, o in self.by_rank.items()}
        return {r: exp_of(over_seeds(v.map(lambda v: v["bits"]))) for r, v in runs.items()}

    @cached_property
    def bits(self) -> Bits:
        """Lower bound of the bits learned: fewer bits about the labels cannot earn this reward."""
        found = {}
        for r, e in self.episode.items():
            key = self.by_rank[r].curve.key
            completions = int(key["batch_size"]) * int(key["steps"])
            found[r] = base.mapped(e, functools.partial(operator.mul, completions))
        return found

    @cached_property
    def supervised_bits(self) -> Bits:
        """Bits learned by cross-entropy: the labels' bits minus the loss."""
        total = LABEL_BITS * self.contexts
        return {
            r: over_seeds(share_known(o).map(lambda share: total * share))
            for r, o in self.supervised.items()
        }

    def without_unembedding(self, rank: int) -> Estimate | None:
        """Return the reward without an adapter of the unembedding minus that with it, in points."""
        if rank not in self.with_unembedding or rank not in self.lora:
            return None
        without, adapted = self.lora[rank], self.with_unembedding[rank]
        return over_seeds(reward_of(without).minus(reward_of(adapted)))

    def gates_on_unembedding(self, rank: int) -> list[Gate]:
        """List the gates on `without_unembedding`."""
        return gates_on_stable([self.lora[rank].curve, self.with_unembedding[rank].curve])

    def behind_if_supervised(self) -> Estimate | None:
        """Return the labels' bits that rank 1 knows minus full fine-tuning's, in percent of all."""
        if not self.supervised.keys() >= {0, 1}:
            return None
        one, full = (share_known(self.supervised[r]) for r in (1, 0))
        return over_seeds(one.paired(full, lambda a, b: 100 * (a - b)))

    def gates_if_supervised(self) -> list[Gate]:
        """List the gates. A curve that knows more than ALL may have its best LR at an edge."""
        both = [self.supervised[r] for r in (0, 1)]
        learning = [o.curve for o in both if not (over_seeds(share_known(o)).value or 0) > ALL]
        gates = gates_on_stable([o.curve for o in both])
        seeds = [g for g in gates if g.code == GateCode.FEW_SEEDS]
        return [*seeds, *(g for g in gates_on_stable(learning) if g not in seeds)]


def conditions(table: pd.DataFrame) -> list[Contexts]:
    """Return a condition for every number of contexts, rising.

    Raises:
        TableError: a data set is not a bandit, or two curves of a condition have the same rank.
    """
    by_contexts: dict[int, list[Optimum]] = {}
    for o in base.fit(table):
        data = json.loads(runs_of(table, o.curve)["spec"].iloc[0])["dataset"]
        if data["location"] != "bandit":
            raise TableError(f"{data['name']!r} is not a bandit. Use dataset=bandit.")
        by_contexts.setdefault(int(data["knobs"]["contexts"]), []).append(o)
    found = []
    for n, optima in sorted(by_contexts.items()):
        rewarded = [o for o in optima if o.curve.key.get("objective") == "policy_gradient"]
        rest = [o for o in optima if o.curve.key.get("objective") != "policy_gradient"]
        name, used = (rewarded or rest)[0].curve.group, [*rewarded, *rest]
        (rewarded, adapted), (rest, _) = _families(rewarded), _families(rest)
        base.check_ranks(rewarded)
        supervised, others = map(_by_rank, (rest, adapted))
        found.append(Contexts(name, table, used, n, rewarded, supervised, others))
    return found


def _by_rank(optima: Sequence[Optimum]) -> dict[int, Optimum]:
    return {base.rank_of(o): o for o in optima if not o.curve.is_control}


def _families(optima: list[Optimum]) -> tuple[list[Optimum], list[Optimum]]:
    """Split off LoRA's curves that adapt the unembedding, if there are others that do not."""
    adapted = [o for o in base.lora_of(optima) if "unembedding" in o.curve.key["layers"]]
    rest = [o for o in optima if not any(o is a for a in adapted)]
    return (rest, adapted) if base.lora_of(rest) else (optima, [])


def _points(name: str, applies: Callable[[Contexts], bool]) -> base.Estimand[Any]:
    """Declare rank 1's reward minus full fine-tuning's, on conditions to which it applies."""
    gates = Contexts.gates_on_stable
    return rl.at_rank(name, lambda c: 1, Contexts.points, gates, applies=applies)


ESTIMANDS = [
    _points("points_rank_1_below", lambda c: c.is_below or not c.is_complete),
    _points("points_rank_1_beyond", lambda c: c.is_complete and not c.is_below),
    base.Estimand[Contexts](
        "taught_rank_1",
        Contexts.behind_if_supervised,
        Contexts.gates_if_supervised,
        lambda c: f"{'rank 1' if 0 in c.supervised else 'full fine-tuning'} by cross-entropy",
        applies=lambda c: c.is_complete and c.is_below,
    ),
    base.Estimand[Contexts](
        "bits_per_episode",
        lambda c: c.episode[0],
        Contexts.gates_on_stable,
        log=True,
        applies=lambda c: c.is_complete,
    ),
    base.Estimand[Contexts](
        "points_without_unembedding",
        lambda c: c.without_unembedding(1),
        lambda c: c.gates_on_unembedding(1),
        "lora r1 with and without an adapter of the unembedding",
        applies=lambda c: c.is_complete,
    ),
    rl.at_rank(
        "points_top_rank",
        lambda c: c.top,
        Contexts.points,
        Contexts.gates_on_stable,
        applies=lambda c: c.is_complete and c.top > 1,
    ),
    *rl.at_top(applies=lambda c: c.is_complete and c.top > 1),
]


def measures(found: Sequence[Contexts], asked: base.Asked) -> dict[str, Any]:
    """Return loads, points and bits by contexts and rank."""
    return {
        "cells": [
            {
                "contexts": c.contexts,
                "load": c.load,
                "points_behind": {r: over_seeds(v) for r, v in c.behind.items()},
                "bits": c.bits,
                "bits_per_episode": c.episode,
                "taught_bits": c.supervised_bits,
            }
            for c in found
        ]
    }


def sections(found: Sequence[Contexts], asked: base.Asked) -> list[base.Section]:
    """Return rewards by contexts and rank, and the bits learned."""
    rows = [[c.contexts, c.load, *row] for c in found for row in rl.compared(c)]
    head = f"contexts | load of rank 1 | {rl.HEAD}"
    text = f"Load: bits of the labels over 2 bits for each parameter of rank 1. {rl.HOW}"
    run = [c for c in found if c.by_rank]
    ranks = list(dict.fromkeys(r for c in run for r in c.drawn))
    panels = [rl.progress(f"{c.contexts} contexts", c, ranks) for c in run]
    figure = ("rewards.png", panels, rl.CAPTION)
    rewarded = base.Section.of("Rewards", head, rows, [text], *figure)
    rows = []
    for c in found:
        for rank in sorted(c.bits.keys() | c.supervised_bits.keys()):
            gained, supervised = (
                with_interval(of[rank], lambda v: number(v) if v is None else f"{v:,.0f}")
                if rank in of
                else None
                for of in (c.bits, c.supervised_bits)
            )
            name, labels = f"lora r{rank}" if rank else "fullft", LABEL_BITS * c.contexts
            rows.append([c.contexts, labels, name, gained, c.episode.get(rank), supervised])
    head = (
        "contexts | bits of the labels | curve | from rewards [95%] | bits an episode [95%] | "
        "by cross-entropy [95%]"
    )
    said = (
        "From rewards: the least information about the labels that reaches the mean reward (the "
        "rate-distortion function of a uniform source), so a lower bound. By cross-entropy: the "
        "labels' bits minus the loss on them."
    )
    figure = ("bits.png", [_panel(found)], "bits gained")
    bits = base.Section.of("Bits", head, rows, [said], *figure)
    return [rewarded, *_of_unembedding(found), bits]


def _of_unembedding(found: Sequence[Contexts]) -> list[base.Section]:
    """Return rewards with and without an adapter of the unembedding; empty without both."""
    rows = [
        [c.contexts, r, *(over_seeds(reward_of(o[r])) for o in (c.lora, c.with_unembedding)), e]
        for c in found
        for r in c.with_unembedding
        if (e := c.without_unembedding(r)) is not None
    ]
    head = "contexts | rank | reward without it [95%] | reward with it [95%] | difference [95%]"
    title, text = "The adapter of the unembedding", "Rewards in points, paired by seed."
    return [base.Section.of(title, head, rows, [text])] if rows else []


def _panel(found: Sequence[Contexts]) -> base.Panel:
    """Draw bits gained over bits needed; a rank has one colour, rewarded and supervised."""
    needed = [float(LABEL_BITS * c.contexts) for c in found]
    ranks = sorted({r for c in found for r in c.bits.keys() | c.supervised_bits.keys()})
    series = []
    for supervised in (False, True):
        each = [c.supervised_bits if supervised else c.bits for c in found]
        look: dict[str, Any] = {"style": "+--", "size": 8} if supervised else {"style": "o-"}
        for r in ranks if not supervised else sorted({r for bits in each for r in bits}):
            mine = {x: bits[r] for x, bits in zip(needed, each) if r in bits}
            label = rl.name_of(r) + (", supervised" if supervised else "")
            colour = ranks.index(r)
            series.append(base.Series.of(label, mine, list(mine.values()), colour=colour, **look))
    series.append(base.Series("all bits of the labels", needed, needed, style=":", colour="grey"))
    capacity = [LABEL_BITS * c.contexts / c.load for c in found if c.load]
    name = "capacity of rank 1, 2 bits a parameter"
    lines = {name: float(np.mean(capacity))} if capacity else {}
    x, title = "bits needed: those of the labels", "each at its best stable LR"
    return base.Panel(title, x, "bits gained", series, log_x=True, log_y=True, lines=lines)


QUESTION = base.Question(ESTIMANDS, conditions, measures, sections, ratios=rl.ratios)
