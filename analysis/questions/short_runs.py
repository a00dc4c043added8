"""Question: is LoRA's optimal learning rate a larger multiple in short runs, and does B outgrow A.

A horizon is a number of updates after which the runs are cut. The multiple is of full fine-tuning's
optimal learning rate. B outgrows A if its spectral norm is larger. Spectral norms are measured at
the end of the runs, at each curve's optimal learning rate.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from analysis.inference.estimate import Estimate, exp_of, from_draws
from analysis.measures.at_best import AtBest, over_seeds, pooled_over, values_at_best
from analysis.measures.ratio import MIN_RANK, ratio_of
from analysis.optimum.fit import Optimum
from analysis.questions import base
from analysis.runs.learning_curves import at_step, steps_seen, while_unsolved
from analysis.runs.lr_curves import title

SHORT = 24
"""The short horizon is the first one of at least the longest horizon divided by this."""
SHORTEST = 4
"""Horizons of fewer updates are ignored."""
Norms = dict[tuple[str, str], float]
"""(matrix, part) -> spectral norm. Parts: LoRA's a and b, and delta (the change of the weights)."""


@dataclass(frozen=True)
class Horizon:
    """The optima of runs cut at one step; LoRA's at ranks from MIN_RANK up."""

    step: int
    full: Optimum | None
    lora: list[Optimum]

    @cached_property
    def ratio(self) -> Estimate:
        """LoRA's optimal learning rate over full fine-tuning's."""
        return ratio_of(self.lora, self.full) if self.full and self.lora else base.UNKNOWN

    @property
    def optima(self) -> list[Optimum]:
        return [*([self.full] if self.full else []), *self.lora]


@dataclass(frozen=True)
class Spectra:
    """Spectral norms of one curve by seed, and medians over matrices of ratios of norms."""

    by_seed: dict[int, Norms]
    growth: Estimate
    """Norm of B over norm of A."""
    movement: Estimate
    """Norm of the change of the weights over its norm in full fine-tuning."""

    def median(self, part: str) -> float:
        """Return the median of a, b or delta over seeds and matrices; NaN if there is none."""
        values = [v for m in self.by_seed.values() for (_, p), v in m.items() if p == part]
        return float(np.median(values)) if values else math.nan


@dataclass(frozen=True)
class Lengths(base.TwoArms):
    """The runs of one model and data set, cut at several horizons."""

    whole: pd.DataFrame
    """The uncut runs, whose norms are measured."""
    horizons: list[Horizon]

    @property
    def missing(self) -> str:
        full, lora = self.long.full, self.long.lora
        return "fullft" if full is None else "" if lora else "lora"

    @property
    def shown(self) -> bool:
        return True

    @property
    def long(self) -> Horizon:
        """The longest horizon."""
        return self.horizons[-1]

    @property
    def short(self) -> Horizon:
        """The first horizon of at least `long.step` / SHORT updates."""
        return next(h for h in self.horizons if h.step >= self.long.step / SHORT)

    @property
    def rests(self) -> list[Optimum]:
        return [*self.short.optima, *self.long.optima]

    def short_over_long(self) -> Estimate:
        """Return the ratio at the short horizon over the ratio at the long horizon."""
        short, long = self.short.ratio, self.long.ratio
        if short.draws is None or long.draws is None:
            return base.UNKNOWN
        return from_draws(short.draws / long.draws, short.n + long.n)

    @cached_property
    def ends(self) -> list[Optimum]:
        """The optima of whole runs."""
        return base.fit(self.whole) if self.note else self.optima

    @cached_property
    def spectra(self) -> list[Spectra]:
        """Spectral norms at the optima of whole runs; growth and movement are for LoRA only."""

        def logs(row: pd.Series) -> Norms:
            """Return logarithms, which interpolate well between LRs."""
            norms = json.loads(row["result"]).get("spectra") or {}
            return {(m, k): math.log(v) for m, by in norms.items() for k, v in by.items() if v > 0}

        found = [
            runs.map(lambda logs: {k: math.exp(v) for k, v in logs.items()})
            for runs in values_at_best(self.whole, self.ends, logs)
        ]
        none: AtBest[Norms] = AtBest({})
        is_lora = [o.curve.key["method"] == "lora" for o in self.ends]
        full = next((v for v, lora in zip(found, is_lora) if not lora), none)
        lora = [v if lora else none for v, lora in zip(found, is_lora)]
        grown = [v.map(lambda m: _median_log(m, "b", m, "a")) for v in lora]
        moved = [v.paired(full, lambda m, f: _median_log(m, "delta", f, "delta")) for v in lora]
        pooled = [pooled_over(grown), pooled_over(moved)]
        return [
            Spectra(v.best, *(exp_of(over_seeds(x, p)) for x, p in zip(ratios, pooled)))
            for v, *ratios in zip(found, grown, moved)
        ]

    @property
    def of_top(self) -> Spectra | None:
        """Spectral norms of the highest rank; None if they were not recorded."""
        every = zip(self.ends, self.spectra)
        known = [s for o, s in every if base.rank_of(o) and s.by_seed]
        return known[-1] if known else None

    @property
    def end(self) -> str:
        return f"highest rank, after {self.whole['steps'].max():g} updates"


def _median_log(a: Norms, of: str, b: Norms, over: str) -> float:
    """Return the median of ln(part `of` of a / part `over` of b) over the matrices of both."""
    both = [(v, b[n, over]) for (n, part), v in a.items() if part == of and (n, over) in b]
    return float(np.median([math.log(x / y) for x, y in both]))


def conditions(table: pd.DataFrame) -> list[Lengths]:
    """Fit the optima at every step at which all runs were evaluated, and at the end."""
    part, note = while_unsolved(table)
    last, horizons, optima = int(part["steps"].max()), [], []
    for step in [s for s in steps_seen(part) if s >= SHORTEST] + [last]:
        optima = base.fit(at_step(part, step))
        horizons.append(Horizon(step, base.full_of(optima), base.lora_of(optima, MIN_RANK)))
    return [Lengths(optima[0].curve.group, part, optima, note, table, horizons)]


ESTIMANDS = [
    base.Estimand[Lengths](
        "short_over_long",
        Lengths.short_over_long,
        lambda c: base.gates_on(c.rests),
        log=True,
        read=lambda c: f"{c.short.step} updates against {c.long.step}",
    ),
    base.Estimand[Lengths](
        "sigma_b_over_a",
        lambda c: c.of_top.growth if c.of_top else base.UNKNOWN,
        lambda c: base.gates_on(base.lora_of(c.ends, MIN_RANK)),
        log=True,
        read=lambda c: c.end,
    ),
    base.Estimand[Lengths](
        "movement_ratio",
        lambda c: c.of_top.movement if c.of_top else base.UNKNOWN,
        lambda c: base.gates_on([o for o in c.ends if base.rank_of(o) not in range(1, MIN_RANK)]),
        log=True,
        read=lambda c: c.end,
    ),
]


def measures(found: Sequence[Lengths], asked: base.Asked) -> dict[str, Any]:
    """Return the ratio by horizon."""
    (c,) = found
    return {"horizons": [{"step": h.step, **h.ratio.plain()} for h in c.horizons]}


def sections(found: Sequence[Lengths], asked: base.Asked) -> list[base.Section]:
    """Return the ratio by horizon, and the spectral norms."""
    (c,) = found
    rows: list[list[Any]] = []
    for h in c.horizons:
        of_full = base.best_lr(h.full) if h.full else "-"
        rows.append([h.step, of_full, *map(base.best_lr, h.lora), h.ratio])
    of_lora = [f"best LR, {o.curve.name}" for o in c.long.lora]
    head = " | ".join(["updates", "best FullFT LR", *of_lora, "ratio [95%]"])
    text = [
        f"Short: {c.short.step} updates; long: {c.long.step}. The ratio is over the ranks of "
        f"{MIN_RANK} and more. Shorter runs are the first updates of the longer ones.",
        c.note,
    ]
    steps, ratios = [h.step for h in c.horizons], [h.ratio for h in c.horizons]
    panel = base.Panel(
        f"{title(c.optima[0].curve, length=False)}: beginnings of the same runs",
        "updates",
        "best LoRA LR / best FullFT LR",
        [base.Series.of("ratio", steps, ratios, colour=1)],
        log_x=True,
        log_y=True,
        lines={"the study, long runs: 10": 10.0, "the study, short runs: 15": 15.0},
    )
    caption, name = "ratio of the optimal LRs over the length of the run", "The ratio by horizon"
    by_horizon = base.Section.of(name, head, rows, text, "horizons.png", [panel], caption)
    known = [(o, s) for o, s in zip(c.ends, c.spectra) if s.by_seed]
    rows = []
    for o, s in known:
        norms = [s.median(part) for part in ("a", "b", "delta")]
        rows.append([o.curve.name, *norms, s.growth, s.movement])
    head = (
        "curve | spectral norm of A | of B | of the change | B / A [95%] | change / FullFT's [95%]"
    )
    return [by_horizon, base.Section.of("Spectral norms at the optimal LRs", head, rows)]


QUESTION = base.Question(ESTIMANDS, conditions, measures, sections, split_by=base.TASK)
