"""Question: is rank 1 enough in reinforcement learning because an episode carries few bits.

A bandit's labels are known bits: 4 a context. Rank 1 should tie with full fine-tuning while they
fit it at 2 bits a parameter, and fall behind beyond. The same labels taught by cross-entropy show
what the adapter can hold. Each curve is at its own best rate, paired by seed.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.inference.estimate import Estimate, Verdict, exp_of, number, with_interval
from analysis.inference.gates import Gate, GateCode
from analysis.measures.at_best import AtBest, over_seeds
from analysis.measures.ratio import ratio_of
from analysis.measures.regret import BITS_PER_PARAMETER
from analysis.optimum.fit import fit_all
from analysis.optimum.optimum import Optimum
from analysis.questions.base import (
    Analysis,
    Measured,
    Panel,
    Rows,
    Section,
    Series,
    claims_about,
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
    name_of,
    points_behind,
    progress,
    wider,
)
from analysis.questions.rl.stable import gates_on_stable, values_at_stable
from analysis.questions.rl.taught import LABEL_BITS, behind_if_taught, share_known
from analysis.runs.lr_curves import lr_curves, runs_of
from analysis.runs.table import TableError

BELOW, BEYOND = "points_rank_1_below", "points_rank_1_beyond"
TAUGHT = "taught_rank_1"
EPISODE = "bits_per_episode"
RATIO, RANGE = "lr_ratio", "good_range_ratio"
ESTIMANDS = (BELOW, BEYOND, TAUGHT, EPISODE, RATIO, RANGE)
LOG_ESTIMANDS = (EPISODE, RATIO, RANGE)
NO_CELL = "no cell"
TAUGHT_STYLE = "+--"
"""Of lines in the figure: labels learned by cross-entropy."""
Bits = dict[int, Estimate]
"""By rank, 0 for full fine-tuning."""


@dataclass(frozen=True)
class Cell:
    """One number of contexts: curves of rewarded runs, and of runs that were taught the labels."""

    contexts: int
    group: str
    full: Optimum | None
    lora: dict[int, Optimum]
    taught: dict[int, Optimum]
    """By rank; 0: full fine-tuning."""
    behind: dict[int, AtBest[float]]
    """LoRA's reward minus full fine-tuning's by rank, in points."""
    curves: Curves
    bits: Bits
    """Learned from rewards: the least information that reaches the reward."""
    taught_bits: Bits
    """Learned by cross-entropy: the labels' bits minus the loss."""
    episode: dict[int, Estimate]
    """Bits learned a sampled answer, over a whole run, by rank."""
    load: float | None
    """The labels' bits over what rank 1 holds at BITS_PER_PARAMETER; None without rank 1."""

    @property
    def by_rank(self) -> dict[int, Optimum]:
        """The curves of rewarded runs by rank; 0: full fine-tuning, which is first."""
        return {**({0: self.full} if self.full is not None else {}), **self.lora}

    @property
    def optima(self) -> list[Optimum]:
        """The curves of rewarded runs, full fine-tuning first."""
        return list(self.by_rank.values())


def analyse(table: pd.DataFrame, question: dict[str, Any], kept: Path | None = None) -> Analysis:
    """Judge every claim at each number of contexts that it is about."""
    cells = _cells(table, fit_all(lr_curves(table)))
    optima = [o for c in cells for o in (*c.optima, *c.taught.values())]
    verdicts: list[Verdict] = []
    members: dict[str, list[Optimum]] = {}
    unasked = set(ESTIMANDS)
    for cell in cells:
        members[cell.group] = [*cell.optima, *cell.taught.values()]
        measured = _measured(cell)
        unasked -= measured.keys()
        for estimand in measured:
            asked = claims_about(question, estimand)
            seeds = fewest_seeds(cell.optima)
            verdicts += judge_claims(asked, measured, LOG_ESTIMANDS, cell.group, seeds)
    for estimand in sorted(unasked):
        nothing: Measured = {estimand: (Estimate(None), [Gate(GateCode.NO_CELL)])}
        asked = claims_about(question, estimand)
        verdicts += judge_claims(asked, nothing, LOG_ESTIMANDS, NO_CELL)
    ratios = [
        (c.group, f"rank {r}", ratio_of([o], c.full))
        for c in cells
        if c.full is not None
        for r, o in c.lora.items()
    ]
    measures = {"cells": [_plain(c) for c in cells]}
    sections = [_rewards(cells), _bits(cells)]
    return Analysis(optima, correct(verdicts, question), sections, measures, members, False, ratios)


def _cells(table: pd.DataFrame, optima: Sequence[Optimum]) -> list[Cell]:
    by_contexts: dict[int, list[Optimum]] = {}
    for o in optima:
        by_contexts.setdefault(_contexts(table, o), []).append(o)
    return [_cell(table, n, mine) for n, mine in sorted(by_contexts.items())]


def _contexts(table: pd.DataFrame, o: Optimum) -> int:
    """Return the number of contexts of a curve's data.

    Raises:
        TableError: they are not a bandit's.
    """
    data = json.loads(runs_of(table, o.curve)["spec"].iloc[0])["dataset"]
    if data["location"] != "bandit":
        raise TableError(f"{data['name']!r} has no known bits. Ask this of dataset=bandit.")
    return int(data["knobs"]["contexts"])


def _cell(table: pd.DataFrame, contexts: int, optima: Sequence[Optimum]) -> Cell:
    rewarded = [o for o in optima if _is_rewarded(o)]
    taught = {int(o.curve.key["rank"]): o for o in lora_of(optima) if not _is_rewarded(o)}
    full = full_of(rewarded)
    taught_full = full_of([o for o in optima if not _is_rewarded(o)])
    if taught_full is not None:
        taught = {0: taught_full, **taught}
    lora = {int(o.curve.key["rank"]): o for o in lora_of(rewarded)}
    behind = [] if full is None else points_behind(full, list(lora.values()))
    known = {**({0: full} if full is not None else {}), **lora}
    learned = [values_at_stable(table, o.curve, _learned) for o in known.values()]
    answers = {r: _answers(table, o) for r, o in known.items()}
    episode = {r: exp_of(over_seeds(_log_bits(v))) for r, v in zip(known, learned)}
    load = None
    if 1 in lora:
        size = float(runs_of(table, lora[1].curve)["n_trainable"].mean())
        load = LABEL_BITS * contexts / (BITS_PER_PARAMETER * size)
    group = next(iter(rewarded or optima)).curve.group
    bits = {r: _scaled(e, answers[r]) for r, e in episode.items()}
    taught_bits = {
        r: over_seeds(share_known(o).map(lambda share: LABEL_BITS * contexts * share))
        for r, o in taught.items()
    }
    by_rank, curves = dict(zip(lora, behind)), learning_at_stable(table, known) if known else {}
    return Cell(
        *(contexts, group, full, lora, taught, by_rank, curves, bits, taught_bits, episode, load)
    )


def _is_rewarded(o: Optimum) -> bool:
    return o.curve.key.get("objective") == "policy_gradient"


def _learned(run: pd.Series) -> dict[str, float]:
    """Return ln(bits learned a sampled answer) of a run; empty if it learned none."""
    bits = json.loads(run["result"]).get("bits_per_answer")
    return {"bits": math.log(bits)} if bits else {}


def _log_bits(values: AtBest[dict[Any, float]]) -> AtBest[float]:
    return values.map(lambda v: v["bits"])


def _answers(table: pd.DataFrame, o: Optimum) -> int:
    """Return how many answers a run of a curve samples."""
    return int(o.curve.key["batch_size"]) * int(o.curve.key["steps"])


def _scaled(e: Estimate, factor: float) -> Estimate:
    low, value, high = (None if v is None else factor * v for v in (e.low, e.value, e.high))
    return Estimate(value, low, high, e.n, e.flags)


# ---------------------------------------------------------------- estimands


def _measured(cell: Cell) -> Measured:
    """Return the estimands that this number of contexts answers."""
    full, one = cell.full, cell.lora.get(1)
    if full is None or one is None or cell.load is None:
        absent = [Gate(GateCode.MISSING, "fullft" if full is None else "lora r1")]
        return {BELOW: (Estimate(None), absent)}
    at_both = gates_on_stable([full.curve, one.curve])
    points = over_seeds(cell.behind[1], pooled_over(cell.behind.values()))
    found: Measured = {BELOW if cell.load < 1 else BEYOND: (points, at_both)}
    found[EPISODE] = cell.episode[0], gates_on_stable([full.curve])
    if cell.load < 1:
        found[TAUGHT] = behind_if_taught(cell.taught.get(0), cell.taught.get(1))
    top = max(cell.lora)
    if top > 1:
        high = cell.lora[top]
        gates = gates_on([full, high])
        found[RATIO] = ratio_of([high], full), gates
        range_ratio, stops = wider(high, full)
        found[RANGE] = range_ratio, [*gates, *stops]
    return found


# ---------------------------------------------------------------- the report


def _rewards(cells: Sequence[Cell]) -> Section:
    rows: Rows = [["contexts", "load of rank 1", *HEAD]]
    for c in cells:
        shown = compared(c.full, c.lora, c.behind)
        rows += [[str(c.contexts), number(c.load), *row] for row in shown]
    load = "Load: bits of the labels over 2 bits for each parameter of rank 1."
    run = [c for c in cells if c.optima]
    ranks = sorted({r for c in run for r in c.curves})
    panels = [
        progress(
            f"{c.contexts} contexts", c.curves, {r: o.curve for r, o in c.by_rank.items()}, ranks
        )
        for c in run
    ]
    return Section("Rewards", rows, [f"{load} {HOW} {BARS}"], "rewards.png", panels, CAPTION)


def _bits(cells: Sequence[Cell]) -> Section:
    head = [
        "contexts",
        "bits of the labels",
        "curve",
        "from rewards [95%]",
        "bits an episode [95%]",
    ]
    rows: Rows = [[*head, "by cross-entropy [95%]"]]
    for c in cells:
        for rank in sorted(c.bits.keys() | c.taught_bits.keys()):
            name = f"lora r{rank}" if rank else "fullft"
            row = [str(c.contexts), str(LABEL_BITS * c.contexts), name]
            nothing = Estimate(None)
            gained, taught = (
                with_interval(of.get(rank, nothing), _whole) for of in (c.bits, c.taught_bits)
            )
            rows.append([*row, gained, with_interval(c.episode.get(rank, nothing)), taught])
    text = [
        "From rewards: the least information about the labels that reaches the mean reward (the "
        "rate-distortion function of a uniform source), so a lower bound. By cross-entropy: the "
        "labels' bits minus the loss on them."
    ]
    needed = [float(LABEL_BITS * c.contexts) for c in cells]
    return Section("Bits", rows, text, "bits.png", [_panel(cells, needed)], "bits gained")


def _whole(value: float | None) -> str:
    return number(value) if value is None else f"{value:,.0f}"


def _panel(cells: Sequence[Cell], needed: Sequence[float]) -> Panel:
    """Draw bits gained over bits needed; a rank has one colour, from rewards and taught."""

    def line(of: Callable[[Cell], Bits], rank: int, **look: Any) -> Series:
        mine = [(x, of(c)[rank]) for x, c in zip(needed, cells) if rank in of(c)]
        label = name_of(rank) + (", taught" if look["style"] == TAUGHT_STYLE else "")
        return Series.of(
            label, [x for x, _ in mine], [e for _, e in mine], colour=ranks.index(rank), **look
        )

    ranks = sorted({r for c in cells for r in c.bits.keys() | c.taught_bits.keys()})
    series = [line(lambda c: c.bits, r, style="o-") for r in ranks]
    taught = sorted({r for c in cells for r in c.taught_bits})
    series += [line(lambda c: c.taught_bits, r, style=TAUGHT_STYLE, size=8) for r in taught]
    series.append(Series("all of them", list(needed), list(needed), style=":", colour="grey"))
    room = [LABEL_BITS * c.contexts / c.load for c in cells if c.load]
    lines = {"capacity of rank 1, 2 bits a parameter": float(np.mean(room))} if room else {}
    x, y = "bits needed: those of the labels", "bits gained"
    title = "each at its best stable rate"
    return Panel(title, x, y, series, log_x=True, log_y=True, lines=lines)


def _plain(c: Cell) -> dict[str, Any]:
    return {
        "contexts": c.contexts,
        "load": c.load,
        "points_behind": {str(r): over_seeds(v).plain() for r, v in c.behind.items()},
        "bits": {str(r): e.plain() for r, e in c.bits.items()},
        "bits_per_episode": {str(r): e.plain() for r, e in c.episode.items()},
        "taught_bits": {str(r): e.plain() for r, e in c.taught_bits.items()},
    }
