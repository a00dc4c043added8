"""Question: how does the speed of learning depend on the rank, and do all ranks start equally.

The speed is rho at each rank's optimal learning rate, and its slope over log2(rank) is judged: as 0
where the rules alone are new, which any rank holds by the study's capacity, and as above 0
elsewhere.

Also: does the optimal learning rate depend on the rank, and when does each rank fall behind full
fine-tuning. A rank has fallen behind at the step from which its loss stays above full fine-tuning's
by DEPARTED of what full fine-tuning gains in the whole run. This is measured in two ways. The
verdict uses runs at each rank's optimal learning rate, paired by seed. The study's envelope, the
lowest loss over all learning rates at each step, is shown too; no single run follows it.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from analysis.inference.estimate import Estimate, number, rate, signed
from analysis.inference.gates import Gate, GateCode
from analysis.measures.at_best import AtBest, pooled_over
from analysis.measures.qualify import stalled
from analysis.measures.ratio import MIN_RANK, ratio_of
from analysis.measures.regret import novelty_of
from analysis.measures.speed import (
    DEPARTED,
    SPAN,
    Departure,
    Start,
    curves_at_best,
    departure,
    envelope,
    least_straight,
    log_rho,
    read_to,
    rho,
    slope_by_rank,
    slope_of,
    start_of,
)
from analysis.questions import base
from analysis.runs.learning_curves import Points, while_unsolved


@dataclass(frozen=True)
class Ranks(base.TwoArms):
    """The ranks of one model and data set."""

    every: pd.DataFrame
    """All runs, with those from other draws of A, uncut."""

    @cached_property
    def points(self) -> dict[int, AtBest[Points]]:
        """Learning curves at the optimum by rank; 0: full fine-tuning."""
        found = dict(zip(map(id, self.optima), curves_at_best(self.runs, self.optima)))
        return {r: found[id(o)] for r, o in self.by_rank.items()}

    @cached_property
    def last(self) -> int:
        """The update to which the highest rank is compared."""
        return read_to([self.points[0], self.points[self.top]])

    @cached_property
    def logs(self) -> dict[int, AtBest[float]]:
        """ln(rho) by rank."""
        return {r: log_rho(self.points[r], self.points[0]) for r in self.lora}

    @cached_property
    def speed(self) -> dict[int, Estimate]:
        """rho by rank."""
        pooled = pooled_over(self.logs.values())
        return {r: rho(self.points[r], self.points[0], pooled) for r in self.lora}

    @cached_property
    def slope(self) -> Estimate:
        """Slope of ln(rho) over log2(rank)."""
        return slope_by_rank(self.logs)

    def gates_on(self, ranks: Sequence[int]) -> list[Gate]:
        """List the gates of a speed: those of these ranks, and curves that have stalled."""
        ends = [self.points[r].best for r in (0, self.top)]
        optima = [self.by_rank[r] for r in ranks]
        return base.gates_on_speed(optima) + stalled(self.pair(), ends)

    @cached_property
    def in_regime(self) -> bool:
        """Whether the rules alone are new; of real data this is not known, so they are not."""
        new = novelty_of(json.loads(self.every["spec"].iloc[0])["dataset"])
        return new is not None and new.low

    def gates_on_slope(self) -> list[Gate]:
        """List the gates of the slope over the ranks."""
        gates = self.gates_on(list(self.by_rank))
        if self.slope.value is None:
            gates.append(Gate(GateCode.ONE_RANK if len(self.lora) < 2 else GateCode.ONLY_BOUNDS))
        return gates

    @cached_property
    def departures(self) -> dict[int, AtBest[Departure]]:
        """When each rank falls behind, by seed."""
        start = self.full.curve.nll_start
        return {
            r: self.points[r].paired(self.points[0], lambda a, b: departure(a, b, start))
            for r in self.lora
        }

    def unresolved(self) -> list[Gate]:
        """Return a gate if at most one rank is not yet behind at the first evaluation.

        The order in which the others fell behind is then unknown.
        """
        gone = [
            str(r)
            for r, d in self.departures.items()
            if d.best and np.mean([v.at_once for v in d.best.values()]) > 0.5
        ]
        some = len(self.departures) - len(gone) > 1
        return [] if some else [Gate(GateCode.NO_ORDER, ", ".join(gone))]

    @cached_property
    def start(self) -> Start | None:
        """Whether ranks learn equally at first; None without redraws of A at two ranks."""
        return start_of(self.every, self.top)

    @property
    def common_lr(self) -> str:
        """The learning rate at which all ranks were run with several draws of A, in words."""
        again = (self.every["method"] == "lora") & (self.every["init_seed"].fillna(0) > 0)
        lrs = sorted(self.every.loc[again, "lr"].unique())
        return f"all ranks at {' and '.join(map(rate, lrs))}" if lrs else ""


def conditions(table: pd.DataFrame) -> list[Ranks]:
    """Return the one condition of a model and data set."""
    plain = (table["method"] == "fullft") | (table["init_seed"].fillna(0) == 0)
    runs, note = while_unsolved(table[plain])
    optima = base.fit(runs)
    return [Ranks(optima[0].curve.group, runs, optima, note, table)]


def _slope_where(name: str, in_regime: bool) -> base.Estimand[Ranks]:
    """Return the slope as an estimand of one regime; of the other no condition was run."""
    return base.Estimand(
        name,
        lambda c: c.slope if c.in_regime == in_regime else base.UNKNOWN,
        lambda c: c.gates_on_slope() if c.in_regime == in_regime else [Gate(GateCode.NO_CELL)],
        read=lambda c: f"ranks {min(c.lora)} to {c.top}, to update {c.last}",
    )


def _at_start(name: str, value: str) -> base.Estimand[Ranks]:
    return base.Estimand(
        name,
        lambda c: getattr(c.start, value) if c.start else None,
        absent="redraws of A at two ranks",
        read=lambda c: c.common_lr,
    )


ESTIMANDS = [
    _slope_where("rho_slope_in_regime", True),
    _slope_where("rho_slope_beyond", False),
    base.Estimand[Ranks](
        "departure_slope",
        lambda c: slope_of(c.departures),
        lambda c: c.gates_on(list(c.by_rank)) + c.unresolved(),
        read=lambda c: f"to update {c.last}",
    ),
    base.Estimand[Ranks](
        "rho_top_rank",
        lambda c: c.speed[c.top],
        lambda c: c.gates_on([0, c.top]),
        log=True,
        read=lambda c: f"rank {c.top}, to update {c.last}",
    ),
    # Not judged on a log scale: it is 0 if a rank leaves at the first evaluation.
    _at_start("identical_steps", "first"),
    base.LR_DRIFT,
    _at_start("difference_growth", "growth"),
    base.Estimand[Ranks](
        "rate_over_rank_1",
        lambda c: ratio_of(c.high, c.lora[1]) if 1 in c.lora and c.high else None,
        lambda c: base.gates_on([c.lora[1], *c.high]),
        absent=f"rank 1, or of ranks from {MIN_RANK} up",
        log=True,
    ),
    base.Estimand[Ranks](
        "straightness",
        lambda c: least_straight(c.points[0], c.points[c.top]),
        lambda c: c.gates_on([0, c.top]),
        log=True,
        read=lambda c: (
            f"rank {c.top} and full fine-tuning, from update {max(1, c.last // SPAN**2)} to "
            f"{c.last}"
        ),
    ),
]


# ---------------------------------------------------------------- the report


def measures(found: Sequence[Ranks], asked: base.Asked) -> dict[str, Any]:
    """Return the steps from which ranks are behind, by seed."""
    left = found[0].departures
    steps = {r: [None if v.never else v.high for v in d.best.values()] for r, d in left.items()}
    return {"departures": steps}


def _shown(d: Departure) -> str:
    """Format the step from which a curve is behind, or the bound on it."""
    if d.never:
        return f"> {number(d.low)}"
    return f"< {number(d.high)}" if d.at_once else number(d.high)


def sections(found: Sequence[Ranks], asked: base.Asked) -> list[base.Section]:
    """Return when ranks fall behind, and how they start."""
    (c,) = found
    envelopes = {r: envelope(c.runs, o) for r, o in c.by_rank.items()}
    rows = []
    for rank, by_seed in c.departures.items():
        of_seeds = ", ".join(map(_shown, by_seed.best.values()))
        of_envelope = departure(envelopes[rank], envelopes[0], c.full.curve.nll_start)
        rows.append([rank, of_seeds, _shown(of_envelope), c.speed[rank]])
    every = [d for by_seed in c.departures.values() for d in by_seed.best.values()]
    never, at_once = sum(d.never for d in every), sum(d.at_once for d in every)
    text = [
        f"Of {len(every)} curves {never} do not fall behind within the run, and {at_once} are "
        "behind at the first evaluation. The slope counts these as censored: later than the last "
        "evaluation, earlier than the first.",
        c.note,
        "A rank is behind from the update from which its loss stays above full fine-tuning's by "
        f"{DEPARTED:.0%} of full fine-tuning's gain over the whole run. rho: full fine-tuning's "
        f"updates to the rank's last loss, over the rank's own. Curves end at update {c.last}.",
    ]
    single, lowest = [], []
    for r, o in c.by_rank.items():
        curves = [dict(p) for p in c.points[r].best.values()]
        steps = sorted({s for curve in curves for s in curve})
        mean = [float(np.mean([v[s] for v in curves if s in v])) for s in steps]
        single.append(base.Series(o.curve.name, steps, mean))
        points = dict(envelopes[r])
        lowest.append(base.Series(o.curve.name, list(points), list(points.values())))
    panels = [
        base.Panel(title, "updates", "held-out NLL (nats per token)", series, log_x=True)
        for title, series in (
            ("runs at the optimal LR, mean over seeds", single),
            ("envelopes: lowest over all LRs, one seed", lowest),
        )
    ]
    caption = (
        "learning curves by rank: at the optimal LR, mean over seeds; and the lowest loss over LRs"
    )
    head = "rank | behind from step, by seed | of the envelopes | rho [95%]"
    figure = ("departures.png", panels, caption)
    return [base.Section.of("Falling behind", head, rows, text, *figure), _start(c.start)]


def _start(start: Start | None) -> base.Section:
    if start is None:
        return base.Section("The start")
    rows, series = [], []
    for k, r in enumerate(start.ranks, 1):
        leaves = "never" if math.isinf(r.leaves) else r.leaves
        rows.append([r.rank, leaves, signed(float(r.difference[0])), signed(float(r.band[0]))])
        steps, band = [*start.steps, math.nan, *start.steps], [*r.band, math.nan, *-r.band]
        label = f"95% of redraws, rank {r.rank}"
        series += [
            base.Series(f"rank {r.rank}", start.steps, list(r.difference), colour=k),
            base.Series(label, steps, band, style=":", colour=k, alpha=0.7),
        ]
    title = f"one LR for all ranks ({start.lr:g}), mean over seeds and draws"
    y = f"NLL - NLL of rank {start.top} (nats)"
    panel = base.Panel(title, "updates", y, series, log_x=True)
    head = "rank | leaves the band at step | difference at the first step (nats) | band there"
    figure = ("start.png", [panel], "ranks against redraws of A, at one LR")
    return base.Section.of("The start", head, rows, [], *figure)


QUESTION = base.Question(ESTIMANDS, conditions, measures, sections, split_by=base.TASK)
