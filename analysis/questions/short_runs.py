"""Question: is LoRA's optimal learning rate a larger multiple in short runs, and does B outgrow A.

Shorter horizons are prefixes of the same runs. Spectral norms are those at the end of the runs, at
each curve's optimal learning rate.
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
from analysis.optimum.optimum import Optimum
from analysis.questions import base
from analysis.runs.learning_curves import at_step, steps_seen, while_unsolved
from analysis.runs.lr_curves import title

SHORT = 24
"""The short horizon is the first evaluated step from the longest horizon divided by this."""
SHORTEST = 4
"""Horizons of fewer updates are ignored."""
Norms = dict[str, dict[str, float]]
"""Matrix -> a, b, delta (the change) -> spectral norm."""


@dataclass(frozen=True)
class Horizon:
    """The optima of runs cut at one step; `lora` holds the ranks that the claim is about."""

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
    """The norms of one curve by seed, and ratios of them."""

    by_seed: dict[int, Norms]
    growth: Estimate
    """Norm of B over norm of A, median over matrices."""
    movement: Estimate
    """Norm of the change over full fine-tuning's, median over matrices."""

    def median(self, part: str) -> float:
        """Return the median of a, b or delta over seeds and matrices; NaN if there is none."""
        values = [v.get(part, math.nan) for m in self.by_seed.values() for v in m.values()]
        return float(np.median(values))


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
        """The first horizon from the longest one over SHORT."""
        return next(h for h in self.horizons if h.step >= self.long.step / SHORT)

    @property
    def rests(self) -> list[Optimum]:
        return [*self.short.optima, *self.long.optima]

    def short_over_long(self) -> Estimate:
        """Return the ratio at the short horizon over that at the long one."""
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
        """The norms of the optima of whole runs; growth and movement only for LoRA."""

        def logs(row: pd.Series) -> dict[tuple[str, str], float]:
            """Return logarithms by matrix and part: they interpolate well between LRs."""
            norms = json.loads(row["result"]).get("spectra") or {}
            return {(m, k): math.log(v) for m, by in norms.items() for k, v in by.items() if v > 0}

        def by_matrix(values: dict[tuple[str, str], float]) -> Norms:
            out: Norms = {}
            for (matrix, part), v in values.items():
                out.setdefault(matrix, {})[part] = math.exp(v)
            return out

        found = [v.map(by_matrix) for v in values_at_best(self.whole, self.ends, logs)]
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
        """The norms of the highest rank; None if they were not recorded."""
        every = zip(self.ends, self.spectra)
        known = [s for o, s in every if base.rank_of(o) and s.by_seed]
        return known[-1] if known else None

    @property
    def end(self) -> str:
        return f"highest rank, after {self.whole['steps'].max():g} updates"


def _median_log(a: Norms, of: str, b: Norms, over: str) -> float:
    """Return the median of ln(a / b) over the matrices that both have."""
    both = [(a[n][of], b[n][over]) for n in a.keys() & b.keys()]
    return float(np.median([math.log(x / y) for x, y in both if y > 0 and x > 0]))


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


# ---------------------------------------------------------------- the report


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
    name, caption = "Spectral norms at the optimal LRs", "spectral norms of the change, by matrix"
    figure = ("norms.png", _matrices(known), caption)
    return [by_horizon, base.Section.of(name, head, rows, [], *figure)]


def _matrices(known: Sequence[tuple[Optimum, Spectra]]) -> list[base.Panel]:
    """Draw the change of every matrix that LoRA adapts, for one seed."""
    first = [(o, next(iter(s.by_seed.values()))) for o, s in known]
    lora = [norms for o, norms in first if o.curve.key["method"] == "lora"]
    if not first:
        return []
    names = sorted(lora[0] if lora else [], key=lambda n: ".layers." not in n)  # the head is last
    layers = [n.split(".layers.")[1].split(".")[0] if ".layers." in n else "head" for n in names]
    of_one = ", ".join(
        n.rsplit(".", 1)[-1].removesuffix("_proj")
        for n, layer in zip(names, layers)
        if layer == layers[0]
    )
    ticks = [
        (float(k), layer if layer == "head" else f"layer {layer}")
        for k, layer in enumerate(layers)
        if k == 0 or layer != layers[k - 1]
    ]
    series = [
        base.Series(
            o.curve.name, range(len(names)), [v.get(m, {}).get("delta") for m in names], style="o"
        )
        for o, v in first
    ]
    x = f"matrices of a layer from left to right: {of_one}"
    heading, y = "one seed, interpolated to each curve's optimal LR", "spectral norm of the change"
    return [base.Panel(heading, x, y, series, log_y=True, ticks=ticks)]


QUESTION = base.Question(ESTIMANDS, conditions, measures, sections, split_by=base.TASK)
