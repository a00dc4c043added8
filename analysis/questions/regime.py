"""Question: does LoRA give up nothing while little is new in the data, and where does that end.

A cell is a data set with a known amount of what is new, on one base. In every cell each rank is
compared with full fine-tuning, both at their own best rates, after the last update and after FIRST
updates, which are a prefix of the same runs. Verdicts are given cell by cell.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.inference.estimate import Estimate, Verdict, number, signed, with_interval
from analysis.inference.gates import Gate, GateCode
from analysis.measures.at_best import AtBest, over_seeds
from analysis.measures.regret import (
    ALLOWED,
    BITS_PER_PARAMETER,
    PARTS,
    Gap,
    Novelty,
    gaps_of,
    growth,
    mean_of,
    novelty_of,
    parts_at_best,
    rank_needed,
)
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
    distinct,
    fewest_seeds,
    gates_on,
    judge_claims,
)
from analysis.runs.lr_curves import lr_curves
from analysis.runs.prefixes import at_step

ESTIMANDS = (
    "over_allowed_low",
    "over_allowed_beyond",
    "over_allowed_fitting",
    "gap_growth",
    "gap_low",
    "unchanged_minus_changed",
    "over_allowed_real",
)
LOG_ESTIMANDS: tuple[str, ...] = ()
FIRST = 64
"""Updates after which the gap is first read, to see whether it grows."""
EIGHTH = 8
"""The study's ranks end at an eighth of the hidden size."""
FITTING = 0.5
"""A rank of this load or less holds what is new by the study's capacity, with a factor 2 to spare.
"""
MAX_ERROR = 0.0125
"""Standard error of the gap, as a share of the gain, above which a cell is shown and not judged."""
Gaps = dict[int, Gap]


@dataclass(frozen=True)
class Cell:
    """One data set on one base."""

    name: str
    novelty: Novelty | None
    """None for real data, of which the information is not known."""
    steps: int
    eighth: int
    """The smallest rank tried of an eighth of the hidden size or more; if none is, the highest."""
    last: Gaps
    """By rank, after the last update."""
    first: Gaps
    """After FIRST updates; empty for shorter runs."""
    parts: dict[int, dict[str, AtBest[float]]]
    """By rank: what the changed and the unchanged contexts add to the gap, in nats."""
    optima: list[Optimum]

    @property
    def fitting(self) -> int | None:
        """The smallest rank that holds what is new by the study's capacity; None without one."""
        ranks = [r for r, g in self.last.items() if g.load is not None and g.load <= FITTING]
        return min(ranks, default=None)


def cells_of(table: pd.DataFrame) -> list[Cell]:
    """Fit every cell of a table, from little to much that is new."""
    found = []
    for _, part in table.groupby(["model", "dataset", "batch_size", "steps"], sort=False):
        runs = part.reset_index(drop=True)
        optima, steps = fit_all(lr_curves(runs)), int(runs["steps"].iloc[0])
        last = _by_rank(gaps_of(runs, optima))
        first: Gaps = {}
        if steps > FIRST and len(early := at_step(runs, FIRST)):
            first = _by_rank(gaps_of(early, fit_all(lr_curves(early))))
        wanted = int(runs["hidden_size"].iloc[0]) / EIGHTH
        novelty = novelty_of(json.loads(runs["spec"].iloc[0])["dataset"])
        found.append(
            Cell(
                name=f"{runs['model'].iloc[0]}, {novelty.name if novelty else _data(runs)}",
                novelty=novelty,
                steps=steps,
                eighth=min((r for r in last if r >= wanted), default=max(last, default=0)),
                last=last,
                first=first,
                parts={r: parts_at_best(runs, g) for r, g in last.items()},
                optima=optima,
            )
        )
    return sorted(found, key=lambda c: (c.name.split(",")[0], _load(c)))


def _data(runs: pd.DataFrame) -> str:
    return str(runs["dataset"].iloc[0])


def _by_rank(gaps: Sequence[Gap]) -> Gaps:
    return {g.rank: g for g in gaps}


def _load(cell: Cell) -> float:
    loads = [g.load for g in cell.last.values() if g.load is not None]
    return max(loads, default=0.0)


def analyse(table: pd.DataFrame, question: dict[str, Any], kept: Path | None = None) -> Analysis:
    """Judge every claim in the cells that it is about, and draw the map."""
    cells = cells_of(table)
    verdicts: list[Verdict] = []
    members: dict[str, list[Optimum]] = {}
    open_claims = set(ESTIMANDS)
    for cell in cells:
        measured, members[cell.name] = _measured(cell)
        seeds = fewest_seeds(members[cell.name])
        for estimand in measured:
            asked = claims_about(question, estimand)
            verdicts += judge_claims(asked, measured, LOG_ESTIMANDS, cell.name, seeds)
        open_claims -= measured.keys()
    for estimand in sorted(open_claims):
        nothing = {estimand: (Estimate(None), [Gate(GateCode.MISSING, "a cell that it is about")])}
        asked = claims_about(question, estimand)
        verdicts += judge_claims(asked, nothing, LOG_ESTIMANDS, "no cell")
    measures = {
        "cells": [_plain(c) for c in cells],
        "read": {
            "over_allowed_low": f"rank of {1 / EIGHTH:g} of the width",
            "gap_growth": f"smallest rank, update {FIRST} to the last",
        },
    }
    sections = [_map(cells), _over_updates(cells), _by_context(cells)]
    optima = [o for c in cells for o in c.optima]
    return Analysis(optima, correct(verdicts, question), sections, measures, members)


def _measured(cell: Cell) -> tuple[Measured, list[Optimum]]:
    """Return the estimands that this cell answers, and the optima that they rest on."""
    gap = cell.last.get(cell.eighth)
    if gap is None:
        missing = [Gate(GateCode.MISSING, "lora" if cell.optima else "fullft")]
        return {"over_allowed_low": (Estimate(None), missing)}, []
    measured: Measured = {}
    at_eighth = _gates(gap)
    new = cell.novelty
    if new is None:
        return {"over_allowed_real": (gap.over_allowed(), at_eighth)}, [gap.lora, gap.full]
    if new.low:
        measured["over_allowed_low"] = (gap.over_allowed(), at_eighth)
        measured["gap_low"] = (gap.mean(), at_eighth)
        if parts := cell.parts[cell.eighth]:
            apart = parts["unchanged"].paired(parts["changed"], lambda a, b: a - b)
            better = gap.mean().high
            none = [] if better is not None and better < 0 else [Gate(GateCode.NO_ADVANTAGE)]
            measured["unchanged_minus_changed"] = (over_seeds(apart), at_eighth + none)
    else:
        measured["over_allowed_beyond"] = (gap.over_allowed(), at_eighth)
    used = [gap.lora, gap.full]
    if cell.fitting is not None and not new.nothing:
        fitting = cell.last[cell.fitting]
        measured["over_allowed_fitting"] = (fitting.over_allowed(), _gates(fitting))
        used.append(fitting.lora)
    smallest = min(cell.last)
    if smallest in cell.first and not new.nothing:
        first, last = cell.first[smallest], cell.last[smallest]
        measured["gap_growth"] = (growth(first, last), _gates(first) + _gates(last))
        used.append(last.lora)
    return measured, distinct(used)


def _gates(gap: Gap) -> list[Gate]:
    """Return what forbids a verdict about a gap: its optima, and too much noise; never the task.

    A gap in nats with its own error is right on a small or a nearly solved task too.
    """
    found = [g for g in gates_on([gap.full, gap.lora]) if g.code != GateCode.TASK]
    if gap.planned_error > MAX_ERROR:
        share = "unknown" if math.isinf(gap.planned_error) else f"{100 * gap.planned_error:.2g}%"
        found.append(Gate(GateCode.NOISY, share))
    return found


def _plain(cell: Cell) -> dict[str, Any]:
    needed = rank_needed(list(cell.last.values()))
    return {
        "cell": cell.name,
        "updates": cell.steps,
        "rank_needed": [needed.above, None if math.isinf(needed.up_to) else needed.up_to],
        "ranks": [
            {
                "rank": r,
                "load": g.load,
                "gain_nats": mean_of(g.gain),
                "gap_nats": g.mean().plain(),
                "regret_percent": g.percent().plain(),
                "gap_nats_first": cell.first[r].mean().plain() if r in cell.first else None,
            }
            for r, g in cell.last.items()
        ],
    }


def _map(cells: Sequence[Cell]) -> Section:
    rows: Rows = [
        ["cell", "updates", "rank", "load", "gain of FullFT", "regret, % of the gain [95%]"]
    ]
    for cell in cells:
        for r, g in cell.last.items():
            gain, load = number(mean_of(g.gain)), number(g.load)
            rows.append(
                [cell.name, str(cell.steps), str(r), load, gain, with_interval(g.percent())]
            )
    text = [
        f"Load: bits of what is new over {BITS_PER_PARAMETER:g} bits for each trained parameter. "
        f"Regret: LoRA's loss minus full fine-tuning's at the last update, in percent of what full "
        f"fine-tuning gains; up to {ALLOWED:.0%} counts as none.",
        *(
            f"{c.name}: the smallest rank with no regret is {needed}."
            for c in cells
            if str(needed := rank_needed(list(c.last.values()))) != "-"
        ),
    ]
    caption = "regret against load, by rank"
    return Section("The map", rows, text, "map.png", [_map_panel(cells)], caption)


def _map_panel(cells: Sequence[Cell]) -> Panel:
    ranks = sorted({r for c in cells for r in c.last})
    series = []
    for k, rank in enumerate(ranks, 1):
        gaps = [c.last[rank] for c in cells if rank in c.last and c.last[rank].load]
        gaps.sort(key=lambda g: g.load or 0.0)
        loads = [g.load or 0.0 for g in gaps]
        series.append(Series.of(f"rank {rank}", loads, [g.percent() for g in gaps], colour=k))
    return Panel(
        "each point is one data set; each rank and full fine-tuning at their best rates",
        f"bits of what is new / ({BITS_PER_PARAMETER:g} bits x trained parameters)",
        "regret, % of full fine-tuning's gain",
        series,
        log_x=True,
        band=(0.0, 100 * ALLOWED),
    )


def _over_updates(cells: Sequence[Cell]) -> Section:
    rows: Rows = [["cell", "rank", f"gap at {FIRST} updates [95%]", "at the last [95%]", "growth"]]
    panels = []
    for cell in cells:
        series = []
        for k, (r, g) in enumerate(cell.last.items(), 1):
            if r not in cell.first:
                continue
            first = cell.first[r]
            estimates = [first.mean(), g.mean()]
            grown = with_interval(growth(first, g), signed)
            rows.append([cell.name, str(r), *(with_interval(e, signed) for e in estimates), grown])
            series.append(Series.of(f"rank {r}", [FIRST, cell.steps], estimates, colour=k))
        if series:
            y = "LoRA's loss - full fine-tuning's (nats)"
            lines = {"full fine-tuning": 0.0}
            panels.append(Panel(cell.name, "updates", y, series, log_x=True, lines=lines))
    text = ["A lack of capacity lets the gap grow with updates; slower learning lets it shrink."]
    caption = "the gap in nats after few and after many updates"
    return Section("Speed or capacity", rows, text, "growth.png", panels, caption)


def _by_context(cells: Sequence[Cell]) -> Section:
    rows: Rows = [["cell", "rank", "changed contexts [95%]", "unchanged contexts [95%]"]]
    for cell in cells:
        for r, parts in cell.parts.items():
            if parts:
                shown = [with_interval(over_seeds(parts[k]), signed) for k in PARTS]
                rows.append([cell.name, str(r), *shown])
    text = [
        "What the contexts whose next symbols are new, and those where nothing is new, add to the "
        "gap, in nats: the share of the contexts times the gap on them, interpolated to the best "
        "rates."
    ]
    return Section("Where the gap is", rows, text)
