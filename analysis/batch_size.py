"""Does LoRA fall behind full fine-tuning as the batch grows, whatever the rank?

At a fixed number of examples every batch size has runs of its own; at a fixed number of updates all are cut at the longest
step that all were evaluated at. Each cell is at its own best rate. rho is the measure: a gap in nats grows along any learning
curve, rho does not.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis import judging, plots
from analysis.findings import Findings, Section
from analysis.lr_optimum import Optimum, fit_all
from analysis.plots import Panel, Series
from analysis.prefixes import at_step, steps_seen
from analysis.results import Estimate, exp_of, from_sample, number, rate, signed, with_interval
from analysis.step_efficiency import at_best, per_seed
from analysis.table import curves

ESTIMANDS = ("slope_fixed_examples", "slope_fixed_steps", "slope_difference", "rho_at_32", "rho_at_256", "rho_at_512",
             "rho_at_1024")  # fmt: skip
LOG_ESTIMANDS = ("rho_at_32", "rho_at_256", "rho_at_512", "rho_at_1024")
WAYS = ("fixed examples", "fixed updates")


@dataclass(frozen=True)
class Cell:
    """One batch size and rank, at its own best rate. `logs`: ln(rho) by seed."""

    batch: int
    rank: int
    lora: Optimum
    full: Optimum
    logs: dict[int, float]

    @property
    def rho(self) -> Estimate:
        """rho over the seeds; a bound where full fine-tuning never gets there."""
        known = [v for v in self.logs.values() if math.isfinite(v)]
        if len(known) == len(self.logs) and known:
            return exp_of(from_sample(known))
        below = any(v == -math.inf for v in self.logs.values())
        ends = (None, math.exp(max(known)) if known else None) if below else (math.exp(min(known)) if known else None, None)
        return Estimate(None, *ends, n=len(self.logs))


def cells_of(table: pd.DataFrame) -> list[Cell]:
    """Fit every cell of a table in which each batch size has one number of updates."""
    optima = fit_all(curves(table))
    points = dict(zip(map(id, optima), at_best(table, optima)))
    found = []
    for o in (o for o in optima if o.curve.key["method"] == "lora"):
        full = [f for f in optima if f.curve.group == o.curve.group and f.curve.key["method"] == "fullft"]
        if full:
            logs = per_seed(points[id(o)], points[id(full[0])])
            found.append(Cell(int(o.curve.key["batch_size"]), int(o.curve.key["rank"]), o, full[0], logs))
    return sorted(found, key=lambda c: (c.rank, c.batch))


def slope(cells: Sequence[Cell]) -> Estimate:
    """Return the slope of ln(rho) per doubling of the batch: least squares for each seed, Student's interval over seeds.

    A seed in which a cell has only a bound is left out; with fewer than two left there is no interval.
    """
    seeds = set.intersection(*(set(c.logs) for c in cells)) if len(cells) > 1 else set()
    slopes = [
        float(np.polyfit([math.log2(c.batch) for c in cells], [c.logs[s] for c in cells], 1)[0])
        for s in sorted(seeds) if all(math.isfinite(c.logs[s]) for c in cells)
    ]  # fmt: skip
    return from_sample(slopes) if slopes else Estimate(None)


def find(table: pd.DataFrame, question: dict[str, Any]) -> Findings:
    """Judge the slopes, their difference between ranks, and popular thresholds."""
    common = [s for s in steps_seen(table) if s <= int(table["steps"].min())]
    whole = cells_of(table)
    cut = cells_of(at_step(table, common[-1])) if common else []
    ways = dict(zip(WAYS, (whole, cut)))
    examples = sorted(set((table["batch_size"] * table["steps"]).astype(int)))
    optima = list({id(o): o for c in whole for o in (c.full, c.lora)}.values()) or fit_all(curves(table))
    group = f"{optima[0].curve.key['model']} on {optima[0].curve.key['dataset']}"
    ranks = sorted({c.rank for c in whole})
    slopes = {way: {r: slope([c for c in cells if c.rank == r]) for r in ranks} for way, cells in ways.items()}
    gates = {way: _gates(cells) for way, cells in ways.items()}
    top = ranks[-1] if ranks else 0
    measured = {
        "slope_fixed_examples": (slopes[WAYS[0]].get(top, Estimate(None)), gates[WAYS[0]]),
        "slope_fixed_steps": (slopes[WAYS[1]].get(top, Estimate(None)), gates[WAYS[1]]),
        "slope_difference": (_difference(whole, ranks), gates[WAYS[0]] if len(ranks) > 1 else ["one rank only"]),
        **{f"rho_at_{n}": _at(whole, top, n) for n in (32, 256, 512, 1024)},
    }
    seeds = judging.seeds(optima)
    verdicts = judging.corrected(judging.verdicts(question, measured, LOG_ESTIMANDS, group, seeds), question)
    sections = [_section(way, cells, slopes[way], common[-1] if common else 0, examples) for way, cells in ways.items()]
    panels = [_panel(way, cells) for way, cells in ways.items() if cells]
    sections.append(Section("Batch size", figure="batch.png", draw=lambda p: plots.panels(panels, p),
                            caption="step efficiency over the batch size"))  # fmt: skip
    measures = {"slopes": {way: {str(r): e.plain() for r, e in s.items()} for way, s in slopes.items()}}
    return Findings(optima, verdicts, sections, measures, {group: optima})


def _gates(cells: Sequence[Cell]) -> list[str]:
    if not cells:
        return ["no curve of lora beside fullft at a common step"]
    rests = list({id(o): o for c in cells for o in (c.full, c.lora)}.values())
    gates = [f"batch {o.curve.key['batch_size']}, {g}" for o in rests for g in judging.gates([o])]
    return gates + [f"batch {c.batch}, rank {c.rank}: full fine-tuning does not reach LoRA's loss, only a bound"
                    for c in cells if not all(map(math.isfinite, c.logs.values()))]  # fmt: skip


def _difference(cells: Sequence[Cell], ranks: Sequence[int]) -> Estimate:
    """Slope at the highest rank less that at the lowest, paired by seed."""
    if len(ranks) < 2:
        return Estimate(None)
    by_rank = [[c for c in cells if c.rank == r] for r in (ranks[-1], ranks[0])]
    batches = sorted({c.batch for c in by_rank[0]} & {c.batch for c in by_rank[1]})
    seeds = set.intersection(*(set(c.logs) for part in by_rank for c in part))
    values = []
    for s in sorted(seeds):
        logs = [[next(c.logs[s] for c in part if c.batch == b) for b in batches] for part in by_rank]
        if np.isfinite(logs).all():
            high, low = (float(np.polyfit(np.log2(batches), v, 1)[0]) for v in logs)
            values.append(high - low)
    return from_sample(values) if values else Estimate(None)


def _at(cells: Sequence[Cell], rank: int, batch: int) -> tuple[Estimate, list[str]]:
    """rho at the largest batch tried up to `batch` and above half of it."""
    near = [c for c in cells if c.rank == rank and batch / 2 < c.batch <= batch] or \
           [c for c in cells if c.rank == rank and batch / 2 <= c.batch <= batch]  # fmt: skip
    if not near:
        return Estimate(None), [f"no curve of batch {batch}"]
    cell = max(near, key=lambda c: c.batch)
    return cell.rho, _gates([cell])


def _section(way: str, cells: Sequence[Cell], slopes: dict[int, Estimate], step: int, examples: Sequence[int]) -> Section:
    rows = [["batch", "updates", "rank", "best FullFT LR", "best LoRA LR", "gap (nats)", "rho [95%]"]]
    for c in cells:
        known = c.lora.best_nll is not None and c.full.best_nll is not None
        rows.append([str(c.batch), str(int(c.lora.curve.key["steps"])), str(c.rank), with_interval(c.full.best_lr, rate),
                     with_interval(c.lora.best_lr, rate), signed(c.lora.best_nll - c.full.best_nll) if known else "-",
                     with_interval(c.rho)])  # fmt: skip
    told = f"{', '.join(map(str, examples))} examples" if way == WAYS[0] else f"{step} updates, the beginnings of the same runs"
    text = [f"At {told}. Slope of ln(rho) per doubling of the batch: "
            + "; ".join(f"rank {r} {with_interval(e)}" for r, e in slopes.items()) + "."]  # fmt: skip
    return Section(f"At {way}", rows, text)


def _panel(way: str, cells: Sequence[Cell]) -> Panel:
    series = []
    for r in sorted({c.rank for c in cells}):
        mine = [c for c in cells if c.rank == r]
        rhos = [c.rho for c in mine]
        series.append(Series(f"rank {r}", [c.batch for c in mine], [e.value for e in rhos], [e.low for e in rhos],
                             [e.high for e in rhos]))  # fmt: skip
    batches = sorted({c.batch for c in cells})
    return Panel(f"at {way}", "batch size (sequences)", "rho: FullFT's updates / LoRA's", series, log_x=True, log_y=True,
                 ticks=[(b, number(b)) for b in batches], lines={"full fine-tuning": 1.0})  # fmt: skip
