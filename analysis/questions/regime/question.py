"""Question: has LoRA no regret while little is new in the data, and where does that end.

A cell is a data set with a known amount of what is new, on one base. In every cell each rank is
compared with full fine-tuning, both at their own best rates, after the last update and after FIRST
updates, which are a prefix of the same runs. Verdicts are given cell by cell.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.inference.decide import at_level, look_level
from analysis.inference.estimate import Estimate, Verdict, number, signed, with_interval
from analysis.inference.gates import Gate, GateCode
from analysis.measures.at_best import over_seeds
from analysis.measures.needed_rank import sum_of
from analysis.measures.regret import (
    ALLOWED,
    BITS_PER_PARAMETER,
    COUNTS,
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
    "rank_by_updates",
)
LOG_ESTIMANDS: tuple[str, ...] = ()


def analyse(table: pd.DataFrame, question: dict[str, Any], kept: Path | None = None) -> Analysis:
    """Judge every claim in the cells that it is about, and draw regret over rank."""
    cells = cells_of(table)
    verdicts: list[Verdict] = []
    members: dict[str, list[Optimum]] = {}
    open_claims = set(ESTIMANDS)
    found = {c.name: _measured(c) for c in cells} | _needed_over_updates(cells)
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
        "cells": [_plain(c, look_level(int(question.get("rounds", 1)))) for c in cells],
        "read": {
            "over_allowed_low": f"rank of {1 / EIGHTH:g} of the width",
            "gap_growth": f"smallest rank, update {FIRST} to the last",
        },
    }
    sections = [_over_rank(cells), _room(cells), _over_updates(cells), _by_context(cells)]
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


def _needed_over_updates(cells: Sequence[Cell]) -> dict[str, tuple[Measured, list[Optimum]]]:
    """Return how the needed rank changes with training, by base: the mean over its cells."""
    by_model: dict[str, list[Cell]] = {}
    for c in cells:
        if c.novelty is not None and not c.novelty.nothing and c.last:
            by_model.setdefault(c.model, []).append(c)
    found: dict[str, tuple[Measured, list[Optimum]]] = {}
    for model, mine in by_model.items():
        shown = [n for c in mine if (n := c.needed_over_updates) is not None]
        total = sum_of(shown)
        measured: Measured = {"rank_by_updates": (Estimate(None), [Gate(GateCode.NO_LAW)])}
        if total is not None:
            share = 1 / len(shown)
            measured = {"rank_by_updates": (over_seeds(total.map(share.__mul__)), [])}
        gaps = [g for c in mine for g in c.last.values()]
        found[f"{model}, all cells"] = measured, distinct(o for g in gaps for o in (g.lora, g.full))
    return found


def _needed(cell: Cell) -> Needed:
    """Return the smallest rank with no regret; a rank that must not be judged tells nothing."""
    return rank_needed(
        {r: Estimate(None) if gates_on_gap(g) else g.over_allowed() for r, g in cell.last.items()}
    )


def _plain(cell: Cell, level: float) -> dict[str, Any]:
    """Return plain values; regrets with the interval at which verdicts are given."""
    needed = _needed(cell)
    return {
        "cell": cell.name,
        "batch_size": cell.batch_size,
        "updates": cell.steps,
        "bits": cell.bits,
        "rank_interpolated": cell.rank_needed.plain(),
        "loads_needed": {k: cell.load_needed(k).plain() for k in COUNTS},
        "rank_needed": [needed.above, None if math.isinf(needed.up_to) else needed.up_to],
        "ranks": [
            {
                "rank": r,
                "load": g.load,
                "loads": cell.loads[r],
                "gain_nats": mean_of(g.gain) if g.gain.best else None,
                "gap_nats": g.mean().plain(),
                "parts_nats": {k: mean_of(v) for k, v in cell.parts[r].items()},
                "regret_percent": at_level(g.percent(), level).plain(),
                "gap_nats_first": cell.first[r].mean().plain() if r in cell.first else None,
            }
            for r, g in cell.last.items()
        ],
    }


def _over_rank(cells: Sequence[Cell]) -> Section:
    rows: Rows = [["cell", "updates", "rank", "gain of FullFT", "regret, % of the gain [95%]"]]
    for cell in cells:
        for r, g in cell.last.items():
            gain = number(mean_of(g.gain))
            rows.append([cell.name, str(cell.steps), str(r), gain, with_interval(g.percent())])
    text = [
        f"Regret: LoRA's loss minus full fine-tuning's at the last update, in percent of what full "
        f"fine-tuning gains; up to {ALLOWED:.0%} counts as none.",
        *(f"{c.name}: {said}." for c in cells if (said := _needed_text(c))),
    ]
    panels = [_regret_panel(cells)]
    return Section("Regret over rank", rows, text, "regret.png", panels, "regret over rank")


def _needed_text(cell: Cell) -> str:
    """Say which rank is needed, as a range of ranks tried and interpolated; empty if unknown."""
    if str(needed := _needed(cell)) == "-":
        return ""
    said = f"the smallest rank with no regret is {needed}"
    return (
        said
        if (e := cell.rank_needed).value is None
        else f"{said}; interpolated {with_interval(e)}"
    )


LINEAR = 1.0
"""Percent of the gain below which the axis is linear, so that 0 and less have a place."""


def _regret_panel(cells: Sequence[Cell]) -> Panel:
    """Draw a line a cell; where nothing is new there is hardly a gain to take a share of."""
    series = []
    for cell in cells:
        if cell.novelty is not None and cell.novelty.nothing:
            continue
        known = {r: e for r, g in cell.last.items() if (e := g.percent()).value is not None}
        if known:
            name = f"{cell.name}, {cell.steps} updates"
            series.append(Series.of(name, list(known), list(known.values())))
    ranks = sorted({int(r) for s in series for r in s.x})
    lows = [v for s in series for v in s.low if v is not None]
    return Panel(
        "each rank and full fine-tuning at their best rates",
        "rank",
        "regret, % of full fine-tuning's gain",
        series,
        log_x=True,
        log_y=True,
        linear_below=LINEAR,
        lines={f"counts as none: {ALLOWED:.0%}": 100 * ALLOWED},
        ticks=[(float(r), str(r)) for r in ranks],
        y_range=(1.5 * min([-LINEAR, *lows]), None),
    )


def _room(cells: Sequence[Cell]) -> Section:
    """Show the bits of each cell and the load of each rank, by every count."""
    head = [f"load by {words}" for words in COUNTS.values()]
    rows: Rows = [["cell", "updates", "rank", *head, "regret, % of the gain [95%]"]]
    for cell in cells:
        for r, g in cell.last.items():
            loads = [number(cell.loads[r].get(count)) for count in COUNTS]
            rows.append([cell.name, str(cell.steps), str(r), *loads, with_interval(g.percent())])
        if (rank := cell.rank_needed).value is not None:
            loads = [with_interval(cell.load_needed(count)) for count in COUNTS]
            rows.append(
                [cell.name, str(cell.steps), number(rank.value), *loads, f"{100 * ALLOWED:g}"]
            )
    text = [
        f"Load: bits over {BITS_PER_PARAMETER:g} bits for each trained parameter. The generator's "
        "bits are the free numbers of what is new, and the fewest that could do. The first pass, "
        "the study's count, is the summed loss of full fine-tuning over the training rows, each "
        "before it is learned from: the most. Its entropy cannot be learned away; what lies above "
        "it was the price of learning. The last line of each data set is at the interpolated rank "
        f"that has a regret of {ALLOWED:.0%}.",
        *(f"{c.name}: {_bits_text(c)}." for c in cells if c.bits),
    ]
    return Section("Room for what is new", rows, text)


def _bits_text(cell: Cell) -> str:
    rows = cell.batch_size * cell.steps
    counted = ", ".join(f"{w} {cell.bits[c]:,.0f}" for c, w in COUNTS.items() if c in cell.bits)
    return f"bits of {rows:,} rows: {counted}"


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
        "Full fine-tuning of the matrices that LoRA adapts, and nothing else: its regret is due to "
        "which matrices are trained, not to the rank."
    ]
    return [Section("Controls", rows, text)] if len(rows) > 1 else []
