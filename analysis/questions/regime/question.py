"""Question: does LoRA give up nothing while little is new in the data, and where does that end.

A cell is a data set with a known amount of what is new, on one base. In every cell each rank is
compared with full fine-tuning, both at their own best rates, after the last update and after FIRST
updates, which are a prefix of the same runs. Verdicts are given cell by cell.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.inference.estimate import Estimate, Verdict, number, signed, with_interval
from analysis.inference.gates import Gate, GateCode
from analysis.measures.at_best import over_seeds
from analysis.measures.regret import (
    ALLOWED,
    BITS_PER_PARAMETER,
    PARTS,
    Needed,
    growth,
    mean_of,
    rank_needed,
)
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
    gates_on_gap,
    judge_claims,
)
from analysis.questions.regime.cells import EIGHTH, FIRST, Cell, cells_of
from analysis.questions.regime.law import ESTIMANDS as LAW_ESTIMANDS
from analysis.questions.regime.law import law_section, measured_laws

ESTIMANDS = (
    "over_allowed_low",
    "over_allowed_beyond",
    "over_allowed_fitting",
    "over_allowed_overfull",
    "gap_growth",
    "gap_low",
    "gap_nothing",
    "gap_matrices",
    "unchanged_minus_changed",
    "over_allowed_real",
    *LAW_ESTIMANDS,
)
LOG_ESTIMANDS: tuple[str, ...] = ()


def analyse(table: pd.DataFrame, question: dict[str, Any], kept: Path | None = None) -> Analysis:
    """Judge every claim in the cells that it is about, and draw the map."""
    cells = cells_of(table)
    verdicts: list[Verdict] = []
    members: dict[str, list[Optimum]] = {}
    open_claims = set(ESTIMANDS)
    found = {c.name: _measured(c) for c in cells} | measured_laws(cells)
    for name, (measured, members[name]) in found.items():
        seeds = fewest_seeds(members[name])
        for estimand in measured:
            asked = claims_about(question, estimand)
            verdicts += judge_claims(asked, measured, LOG_ESTIMANDS, name, seeds)
        open_claims -= measured.keys()
    for estimand in sorted(open_claims):
        nothing = {estimand: (Estimate(None), [Gate(GateCode.NO_CELL)])}
        asked = claims_about(question, estimand)
        verdicts += judge_claims(asked, nothing, LOG_ESTIMANDS, "no cell")
    measures = {
        "cells": [_plain(c) for c in cells],
        "read": {
            "over_allowed_low": f"rank of {1 / EIGHTH:g} of the width",
            "gap_growth": f"smallest rank, update {FIRST} to the last",
        },
    }
    sections = [_map(cells), law_section(cells), _over_updates(cells), _by_context(cells)]
    sections += _controls(cells)
    optima = [o for c in cells for o in c.optima]
    return Analysis(optima, correct(verdicts, question), sections, measures, members)


def _measured(cell: Cell) -> tuple[Measured, list[Optimum]]:
    """Return the estimands that this cell answers, and the optima that they rest on."""
    gap = cell.last.get(cell.eighth)
    if gap is None:
        missing = [Gate(GateCode.MISSING, "lora" if cell.optima else "fullft")]
        return {"over_allowed_low": (Estimate(None), missing)}, []
    measured: Measured = {}
    new, at_eighth = cell.novelty, gates_on_gap(gap)
    if new is None:
        return {"over_allowed_real": (gap.over_allowed(), at_eighth)}, [gap.lora, gap.full]
    if not cell.reaches_eighth:
        at_eighth.append(Gate(GateCode.MISSING, f"a rank of 1/{EIGHTH} of the width or more"))
    if new.nothing:
        # Five percent of almost no gain would ask for an error that no number of seeds reaches.
        return {"gap_nothing": (gap.mean(), [g for g in at_eighth if g.code != GateCode.NOISY])}, [
            gap.lora,
            gap.full,
        ]
    if new.low:
        measured["over_allowed_low"] = (gap.over_allowed(), at_eighth)
        measured["gap_low"] = (gap.mean(), at_eighth)
        if parts := cell.parts[cell.eighth]:
            apart = parts["unchanged"].paired(parts["changed"], lambda a, b: a - b)
            better = gap.mean().high
            none = [] if better is not None and better < 0 else [Gate(GateCode.NO_ADVANTAGE)]
            measured["unchanged_minus_changed"] = (over_seeds(apart), at_eighth + none)
        if cell.controls:
            control = cell.controls[0]
            measured["gap_matrices"] = (control.mean(), gates_on_gap(control))
    else:
        measured["over_allowed_beyond"] = (gap.over_allowed(), at_eighth)
    used = [gap.lora, gap.full, *(c.lora for c in cell.controls)]
    for estimand, rank in (("fitting", cell.fitting), ("overfull", cell.overfull)):
        if rank is not None:
            at_rank = cell.last[rank]
            measured[f"over_allowed_{estimand}"] = (at_rank.over_allowed(), gates_on_gap(at_rank))
            used.append(at_rank.lora)
    smallest = min(cell.last)
    if smallest in cell.first:
        first, last = cell.first[smallest], cell.last_on_first_rows[smallest]
        behind = any(low is not None and low > 0 for low in (first.mean().low, last.mean().low))
        none = [] if behind else [Gate(GateCode.NO_GAP)]
        measured["gap_growth"] = (
            growth(first, last),
            gates_on_gap(first) + gates_on_gap(last) + none,
        )
        used.append(last.lora)
    return measured, distinct(used)


def _needed(cell: Cell) -> Needed:
    """Return the smallest rank with no regret; a rank that must not be judged tells nothing."""
    return rank_needed(
        {r: Estimate(None) if gates_on_gap(g) else g.over_allowed() for r, g in cell.last.items()}
    )


def _plain(cell: Cell) -> dict[str, Any]:
    needed = _needed(cell)
    return {
        "cell": cell.name,
        "updates": cell.steps,
        "rank_needed": [needed.above, None if math.isinf(needed.up_to) else needed.up_to],
        "ranks": [
            {
                "rank": r,
                "load": g.load,
                "gain_nats": mean_of(g.gain) if g.gain.best else None,
                "gap_nats": g.mean().plain(),
                "parts_nats": {k: mean_of(v) for k, v in cell.parts[r].items()},
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
            if str(needed := _needed(c)) != "-"
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
        for k, (r, g) in enumerate(cell.last_on_first_rows.items(), 1):
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
            ticks = [(float(n), str(n)) for n in (FIRST, cell.steps)]
            panels.append(
                Panel(cell.name, "updates", y, series, log_x=True, lines=lines, ticks=ticks)
            )
    text = [
        "A lack of capacity lets the gap grow with updates; slower learning lets it shrink. Both "
        "gaps are on the same held-out rows."
    ]
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


def _controls(cells: Sequence[Cell]) -> list[Section]:
    """Show the controls, which are no ranks; no section without any."""
    rows: Rows = [["cell", "full fine-tuning of", "its loss less that of everything [95%]"]]
    rows += [
        [c.name, str(g.lora.curve.key["layers"]), with_interval(g.mean(), signed)]
        for c in cells
        for g in c.controls
    ]
    text = [
        "Full fine-tuning of the matrices that LoRA adapts, and nothing else: what it gives up, "
        "LoRA gives up by its place and not by its rank."
    ]
    return [Section("Controls", rows, text)] if len(rows) > 1 else []
