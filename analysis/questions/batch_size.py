"""Question: does LoRA fall behind full fine-tuning as the batch grows, at any rank.

At a fixed number of examples, every batch size has its own runs. At a fixed number of updates, the
runs are cut at the last step at which all were evaluated. Each cell is at its own best rate. The
measure is rho (step efficiency), since a gap in nats changes along the learning curve and rho does
not.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.inference.estimate import Estimate, exp_of, number, rate, signed, with_interval
from analysis.inference.gates import Gate, GateCode
from analysis.inference.seeds import PooledVariance
from analysis.measures.at_best import AtBest, over_seeds
from analysis.measures.efficiency import at_best, log_rho
from analysis.optimum.fit import fit_all
from analysis.optimum.optimum import Optimum
from analysis.questions.base import (
    Analysis,
    Panel,
    Section,
    Series,
    correct,
    distinct,
    fewest_seeds,
    gates_on,
    judge_claims,
    pairs_of,
    pooled_over,
)
from analysis.runs.lr_curves import lr_curves
from analysis.runs.prefixes import at_step, steps_seen

ESTIMANDS = (
    "slope_fixed_examples",
    "slope_fixed_steps",
    "slope_difference",
    "rho_at_32",
    "rho_at_256",
    "rho_at_512",
    "rho_at_1024",
)
LOG_ESTIMANDS = ("rho_at_32", "rho_at_256", "rho_at_512", "rho_at_1024")
WAYS = ("fixed examples", "fixed updates")


@dataclass(frozen=True)
class Cell:
    """One batch size and rank, at its own best rate. `logs`: ln(rho) by seed."""

    batch: int
    rank: int
    lora: Optimum
    full: Optimum
    logs: AtBest[float]
    pooled: PooledVariance | None = None
    """Variance over seeds, pooled over all cells."""

    @property
    def bound(self) -> bool:
        """Whether any seed has only a bound.

        Full fine-tuning then has the common loss never, or at its first evaluation already.
        """
        return not all(map(math.isfinite, self.logs.best.values()))

    @property
    def rho(self) -> Estimate:
        """rho over the seeds, or a bound if any seed has only a bound."""
        logs = self.logs.best
        if logs and not self.bound:
            return exp_of(over_seeds(self.logs, self.pooled))
        known = [v for v in logs.values() if math.isfinite(v)]
        below = any(v == -math.inf for v in logs.values())
        end = None if not known else math.exp(max(known) if below else min(known))
        low, high = (None, end) if below else (end, None)
        return Estimate(None, low, high, n=len(logs))


def cells_of(table: pd.DataFrame) -> list[Cell]:
    """Fit every cell of a table in which each batch size has one number of updates."""
    optima = fit_all(lr_curves(table))
    points = dict(zip(map(id, optima), at_best(table, optima)))
    found = []
    for lora, full in pairs_of(optima):
        logs = log_rho(points[id(lora)], points[id(full)])
        batch, rank = int(lora.curve.key["batch_size"]), int(lora.curve.key["rank"])
        found.append(Cell(batch, rank, lora, full, logs))
    pooled = pooled_over(c.logs for c in found)
    cells = (dataclasses.replace(c, pooled=pooled) for c in found)
    return sorted(cells, key=lambda c: (c.rank, c.batch))


def slopes_of(cells: Sequence[Cell]) -> AtBest[float]:
    """Return the least-squares slope of ln(rho) per doubling of the batch, by seed.

    Seeds for which a cell has only a bound are left out.
    """
    if len(cells) < 2:
        return AtBest({})
    batches = [math.log2(c.batch) for c in cells]

    def known(by_seed: dict[int, list[float]]) -> dict[int, float]:
        return {
            s: float(np.polyfit(batches, v, 1)[0])
            for s, v in by_seed.items()
            if np.isfinite(v).all()
        }

    together = cells[0].logs.map(lambda v: [v])
    for c in cells[1:]:
        together = together.paired(c.logs, lambda a, v: [*a, v])
    return AtBest(known(together.best), tuple(map(known, together.likely)))


def slope(cells: Sequence[Cell], pooled: PooledVariance | None = None) -> Estimate:
    """Return the mean slope over seeds; without an interval for fewer than two seeds."""
    return over_seeds(slopes_of(cells), pooled)


def analyse(table: pd.DataFrame, question: dict[str, Any], kept: Path | None = None) -> Analysis:
    """Judge the slopes, their difference between ranks, and popular thresholds."""
    common = [s for s in steps_seen(table) if s <= int(table["steps"].min())]
    step = common[-1] if common else 0
    whole = cells_of(table)
    ways = dict(zip(WAYS, (whole, cells_of(at_step(table, step)) if common else [])))
    optima = distinct(o for c in whole for o in (c.full, c.lora)) or fit_all(lr_curves(table))
    group = f"{optima[0].curve.key['model']} on {optima[0].curve.key['dataset']}"
    ranks = sorted({c.rank for c in whole})
    slopes = {way: _by_rank(cells, ranks) for way, cells in ways.items()}
    top = ranks[-1] if ranks else 0
    by_top = {way: [c for c in cells if c.rank == top] for way, cells in ways.items()}
    ends = [c for c in whole if c.rank in (top, ranks[0])] if len(ranks) > 1 else []
    from_cells = {  # estimand -> what was measured, and the cells that it rests on
        "slope_fixed_examples": (slopes[WAYS[0]].get(top, Estimate(None)), by_top[WAYS[0]]),
        "slope_fixed_steps": (slopes[WAYS[1]].get(top, Estimate(None)), by_top[WAYS[1]]),
        "slope_difference": (_difference(whole, ranks), ends),
        **{f"rho_at_{n}": _at(by_top[WAYS[0]], n) for n in (32, 256, 512, 1024)},
    }
    measured = {e: (v, _gates(cells, _absent(e, ranks))) for e, (v, cells) in from_cells.items()}
    verdicts = []
    for name, claim in question["claims"].items():
        _, cells = from_cells.get(claim["estimand"], (None, []))
        seeds = fewest_seeds([o for c in cells for o in (c.full, c.lora)])
        one = {**question, "claims": {name: claim}}
        verdicts += judge_claims(one, measured, LOG_ESTIMANDS, group, seeds)
    examples = sorted(set((table["batch_size"] * table["steps"]).astype(int)))
    sections = [_section(way, cells, slopes[way], step, examples) for way, cells in ways.items()]
    lengths = (f"{', '.join(f'{n:,}' for n in examples)} examples", f"{step} updates")
    panels = [_panel(length, cells) for length, cells in zip(lengths, ways.values()) if cells]
    caption = "step efficiency over the batch size"
    sections.append(Section("Batch size", figure="batch.png", panels=panels, caption=caption))
    measures = {
        "slopes": {way: {str(r): e.plain() for r, e in s.items()} for way, s in slopes.items()},
        "read": _read(top, slopes, step),
    }
    return Analysis(optima, correct(verdicts, question), sections, measures, {group: optima})


def _read(top: int, slopes: dict[str, dict[int, Estimate]], step: int) -> dict[str, str]:
    """Describe where each slope was measured, with the other ranks' slopes."""
    out = {}
    for way, estimand in zip(WAYS, ("slope_fixed_examples", "slope_fixed_steps")):
        others = [
            f"rank {r}: {with_interval(e)}"
            for r, e in slopes[way].items()
            if r != top and e.value is not None
        ]
        at = [f"at {step} updates"] if way == WAYS[1] else []
        out[estimand] = "; ".join([", ".join([f"rank {top}", *at]), *others])
    return out


def _absent(estimand: str, ranks: Sequence[int]) -> Gate:
    """Return the gate of an estimand without any cell."""
    if estimand == "slope_difference" and len(ranks) == 1:
        return Gate(GateCode.ONE_RANK)
    batch = estimand.removeprefix("rho_at_")
    at_batch = f"batch {batch}" if batch != estimand else ""
    return Gate(GateCode.MISSING, at_batch or "lora beside fullft at a common step")


def _gates(cells: Sequence[Cell], absent: Gate) -> list[Gate]:
    """List the gates of a measurement on these cells; `absent` if there are none."""
    if not cells:
        return [absent]
    rests = distinct(o for c in cells for o in (c.full, c.lora))
    gates = [g.at(f"batch {o.curve.key['batch_size']}, ") for o in rests for g in gates_on([o])]
    return gates + [
        Gate(GateCode.ONLY_A_BOUND, place=f"batch {c.batch}, rank {c.rank}: ")
        for c in cells
        if c.bound
    ]


def _by_rank(cells: Sequence[Cell], ranks: Sequence[int]) -> dict[int, Estimate]:
    """Return the slope of each rank."""
    mine = {r: [c for c in cells if c.rank == r] for r in ranks}
    return {r: slope(part, _pooled_slope(part)) for r, part in mine.items()}


def _pooled_slope(cells: Sequence[Cell], times: int = 1) -> PooledVariance | None:
    """Return the variance of a slope that follows from the cells' pooled variance over seeds.

    Args:
        times: number of slopes that are added or subtracted.
    """
    pooled = cells[0].pooled if cells else None
    far = float(np.var(np.log2([c.batch for c in cells])) * len(cells)) if cells else 0.0
    return (
        None if pooled is None or far == 0 else PooledVariance(times * pooled.var / far, pooled.df)
    )


def _difference(cells: Sequence[Cell], ranks: Sequence[int]) -> Estimate:
    """Return the slope at the highest rank minus that at the lowest, paired by seed."""
    if len(ranks) < 2:
        return Estimate(None)
    by_rank = [[c for c in cells if c.rank == r] for r in (ranks[-1], ranks[0])]
    batches = {c.batch for c in by_rank[0]} & {c.batch for c in by_rank[1]}
    high, low = (slopes_of([c for c in part if c.batch in batches]) for part in by_rank)
    pooled = _pooled_slope([c for c in by_rank[0] if c.batch in batches], 2)
    return over_seeds(high.paired(low, lambda a, b: a - b), pooled)


def _at(cells: Sequence[Cell], batch: int) -> tuple[Estimate, list[Cell]]:
    """Return rho and its cell at the largest batch tried that is at most `batch`.

    Batches below half of `batch` do not count.
    """
    near = [c for c in cells if batch / 2 < c.batch <= batch] or [
        c for c in cells if batch / 2 <= c.batch <= batch
    ]
    if not near:
        return Estimate(None), []
    cell = max(near, key=lambda c: c.batch)
    return cell.rho, [cell]


HEAD = ("batch", "updates", "rank", "best FullFT LR", "best LoRA LR", "gap (nats)", "rho [95%]")


def _section(
    way: str, cells: Sequence[Cell], slopes: dict[int, Estimate], step: int, examples: Sequence[int]
) -> Section:
    rows = [list(HEAD)]
    for c in cells:
        lora, full = c.lora.best_nll, c.full.best_nll
        rows.append(
            [
                str(c.batch),
                str(int(c.lora.curve.key["steps"])),
                str(c.rank),
                with_interval(c.full.best_lr, rate),
                with_interval(c.lora.best_lr, rate),
                signed(None if lora is None or full is None else lora - full),
                with_interval(c.rho),
            ]
        )
    at = f"{step} updates, the first part of the same runs"
    if way == WAYS[0]:
        at = f"{', '.join(map(str, examples))} examples"
    by_rank = "; ".join(f"rank {r} {with_interval(e)}" for r, e in slopes.items())
    text = f"At {at}. Slope of ln(rho) per doubling of the batch: {by_rank}."
    return Section(f"At {way}", rows, [text])


def _panel(length: str, cells: Sequence[Cell]) -> Panel:
    series = []
    for r in sorted({c.rank for c in cells}):
        mine = [c for c in cells if c.rank == r]
        series.append(Series.of(f"rank {r}", [c.batch for c in mine], [c.rho for c in mine]))
    return Panel(
        f"after {length}, whatever the batch",
        "batch size (sequences)",
        "rho: FullFT's updates / LoRA's",
        series,
        log_x=True,
        log_y=True,
        ticks=[(b, number(b)) for b in sorted({c.batch for c in cells})],
        lines={"full fine-tuning": 1.0},
    )
