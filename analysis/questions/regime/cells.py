"""The cells of the question `regime`: what is new in each, and each rank's gap at two lengths."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd

from analysis.inference.estimate import Estimate
from analysis.measures.at_best import AtBest, over_seeds
from analysis.measures.needed_rank import change_of_needed, rank_needed_by_seed
from analysis.measures.regret import (
    Gap,
    Novelty,
    bits_of,
    controls_of,
    gaps_of,
    loads_of,
    novelty_of,
    parts_at_best,
)
from analysis.optimum.fit import fit_all
from analysis.optimum.optimum import Optimum
from analysis.questions.base import gates_on_gap
from analysis.runs.lr_curves import lr_curves, title
from analysis.runs.prefixes import at_step, on_curve_rows
from analysis.runs.table import TableError

FIRST = 64
"""Updates after which the gap is first read, to see whether it grows."""
EIGHTH = 8
"""The study's ranks end at an eighth of the hidden size."""
FITTING = 0.5
"""A rank of this load or less has room for what is new, with a factor 2 to spare."""
Gaps = dict[int, Gap]


@dataclass(frozen=True)
class Cell:
    """One data set on one base."""

    name: str
    model: str
    novelty: Novelty | None
    """None for real data, of which the information is not known."""
    batch_size: int
    steps: int
    eighth: int
    """The smallest rank tried of an eighth of the hidden size or more; if none is, the highest."""
    reaches_eighth: bool
    """Whether `eighth` is a rank of an eighth of the hidden size or more."""
    last: Gaps
    """By rank, after the last update."""
    first: Gaps
    """After FIRST updates; empty for shorter runs, and where the rate is not constant."""
    last_on_first_rows: Gaps
    """After the last update, on the held-out rows that `first` is on, which may be fewer."""
    parts: dict[int, dict[str, AtBest[float]]]
    """By rank: what the changed and the unchanged contexts add to the gap, in nats."""
    optima: list[Optimum]
    bits: dict[str, float]
    """Of the data set, by each count that is known."""
    loads: dict[int, dict[str, float]]
    """By rank and count."""
    controls: list[Gap]
    """Full fine-tuning of some matrices alone against that of everything."""

    @property
    def fitting(self) -> int | None:
        """The smallest rank with room for what is new by the generator's bits; None without one."""
        ranks = [r for r, g in self.last.items() if g.load is not None and g.load <= FITTING]
        return min(ranks, default=None)

    @property
    def overfull(self) -> int | None:
        """The largest rank without room for what is new by that count; None without one."""
        ranks = [r for r, g in self.last.items() if g.load is not None and g.load > 1]
        return max(ranks, default=None)

    @cached_property
    def needed(self) -> AtBest[float]:
        """log2 of the rank that is needed, by seed."""
        return _needed(self.last)

    @cached_property
    def rank_needed(self) -> Estimate:
        """The needed rank, over seeds; no value if it is outside the ranks tried in a seed."""
        values = list(self.needed.best.values())
        if not values or not all(map(math.isfinite, values)):
            return Estimate(None)
        e = over_seeds(self.needed)
        low, value, high = (None if v is None else 2**v for v in (e.low, e.value, e.high))
        return Estimate(value, low, high, e.n, e.flags)

    def load_needed(self, count: str) -> Estimate:
        """Return the load of the needed rank, whose parameters are in proportion to it."""
        e, loads = self.rank_needed, {r: v[count] for r, v in self.loads.items() if count in v}
        if not loads:
            return Estimate(None)
        of_rank_1 = float(np.mean([r * load for r, load in loads.items()]))
        low, value, high = (None if v is None else of_rank_1 / v for v in (e.high, e.value, e.low))
        return Estimate(value, low, high, e.n, e.flags)

    @cached_property
    def needed_over_updates(self) -> AtBest[float] | None:
        """Change of `needed` per doubling of the updates, from FIRST on; None if not known."""
        if not self.first:
            return None
        doublings = math.log2(self.steps / FIRST)
        return change_of_needed(_needed(self.first), _needed(self.last_on_first_rows), doublings)


def _needed(gaps: Gaps) -> AtBest[float]:
    """Return log2 of the needed rank; a gap that must not be judged tells nothing of it."""
    return rank_needed_by_seed({r: g for r, g in gaps.items() if not gates_on_gap(g)})


def cells_of(table: pd.DataFrame) -> list[Cell]:
    """Fit every cell of a table, from little to much that is new."""
    found = []
    for _, part in table.groupby(["model", "dataset", "batch_size", "steps"], sort=False):
        runs = part.reset_index(drop=True)
        optima, steps = fit_all(lr_curves(runs)), int(runs["steps"].iloc[0])
        last = _by_rank(gaps_of(runs, optima))
        first: Gaps = {}
        again: Gaps = {}
        constant = (runs["schedule"] == "constant").all()
        if steps > FIRST and constant and len(early := at_step(runs, FIRST)):
            first = _by_rank(gaps_of(early, fit_all(lr_curves(early))))
            same = on_curve_rows(runs)
            again = _by_rank(gaps_of(same, fit_all(lr_curves(same))))
        wanted = int(runs["hidden_size"].iloc[0]) / EIGHTH
        novelty = novelty_of(json.loads(runs["spec"].iloc[0])["dataset"])
        bits = bits_of(runs, next(iter(last.values())).full) if last else {}
        found.append(
            Cell(
                name=f"{runs['model'].iloc[0]}, {novelty.name if novelty else _data(runs)}",
                model=str(runs["model"].iloc[0]),
                novelty=novelty,
                batch_size=int(runs["batch_size"].iloc[0]),
                steps=steps,
                eighth=min((r for r in last if r >= wanted), default=max(last, default=0)),
                reaches_eighth=max(last, default=0) >= wanted,
                last=last,
                first=first,
                last_on_first_rows=again,
                parts={r: parts_at_best(runs, g) for r, g in last.items()},
                optima=optima,
                bits=bits,
                loads={r: loads_of(runs, g.lora, bits) for r, g in last.items()},
                controls=controls_of(runs, optima),
            )
        )
    return sorted(_distinctly_named(found), key=lambda c: (c.model, _load(c)))


def _distinctly_named(cells: Sequence[Cell]) -> list[Cell]:
    """Give cells that share a name, such as those of other lengths, their full titles instead.

    Verdicts, and the optima that they rest on, are found by the name.
    """
    times = Counter(c.name for c in cells)
    return [c if times[c.name] == 1 else replace(c, name=title(c.optima[0].curve)) for c in cells]


def _data(runs: pd.DataFrame) -> str:
    return str(runs["dataset"].iloc[0])


def _by_rank(gaps: Sequence[Gap]) -> Gaps:
    found = {g.rank: g for g in gaps}
    if len(found) < len(gaps):
        raise TableError(
            "a cell has two curves of one rank. Compare one set of layers at one alpha at a time."
        )
    return found


def _load(cell: Cell) -> float:
    loads = [g.load for g in cell.last.values() if g.load is not None]
    return max(loads, default=0.0)
