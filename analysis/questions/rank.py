"""Question: how does the speed of learning depend on the rank, and do all ranks start equally.

The claims expect the slope of ln(rho) over log2(rank) to be 0 where only rules are new, which any
rank has the capacity to store, and above 0 elsewhere. The step from which a rank falls behind is
measured at its optimal learning rate, paired by seed.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from analysis.inference.decide import MIN_SEEDS, Gate, GateCode
from analysis.inference.estimate import Estimate, number, rate, signed
from analysis.inference.rows import Row
from analysis.measures import speed
from analysis.measures.at_best import AtBest, pooled_over
from analysis.measures.ratio import MIN_RANK, lr_drift, ratio_of
from analysis.measures.regret import novelty_of
from analysis.questions import base
from analysis.runs.curves import Points, learning_curves, runs_of, starts_on_curve, while_unsolved


@dataclass(frozen=True)
class Ranks(base.TwoArms):
    """The ranks of one model and data set."""

    every: pd.DataFrame
    """All runs, uncut, including those with other initialisations of A (draws of A)."""

    @cached_property
    def points(self) -> dict[int, AtBest[Points]]:
        """Learning curves at the optimum by rank; 0: full fine-tuning."""
        found = dict(zip(map(id, self.optima), speed.curves_at_best(self.runs, self.optima)))
        return {r: found[id(o)] for r, o in self.by_rank.items()}

    @cached_property
    def last(self) -> int:
        """The last update at which the highest rank is compared with full fine-tuning."""
        return speed.read_to([self.points[0], self.points[self.top]])

    @cached_property
    def logs(self) -> dict[int, AtBest[float]]:
        """ln(rho) by rank."""
        return {r: speed.log_rho(self.points[r], self.points[0]) for r in self.lora}

    @cached_property
    def rho(self) -> dict[int, Estimate]:
        """rho by rank."""
        pooled = pooled_over(self.logs.values())
        return {r: speed.rho(self.points[r], self.points[0], pooled) for r in self.lora}

    @cached_property
    def slope(self) -> Estimate:
        """Slope of ln(rho) over log2(rank)."""
        return speed.slope_by_rank(self.logs)

    def gates_on(self, ranks: Sequence[int]) -> list[Gate]:
        """List the gates on these ranks' speeds."""
        ends = [0, self.top]
        both = [self.by_rank[r] for r in ends], [self.points[r].best for r in ends]
        return base.gates_on_speed([self.by_rank[r] for r in ranks]) + speed.stalled(*both)

    @cached_property
    def in_regime(self) -> bool:
        """Whether only rules are new; False on real data, where this is not known."""
        new = novelty_of(json.loads(self.every["spec"].iloc[0])["dataset"])
        return new is not None and new.low

    def gates_on_slope(self) -> list[Gate]:
        """List the gates of the slope over the ranks."""
        gates = self.gates_on(list(self.by_rank))
        if self.slope.value is None:
            gates.append(Gate(GateCode.ONE_RANK if len(self.lora) < 2 else GateCode.ONLY_BOUNDS))
        return gates

    @cached_property
    def departures(self) -> dict[int, AtBest[speed.Departure]]:
        """The step from which each rank is behind, by seed."""
        runs = runs_of(self.runs, self.full.curve)
        start = float(starts_on_curve(runs, learning_curves(runs)).mean())  # before training
        return {
            r: self.points[r].paired(self.points[0], lambda a, b: speed.departure(a, b, start))
            for r in self.lora
        }

    def unresolved(self) -> list[Gate]:
        """Return a gate if all ranks, or all but one, are behind at the first evaluation."""
        if len(self.lora) < 2:
            return [Gate(GateCode.ONE_RANK)]
        gone = [
            str(r)
            for r, d in self.departures.items()
            if d.best and np.mean([v.low == 0 for v in d.best.values()]) > 0.5
        ]
        some = len(self.departures) - len(gone) > 1
        return [] if some else [Gate(GateCode.NO_ORDER, ", ".join(gone))]

    @cached_property
    def start(self) -> speed.Start | None:
        """How long all ranks learn equally; None unless two ranks have several draws of A."""
        return speed.start_of(self.every, self.top)


def conditions(table: pd.DataFrame) -> list[Ranks]:
    """Return the one condition of a model and data set."""
    plain = (table["method"] == "fullft") | (table["init_seed"].fillna(0) == 0)
    runs, note = while_unsolved(table[plain])
    optima = base.fit(runs)
    return [Ranks(optima[0].curve.group, runs, optima, note, table)]


def _slope_where(name: str, in_regime: bool) -> base.Estimand:
    """Declare the slope in or beyond the regime; on other data it has the gate NO_CELL."""
    return base.Estimand(
        name,
        lambda c: c.slope if c.in_regime == in_regime else base.UNKNOWN,
        lambda c: c.gates_on_slope() if c.in_regime == in_regime else [Gate(GateCode.NO_CELL)],
        at=lambda c: f"ranks {min(c.lora)} to {c.top}, to update {c.last}",
    )


def _at_start(name: str, value: str) -> base.Estimand:
    def gates(c: Ranks) -> list[Gate]:
        if c.start is None or c.start.first.spread is None:
            return []
        seeds = c.start.first.spread.n
        found = [Gate(GateCode.FEW_SEEDS, seeds)] if seeds < MIN_SEEDS else []
        if getattr(c.start, value).value is None:
            found.append(Gate(GateCode.NOT_APART))
        return found

    return base.Estimand(
        name,
        lambda c: getattr(c.start, value) if c.start else None,
        gates,
        absent="redraws of A at two ranks",
        at=lambda c: f"all ranks at {rate(c.start.lr)}, {c.last} updates",
    )


ESTIMANDS = [
    _slope_where("rho_slope_in_regime", True),
    _slope_where("rho_slope_beyond", False),
    base.Estimand(
        "departure_slope",
        lambda c: speed.slope_of(c.departures),
        lambda c: c.gates_on(list(c.by_rank)) + c.unresolved(),
        at=lambda c: f"to update {c.last}",
    ),
    base.Estimand(
        "rho_top_rank",
        lambda c: c.rho[c.top],
        lambda c: c.gates_on([0, c.top]),
        log=True,
        used=lambda c: [c.by_rank[c.top], c.full],
        at=lambda c: f"rank {c.top}, to update {c.last}",
    ),
    # Judged on a linear scale, although it is a number of updates.
    _at_start("identical_steps", "first"),
    base.Estimand(
        "lr_drift_per_doubling",
        lambda c: lr_drift(c.high),
        lambda c: base.gates_on(c.high) + base.gates_on_ranks(c.high),
    ),
    _at_start("difference_growth", "growth"),
    base.Estimand(
        "rate_over_rank_1",
        lambda c: ratio_of(c.high, c.lora[1]) if 1 in c.lora and c.high else None,
        lambda c: base.gates_on([c.lora[1], *c.high]),
        absent=f"rank 1, or of ranks from {MIN_RANK} up",
        log=True,
    ),
    base.Estimand(
        "straightness",
        lambda c: speed.least_straight(c.points[0], c.points[c.top]),
        lambda c: c.gates_on([0, c.top]),
        log=True,
        used=lambda c: [c.by_rank[c.top], c.full],
        at=lambda c: (
            f"rank {c.top} and full fine-tuning, from update {max(1, c.last // speed.SPAN**2)} to "
            f"{c.last}"
        ),
    ),
]


def report(asked: base.Asked, c: Ranks) -> tuple[list[Row], list[base.Section]]:
    """Return the steps from which ranks are behind, and the start of learning."""

    def shown(d: speed.Departure) -> str:
        """Format the step from which a curve is behind, or the bound on it."""
        return f"> {number(d.low)}" if math.isinf(d.high) else "< " * (d.low == 0) + number(d.high)

    rows: list[list[Any]] = [
        [rank, ", ".join(map(shown, by_seed.best.values())), c.rho[rank]]
        for rank, by_seed in c.departures.items()
    ]
    every = [d for by_seed in c.departures.values() for d in by_seed.best.values()]
    never, at_once = sum(math.isinf(d.high) for d in every), sum(d.low == 0 for d in every)
    text = [
        f"Of {len(every)} curves {never} do not fall behind within the run, and {at_once} are "
        "behind at the first evaluation. The slope counts these as censored: later than the last "
        "evaluation, earlier than the first.",
        c.note,
        "A rank is behind from the update from which its loss stays above full fine-tuning's by "
        f"{speed.DEPARTED:.0%} of full fine-tuning's gain over the whole run. rho: full "
        "fine-tuning's updates to the rank's last loss, over the rank's own. Curves end at update "
        f"{c.last}.",
    ]
    head = "rank | behind from step, by seed | rho [95%]"
    behind = base.Section.of("Falling behind", head, rows, text)
    rows = [
        [r, "never" if math.isinf(step) else step, signed(difference), signed(band)]
        for r, step, difference, band in (c.start.ranks if c.start else ())
    ]
    head = "rank | leaves the band at step | difference at the first step (nats) | band there"
    lr = f"Ranks against redraws of A, at one learning rate ({c.start.lr:g})." if c.start else ""
    return [], [behind, base.Section.of("The start", head, rows, [lr])]


QUESTION = base.Question(ESTIMANDS, conditions, report, split_by=base.TASK)
