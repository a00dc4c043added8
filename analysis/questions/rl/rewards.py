"""Compare rewards at the best stable rates, and ranges of good rates.

Points are hundredths of reward.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.inference.censored import pseudo_values
from analysis.inference.estimate import Estimate, exp_of, rate, with_interval
from analysis.inference.gates import MIN_SEEDS, Gate, GateCode
from analysis.inference.seeds import from_sample
from analysis.measures.at_best import AtBest, over_seeds
from analysis.measures.ratio import ratio_of
from analysis.optimum.optimum import Optimum
from analysis.questions.base import Panel, Series
from analysis.questions.rl.stable import (
    MAX_COLLAPSED,
    collapsed_at_best,
    stable,
    values_at_stable,
)
from analysis.runs.learning_curves import Points, by_run, same_rows
from analysis.runs.lr_curves import LrCurve, runs_of
from analysis.runs.metric import COLLAPSED_SHARE

POINTS = 100
GOOD = 0.02
"""Reward below the best one within which a rate is good."""


def reward_of(o: Optimum) -> AtBest[float]:
    """Return a curve's rewards at its best stable rate, in points, by seed."""
    found = stable(o.curve)
    return AtBest({}) if found is None else found.loss.map(lambda v: -POINTS * v)


def points_behind(full: Optimum, lora: Sequence[Optimum]) -> list[AtBest[float]]:
    """Return each LoRA curve's reward minus full fine-tuning's by seed, in points.

    Each is at its own best stable rate; below 0 LoRA is behind.
    """
    its = reward_of(full)
    return [reward_of(o).paired(its, lambda a, b: a - b) for o in lora]


def good_range(x: np.ndarray, reward: np.ndarray) -> tuple[float, float, bool]:
    """Return the ends of the range of good rates in ln(rate), and whether it may go on beyond.

    Between rates the reward is a straight line in ln(rate). A range that reaches the lowest or the
    highest rate ends there.

    Args:
        x: ln(rate), ascending [n].
        reward: at these rates [n].
    """
    best = int(reward.argmax())
    least = float(reward[best]) - GOOD
    ends, goes_on = [], False
    for side in (-1, 1):
        k = best
        while 0 <= k + side < len(x) and reward[k + side] >= least:
            k += side
        if not 0 <= k + side < len(x):
            ends.append(float(x[k]))
            goes_on = True
            continue
        share = (reward[k] - least) / (reward[k] - reward[k + side])
        ends.append(float(x[k] + share * (x[k + side] - x[k])))
    return ends[0], ends[1], goes_on


def wider(lora: Optimum, full: Optimum) -> tuple[Estimate, list[Gate]]:
    """Return LoRA's range of good rates over full fine-tuning's, as factors, and its gates.

    A range is that of the mean reward over the seeds that ran at all rates of both curves. The
    interval is the jackknife's over these seeds, of the logarithm: Student's, of the pseudo-values
    (Miller, Biometrika 61, 1974).
    """
    seeds = sorted(_complete(lora) & _complete(full))
    if len(seeds) < MIN_SEEDS:
        return Estimate(None), [Gate(GateCode.FEW_SEEDS, len(seeds), "all rates: ")]
    grids = [_grid(o, seeds) for o in (lora, full)]

    def log_ratio(rows: list[int]) -> tuple[float, bool]:
        (a, b, open_a), (c, d, open_c) = (good_range(x, r[:, rows].mean(1)) for x, r in grids)
        return float(np.log((b - a) / (d - c))), open_a or open_c

    every = list(range(len(seeds)))
    whole, goes_on = log_ratio(every)
    rest = [log_ratio([k for k in every if k != s])[0] for s in every]
    estimate = exp_of(from_sample(pseudo_values(whole, rest)))
    open_gate = Gate(GateCode.FLAGGED, place="range of good rates: ", flags=("at_edge",))
    return estimate, [open_gate] if goes_on else []


def _complete(o: Optimum) -> set[int]:
    """Return the seeds that ran at all rates of a curve."""
    of_rate = [set(map(int, o.curve.seed[o.curve.x == x])) for x in np.unique(o.curve.x)]
    return set.intersection(*of_rate) if of_rate else set()


def _grid(o: Optimum, seeds: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return ln(rate) [n] and rewards [n, seeds]; a run that broke down has none."""
    x = np.unique(o.curve.x)
    found = {(a, int(s)): y for a, s, y in zip(o.curve.x, o.curve.seed, o.curve.y)}
    reward = -np.array([[found[a, s] for s in seeds] for a in x])
    return x, np.nan_to_num(reward, nan=0.0)


Curves = dict[int, AtBest[Points]]
"""Learning curves at the best stable rates, of losses, by rank; 0: full fine-tuning."""


def learning_at_stable(table: pd.DataFrame, optima: Mapping[int, Optimum]) -> Curves:
    """Return each curve's learning curves by seed at its best stable rate; `optima` by rank."""
    learned = by_run(pd.concat([runs_of(table, o.curve) for o in optima.values()]))

    def read(run: pd.Series) -> dict[Any, float]:
        return dict(same_rows(learned.get(run.name)))

    return {
        rank: values_at_stable(table, o.curve, read).map(lambda points: sorted(points.items()))
        for rank, o in optima.items()
    }


def progress(title: str, curves: Curves, lr: Mapping[int, LrCurve], ranks: Sequence[int]) -> Panel:
    """Return rewards over episodes, the mean over seeds with its interval, by rank.

    The means are over the runs that did not collapse; the legend counts the others.

    Args:
        title: what the curves are of.
        lr: the lr curves by rank, all of which have the same base and answers an update.
        ranks: of all panels that are shown together, so that a rank has one colour; 0 is first.
    """
    one = next(iter(lr.values()))
    answers, start, series = int(one.key["batch_size"]), -one.nll_start, []
    for rank, curve in curves.items():
        of_seeds = [dict(points) for points in curve.best.values()]
        steps = sorted(set.intersection(*map(set, of_seeds))) if of_seeds else []
        means = [from_sample([-points[s] for points in of_seeds]) for s in steps]
        look = {"size": 4, "colour": ranks.index(rank)}
        lost, n = collapsed_at_best(lr[rank])
        name = name_of(rank) + (f" (without {lost} of {n} runs: collapsed)" if lost else "")
        series.append(Series.of(name, [s * answers for s in steps], means, **look))
    lines = {"before training": start} if np.isfinite(start) else {}
    title = f"{title}, each at its best stable rate"
    return Panel(title, "episodes", "held-out reward", series, log_x=True, lines=lines)


def name_of(rank: int) -> str:
    """Name a curve in a legend; 0: full fine-tuning."""
    return f"rank {rank}" if rank else "FullFT"


HEAD = (
    *("curve", "best LR [95%]", "reward, points [95%]", "collapsed there"),
    *("behind FullFT, points [95%]",),
    *("ratio of best rates [95%]", "good rates", "range over FullFT's [95%]"),
)
CAPTION = "reward over episodes by rank"
BARS = "In the figure, bars are intervals over seeds; an episode is a sampled answer."
HOW = (
    "Rewards are at the best stable rate, by a parabola through it and the stable rates around it. "
    f"A rate is stable if at most {100 * MAX_COLLAPSED:.0f}% of its runs collapse: they were "
    f"stopped in training, or ended below {100 * COLLAPSED_SHARE:.0f}% of their own best reward. "
    "Means are over the other runs. The choice of the rate is part of the interval: all of it is "
    "done again on resampled seeds. Good rates: those whose fitted reward is within 2 points of "
    "the best one. Ranges are compared in doublings of the rate, where all rates have "
    f"{MIN_SEEDS} seeds."
)


def compared(
    full: Optimum | None, lora: Mapping[int, Optimum], behind: Mapping[int, AtBest[float]]
) -> list[list[str]]:
    """Return a row of HEAD for each curve, full fine-tuning's first.

    `lora`, `behind`: by rank; `behind` as from `points_behind`.
    """
    curves = [*([] if full is None else [(0, full)]), *lora.items()]
    rows = []
    for rank, o in curves:
        reward, band = reward_of(o), o.band(GOOD)
        good = "-" if band is None else " to ".join(map(rate, band))
        row = [o.curve.name, with_interval(o.best_lr, rate), with_interval(over_seeds(reward))]
        row.append("{} of {}".format(*collapsed_at_best(o.curve)))
        if o is full or full is None:
            rows.append([*row, "-", "-", good, "-"])
            continue
        points, ratio = with_interval(over_seeds(behind[rank])), with_interval(ratio_of([o], full))
        rows.append([*row, points, ratio, good, with_interval(wider(o, full)[0])])
    return rows
