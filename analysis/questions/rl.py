"""Question: does rank 1 match full fine-tuning where completions are sampled and rewarded.

Each curve is at its best stable learning rate (`measures.rewards`). Rewards are paired by seed: all
arms have the same prompts and random numbers. Points are percent of completions that are right. A
control is full fine-tuning of the matrices that LoRA adapts: against it only the low rank differs.
"""

import math
import operator
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from analysis.inference.estimate import Estimate, rate
from analysis.inference.gates import MIN_SEEDS, Gate, GateCode
from analysis.inference.seeds import from_sample
from analysis.measures import rewards
from analysis.measures.at_best import AtBest, over_seeds, pooled_over
from analysis.measures.ratio import ratio_of
from analysis.measures.speed import rho
from analysis.optimum.optimum import Optimum
from analysis.questions import base
from analysis.runs.learning_curves import Points
from analysis.runs.lr_curves import LrCurve
from analysis.runs.metric import COLLAPSED_SHARE

START, MOST = (0.05, 0.4), 0.9
"""A task can distinguish methods if the reward before training lies in START, and the highest
reward at the end is at most MOST."""
HEAD = (
    "curve | best LR [95%] | reward, points [95%] | collapsed there | behind FullFT, points [95%] "
    "| ratio of best LRs [95%] | good LRs | range over FullFT's [95%]"
)
CAPTION = "reward over episodes by rank"
REWARD = "held-out reward"
HOW = (
    "Rewards are at the best stable LR, by a parabola through it and the stable LRs around it. An "
    f"LR is stable if at most {100 * rewards.MAX_COLLAPSED:.0f}% of its runs collapse: they were "
    f"stopped in training, or ended below {100 * COLLAPSED_SHARE:.0f}% of their own best reward. "
    "Means are over the other runs. The choice of the LR is part of the interval: it is repeated "
    "on resampled seeds. Good LRs: those whose fitted reward is within 2 points of the best one. "
    "Range over FullFT's: the width of a curve's range of good LRs, in doublings, divided by the "
    f"width of full fine-tuning's. It needs {MIN_SEEDS} seeds that ran at all LRs of both curves. "
    "In the figure, bars are intervals over seeds; an episode is a sampled completion."
)

CONTROL = -1
"""Stands for full fine-tuning of LoRA's matrices among the ranks of a figure."""


class Rewarded(base.Condition):
    """The curves of one model and data set, from runs that are trained on rewards."""

    @cached_property
    def behind(self) -> dict[int, AtBest[float]]:
        """LoRA's reward minus full fine-tuning's by rank, in points."""
        if 0 not in self.by_rank:
            return {}
        full = rewards.reward_of(self.full)
        return {r: rewards.reward_of(o).minus(full) for r, o in self.lora.items()}

    @property
    def control(self) -> Optimum | None:
        """The curve of full fine-tuning of LoRA's matrices; None if it is missing."""
        return next((o for o in self.optima if o.curve.is_control), None)

    @cached_property
    def behind_control(self) -> dict[int, AtBest[float]]:
        """The reward of each curve minus the control's by rank, in points; 0: full fine-tuning."""
        if self.control is None:
            return {}
        control = rewards.reward_of(self.control)
        return {r: rewards.reward_of(o).minus(control) for r, o in self.by_rank.items()}

    @property
    def drawn(self) -> dict[int, Optimum]:
        """All curves by rank; 0: full fine-tuning, CONTROL: of LoRA's matrices."""
        return self.by_rank | ({CONTROL: self.control} if self.control else {})

    @cached_property
    def curves(self) -> dict[int, AtBest[Points]]:
        """Learning curves (losses) at the best stable learning rate by rank."""
        return rewards.learning_at_stable(self.runs, self.drawn) if self.drawn else {}

    @property
    def rests(self) -> list[Optimum]:
        return list(self.drawn.values())

    def points(self, rank: int) -> Estimate:
        """Return a rank's reward minus full fine-tuning's, in points."""
        return over_seeds(self.behind[rank], pooled_over(self.behind.values()))

    def points_control(self, rank: int) -> Estimate:
        """Return a rank's reward minus the control's, in points; rank 0: the reverse, of FullFT."""
        found, pooled = self.behind_control, pooled_over(self.behind_control.values())
        return over_seeds(found[rank] if rank else found[0].map(operator.neg), pooled)

    def ratio(self, rank: int) -> Estimate:
        """Return a rank's optimal learning rate over full fine-tuning's."""
        return ratio_of([self.by_rank[rank]], self.full)

    @cached_property
    def ranges(self) -> dict[int, tuple[Estimate, list[Gate]]]:
        """Rank -> width of its range of good LRs over full fine-tuning's, and gates."""
        return {r: rewards.range_ratio(o, self.full) for r, o in self.lora.items()}

    def gates_on_stable(self, rank: int = 0) -> list[Gate]:
        """List the gates on the rewards of full fine-tuning and a rank."""
        return rewards.gates_on_stable([self.by_rank[r].curve for r in dict.fromkeys((0, rank))])

    def gates_on_points(self, rank: int) -> list[Gate]:
        """List the gates on `points`; the reward must start in START and end at most at MOST."""
        return self.gates_on_rewards(self.pair(rank)) or base.gates_on_pairs(self.behind[rank])

    def gates_on_control(self, rank: int) -> list[Gate]:
        """List the gates on `points_control`, as of `gates_on_points`."""
        found = self.gates_on_rewards([self.control, self.by_rank[rank]])
        return found or base.gates_on_pairs(self.behind_control[rank])

    def gates_on_rewards(self, optima: Sequence[Optimum]) -> list[Gate]:
        """List the gates on final rewards: of their curves, and an unfit task."""
        gates = rewards.gates_on_stable([o.curve for o in optima])
        start = -optima[0].curve.nll_start
        if math.isfinite(start) and not START[0] <= start <= START[1]:
            low, high = START
            gates.append(Gate(GateCode.TASK, f"starts at {start:.2g}, {low:g} to {high:g} needed"))
        best = max((-o.best_nll for o in optima if o.best_nll is not None), default=math.nan)
        if best > MOST:
            gates.append(Gate(GateCode.TASK, f"nearly solved: {best:.2f}, at most {MOST:g}"))
        return gates


def conditions(table: pd.DataFrame) -> list[Rewarded]:
    """Return one condition for every model and data set.

    Raises:
        TableError: two curves of one condition have the same rank.
    """
    groups = base.by_group(base.fit(table))
    for optima in groups.values():
        base.check_ranks(optima)
    return [Rewarded(name, table, optima) for name, optima in groups.items()]


def at_rank(
    name: str,
    rank_of: Callable[[Rewarded], int],
    measure: Callable[[Any, int], Estimate],
    gates: Callable[[Any, int], list[Gate]],
    **more: Any,
) -> base.Estimand[Any]:
    """Declare an estimand at one rank; it is missing without this rank or full fine-tuning."""

    def is_there(c: Rewarded) -> bool:
        return 0 in c.by_rank and rank_of(c) in c.lora

    def absent(c: Rewarded) -> str:
        lora = f"lora r{rank_of(c)}" if rank_of(c) else "lora"
        return lora if 0 in c.by_rank else "fullft"

    return base.Estimand(
        name,
        lambda c: measure(c, rank_of(c)) if is_there(c) else None,
        lambda c: gates(c, rank_of(c)),
        absent,
        **more,
    )


def against_control(
    name: str, rank_of: Callable[[Rewarded], int], absent: str
) -> base.Estimand[Any]:
    """Declare a reward minus the control's at one rank; rank 0: control minus full fine-tuning.

    `absent`: the curve that is missing if the control is there.
    """
    return base.Estimand(
        name,
        lambda c: c.points_control(rank_of(c)) if rank_of(c) in c.behind_control else None,
        lambda c: c.gates_on_control(rank_of(c)),
        lambda c: absent if c.control else "fullft of LoRA's matrices",
    )


def at_top(**more: Any) -> list[base.Estimand[Any]]:
    """Declare ratios to full fine-tuning at the top rank: of optimal LRs, and of good ranges."""
    more = {"log": True, **more}
    return [
        at_rank(
            "lr_ratio",
            lambda c: c.top,
            Rewarded.ratio,
            lambda c, r: base.gates_on(c.pair(r)),
            **more,
        ),
        at_rank(
            "good_range_ratio",
            lambda c: c.top,
            lambda c, r: c.ranges[r][0],
            lambda c, r: [*base.gates_on(c.pair(r)), *c.ranges[r][1]],
            **more,
        ),
    ]


ESTIMANDS = [
    at_rank("points_rank_1", lambda c: 1, Rewarded.points, Rewarded.gates_on_points),
    at_rank("points_top_rank", lambda c: c.top, Rewarded.points, Rewarded.gates_on_points),
    against_control("points_rank_1_control", lambda c: 1, "lora r1"),
    against_control("points_top_rank_control", lambda c: c.top or -1, "lora"),
    against_control("points_control", lambda c: 0, "fullft"),
    *at_top(),
    at_rank(
        "rho_rank_1",
        lambda c: 1,
        lambda c, r: rho(c.curves[r], c.curves[0]),
        Rewarded.gates_on_stable,
        log=True,
    ),
]


def measures(found: Sequence[Rewarded], asked: base.Asked) -> dict[str, Any]:
    """Return every rank's reward minus full fine-tuning's, in points."""
    behind = {c.name: {r: over_seeds(v) for r, v in c.behind.items()} for c in found}
    return {"points_behind": behind}


def name_of(rank: int) -> str:
    """Name a curve in a legend; 0: full fine-tuning."""
    return {0: "FullFT", CONTROL: "FullFT of LoRA's matrices"}.get(rank, f"rank {rank}")


def progress(title: str, c: Rewarded, ranks: Sequence[int]) -> base.Panel:
    """Return mean rewards over episodes with intervals, by rank; the legend counts collapsed runs.

    Args:
        title: model and data set.
        ranks: ranks of all panels of the figure, 0 first; a rank's index gives its colour.
    """
    one = c.optima[0].curve  # of any rank: there may be the control alone
    completions, series = int(one.key["batch_size"]), []
    for rank, curve in c.curves.items():
        of_seeds = [dict(points) for points in curve.best.values()]
        steps = sorted(set.intersection(*map(set, of_seeds))) if of_seeds else []
        means = [from_sample([-points[s] for points in of_seeds]) for s in steps]
        lost, n = rewards.collapsed_at_best(c.drawn[rank].curve)
        name = name_of(rank) + (f" (without {lost} of {n} runs: collapsed)" if lost else "")
        look = look_of(rank, ranks)
        series.append(base.Series.of(name, [s * completions for s in steps], means, **look))
    title = f"{title}, each at its best stable LR"
    return base.Panel(title, "episodes", REWARD, series, log_x=True, lines=before_training(one))


def before_training(curve: LrCurve) -> dict[str, float]:
    """Return the line of the reward before training; empty if it is unknown."""
    return {"before training": -curve.nll_start} if np.isfinite(curve.nll_start) else {}


def look_of(rank: int, ranks: Sequence[int]) -> dict[str, Any]:
    """Return the colour and the marker of a rank, the same in all panels of a figure."""
    k = ranks.index(rank)
    return {"size": 4, "colour": k, "style": f"{'osD^v'[k % 5]}-"}


def over_rates(c: Rewarded) -> list[base.Panel]:
    """Return rewards over the learning rate, and the share of runs that do not collapse there.

    There are no panels if each curve has one learning rate.
    """
    if all(len(np.unique(o.curve.x)) < 2 for o in c.optima):
        return []
    rewarded, survived = [], []
    for rank, o in c.drawn.items():
        at = rewards.at_each_lr(o.curve)
        look = look_of(rank, list(c.drawn))
        known = {lr: e for lr, (e, _) in at.items() if e.value is not None}
        rewarded.append(base.Series.of(name_of(rank), list(known), list(known.values()), **look))
        share = [100 * left for _, left in at.values()]
        survived.append(base.Series(name_of(rank), list(at), share, **look))
    least = 100 * (1 - rewards.MAX_COLLAPSED)
    stable = {f"stable: {least:.0f}% or more": least}
    start = before_training(c.optima[0].curve)
    title = "at the end, without the runs that collapsed"
    more: dict[str, Any] = {"log_x": True, "lines": stable, "y_range": (0, 105)}
    return [
        base.Panel(title, "learning rate", REWARD, rewarded, log_x=True, lines=start),
        base.Panel("runs that do not collapse", "learning rate", "% of runs", survived, **more),
    ]


def compared(c: Rewarded) -> list[list[Any]]:
    """Return a row of HEAD for each curve, full fine-tuning's first."""

    def row(name: str, o: Optimum, *behind: Estimate | None) -> list[Any]:
        band = o.band(rewards.GOOD)
        good = "-" if band is None else " to ".join(map(rate, band))
        points, ratio, width = behind or (None, None, None)
        collapsed = "{} of {}".format(*rewards.collapsed_at_best(o.curve))
        lr, reward = base.best_lr(o), over_seeds(rewards.reward_of(o))
        return [name, lr, reward, collapsed, points, ratio, good, width]

    rows = []
    for rank, o in c.by_rank.items():
        behind: tuple[Estimate | None, ...] = ()
        if rank in c.behind:
            behind = (over_seeds(c.behind[rank]), c.ratio(rank), c.ranges[rank][0])
        rows.append(row(o.curve.name, o, *behind))
    if c.control:
        points = c.points_control(0) if 0 in c.behind_control else None
        rows.append(
            row(f"{c.control.curve.name} of LoRA's matrices", c.control, points, None, None)
        )
    return rows


def sections(found: Sequence[Rewarded], asked: base.Asked) -> list[base.Section]:
    """Return rewards by rank, for every model and data set."""
    out = []
    for k, c in enumerate(found, 1):
        key = c.optima[0].curve.key
        panel = progress(f"{key['model']} on {key['dataset']}", c, list(c.drawn))
        figure = "rewards.png" if k == 1 else f"rewards_{k}.png"
        shown = (compared(c), [HOW], figure, [panel, *over_rates(c)], CAPTION)
        out.append(base.Section.of(f"Rewards, {c.name}", HEAD, *shown))
        if against := [[o.curve.name, c.points_control(r)] for r, o in c.lora.items() if c.control]:
            title = f"Against full fine-tuning of LoRA's matrices, {c.name}"
            text = "Both train the same matrices, so that only the low rank differs."
            out.append(base.Section.of(title, "curve | reward, points [95%]", against, [text]))
    return out


def ratios(c: Rewarded) -> list[tuple[str, Estimate]]:
    """Return every rank's optimal learning rate over full fine-tuning's."""
    return [(name_of(r), c.ratio(r)) for r in c.lora if 0 in c.by_rank]


QUESTION = base.Question(ESTIMANDS, conditions, measures, sections, ratios=ratios, by_base=True)
