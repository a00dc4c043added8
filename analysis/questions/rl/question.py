"""Question: does rank 1 match full fine-tuning where answers are sampled and rewarded.

Each curve is at its own best stable rate, and rewards are paired by seed: one seed sees the same
prompts and random numbers in every arm. Points are hundredths of the held-out reward, which is the
share of right answers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.inference.estimate import Estimate, Verdict
from analysis.inference.gates import Gate, GateCode
from analysis.measures.at_best import AtBest, over_seeds
from analysis.measures.efficiency import rho
from analysis.measures.ratio import ratio_of
from analysis.optimum.fit import fit_all
from analysis.optimum.optimum import Optimum
from analysis.questions.base import (
    Analysis,
    Measured,
    Rows,
    Section,
    claims_on,
    correct,
    fewest_seeds,
    full_of,
    gates_on,
    judge_claims,
    lora_of,
    pooled_over,
)
from analysis.questions.rl.rewards import (
    BARS,
    CAPTION,
    HEAD,
    HOW,
    Curves,
    compared,
    learning_at_stable,
    points_behind,
    progress,
    wider,
)
from analysis.questions.rl.stable import gates_on_stable
from analysis.runs.lr_curves import lr_curves

ESTIMANDS = ("points_rank_1", "points_top_rank", "lr_ratio", "good_range_ratio", "rho_rank_1")
LOG_ESTIMANDS = ("lr_ratio", "good_range_ratio", "rho_rank_1")
BY_BASE = True
"""A claim may leave out base models (`not_on`)."""
START, MOST = (0.05, 0.4), 0.9
"""Rewards of a task that can tell methods apart: before training, and the highest at the end."""


@dataclass(frozen=True)
class Cell:
    """The curves of one model and data set."""

    full: Optimum | None
    lora: dict[int, Optimum]
    """By rank."""
    behind: dict[int, AtBest[float]]
    """LoRA's reward minus full fine-tuning's by rank, in points."""
    curves: Curves

    @property
    def by_rank(self) -> dict[int, Optimum]:
        """All curves by rank; 0: full fine-tuning, which is first."""
        return {**({0: self.full} if self.full is not None else {}), **self.lora}

    @property
    def optima(self) -> list[Optimum]:
        """All curves, full fine-tuning first."""
        return list(self.by_rank.values())


def analyse(table: pd.DataFrame, question: dict[str, Any], kept: Path | None = None) -> Analysis:
    """Judge every claim on each model and data set of which it is asked."""
    optima = fit_all(lr_curves(table))
    verdicts: list[Verdict] = []
    members: dict[str, list[Optimum]] = {}
    sections: list[Section] = []
    ratios: list[tuple[str, str, Estimate]] = []
    measures: dict[str, Any] = {}
    for group in dict.fromkeys(o.curve.group for o in optima):
        cell = _cell(table, [o for o in optima if o.curve.group == group])
        members[group] = cell.optima
        seeds = fewest_seeds(cell.optima)
        asked = claims_on(question, cell.optima[0].curve.key["model"])
        verdicts += judge_claims(asked, _measured(cell), LOG_ESTIMANDS, group, seeds)
        figure = f"rewards_{len(sections) + 1}.png" if sections else "rewards.png"
        sections.append(_section(group, cell, figure))
        if cell.full is not None:
            ratios += [(group, f"rank {r}", ratio_of([o], cell.full)) for r, o in cell.lora.items()]
        measures[group] = {str(r): over_seeds(v).plain() for r, v in cell.behind.items()}
    of_points = {"points_behind": measures}
    return Analysis(
        optima, correct(verdicts, question), sections, of_points, members, False, ratios
    )


def _cell(table: pd.DataFrame, optima: list[Optimum]) -> Cell:
    full = full_of(optima)
    lora = {int(o.curve.key["rank"]): o for o in lora_of(optima)}
    behind = [] if full is None else points_behind(full, list(lora.values()))
    known = {0: full, **lora} if full is not None else lora
    return Cell(full, lora, dict(zip(lora, behind)), learning_at_stable(table, known))


# ---------------------------------------------------------------- estimands


def _measured(cell: Cell) -> Measured:
    full, top = cell.full, max(cell.lora, default=0)
    pooled = pooled_over(cell.behind.values())

    def judged(
        rank: int, measure: Callable[[Optimum, Optimum], tuple[Estimate, list[Gate]]]
    ) -> tuple[Estimate, list[Gate]]:
        mine = cell.lora.get(rank)
        if mine is None or full is None:
            missing = "fullft" if full is None else f"lora r{rank}" if rank else "lora"
            return Estimate(None), [Gate(GateCode.MISSING, missing)]
        return measure(mine, full)

    def points(mine: Optimum, its: Optimum) -> tuple[Estimate, list[Gate]]:
        behind = over_seeds(cell.behind[int(mine.curve.key["rank"])], pooled)
        return behind, [*gates_on_stable([its.curve, mine.curve]), *_task_gates(its, mine)]

    def ratio(mine: Optimum, its: Optimum) -> tuple[Estimate, list[Gate]]:
        return ratio_of([mine], its), gates_on([its, mine])

    def wider_range(mine: Optimum, its: Optimum) -> tuple[Estimate, list[Gate]]:
        estimate, gates = wider(mine, its)
        return estimate, [*gates_on([its, mine]), *gates]

    def speed(mine: Optimum, its: Optimum) -> tuple[Estimate, list[Gate]]:
        return rho(cell.curves[1], cell.curves[0]), gates_on_stable([its.curve, mine.curve])

    return {
        "points_rank_1": judged(1, points),
        "points_top_rank": judged(top, points),
        "lr_ratio": judged(top, ratio),
        "good_range_ratio": judged(top, wider_range),
        "rho_rank_1": judged(1, speed),
    }


def _task_gates(*optima: Optimum) -> list[Gate]:
    """Return what makes a task unfit to tell methods apart: its start, or an end near the top."""
    gates, start = [], -optima[0].curve.nll_start
    if math.isfinite(start) and not START[0] <= start <= START[1]:
        low, high = START
        gates.append(Gate(GateCode.TASK, f"starts at {start:.2g}, {low:g} to {high:g} needed"))
    best = max((-o.best_nll for o in optima if o.best_nll is not None), default=math.nan)
    if best > MOST:
        gates.append(Gate(GateCode.TASK, f"nearly solved: {best:.2f}, at most {MOST:g}"))
    return gates


# ---------------------------------------------------------------- the report


def _section(group: str, cell: Cell, figure: str) -> Section:
    rows: Rows = [list(HEAD), *compared(cell.full, cell.lora, cell.behind)]
    one = cell.optima[0].curve
    title = f"{one.key['model']} on {one.key['dataset']}"
    lr = {rank: o.curve for rank, o in cell.by_rank.items()}
    panel = progress(title, cell.curves, lr, sorted(cell.curves))
    text = [f"{HOW} {BARS}"]
    return Section(f"Rewards, {group}", rows, text, figure, [panel], CAPTION)
