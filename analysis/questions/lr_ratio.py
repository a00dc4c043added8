"""Question: is LoRA's optimal learning rate about 10 times full fine-tuning's.

For each model, data set and variant of LoRA (alpha, layers, ...), the ratio of the optima is
compared with published laws, at each rank and over the ranks from MIN_RANK up. The report also has
the drift of the optimal LR over the rank, the gap in loss, the regret of rules of thumb, and rho.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pandas as pd

from analysis.inference.estimate import Estimate, number, signed, with_interval
from analysis.inference.gates import Gate
from analysis.inference.meta import Drift, RandomEffects
from analysis.measures import at_best
from analysis.measures.qualify import stalled
from analysis.measures.ratio import MIN_RANK, gaps, lr_drift, pool_ratios, ratio_of, rivals
from analysis.measures.regret import Gap, gaps_of
from analysis.measures.speed import curves_at_best, log_rho, read_to, rho
from analysis.optimum.optimum import Optimum
from analysis.questions import base
from analysis.runs.learning_curves import Points
from analysis.runs.lr_curves import runs_of
from analysis.runs.table import TableError

ONE, TEN = "FullFT's best LR", "10 x FullFT's best LR"
RULES = {ONE: 1.0, TEN: 10.0}
"""Rules of thumb: factors on full fine-tuning's optimal learning rate."""


@dataclass(frozen=True)
class Ratio:
    """LoRA against full fine-tuning at one rank of one model and data set."""

    group: str
    rank: int | None
    """None: over the ranks from MIN_RANK up."""
    alpha: float
    ratio: Estimate
    gap: Estimate
    """LoRA's lowest loss minus full fine-tuning's, in nats; see `measures.ratio.gaps`."""
    regrets: dict[str, float | None] = field(default_factory=dict)
    """Regret of each rule of thumb, in nats; None if its learning rate is outside the LRs tried."""
    at: int | None = None
    """Index of the LoRA curve among the analysis' optima; None over several ranks."""
    rivals: dict[str, float] = field(default_factory=dict)
    """Published law -> the ratio that it predicts; empty for a single rank."""
    rho: Estimate = base.UNKNOWN

    @property
    def name(self) -> str:
        return f"ranks {MIN_RANK} and more" if self.rank is None else f"rank {self.rank}"


@dataclass(frozen=True)
class Variant(base.Condition):
    """Full fine-tuning and the ranks of one variant of LoRA, on one model and data set."""

    width: int
    """Hidden size; 0 if unknown."""
    points: dict[int, at_best.AtBest[Points]] = field(repr=False)
    """id of an optimum -> learning curves at it, for all optima of the table."""

    @property
    def missing(self) -> str:
        if 0 not in self.by_rank or not self.lora:
            return "lora" if 0 in self.by_rank else "fullft"
        return "" if self.high else f"lora at a rank of {MIN_RANK} or more"

    @property
    def shown(self) -> bool:
        return True

    @property
    def rests(self) -> list[Optimum]:
        return [self.full, *self.high]

    @property
    def alpha(self) -> float:
        return float(base.lora_of(self.optima)[0].curve.key.get("alpha", math.nan))

    @cached_property
    def ratio(self) -> Estimate:
        return ratio_of(self.high, self.full)

    @cached_property
    def laws(self) -> dict[str, float]:
        """Published law -> the ratio that it predicts."""
        return rivals(self.width, self.alpha)

    @cached_property
    def drift(self) -> Drift:
        return lr_drift(self.high)

    @cached_property
    def ratios(self) -> list[Ratio]:
        """The ratio of every rank, then over ranks from MIN_RANK up; empty without both methods."""
        if 0 not in self.by_rank or not self.lora:
            return []
        lora, full = base.lora_of(self.optima), self.full
        at_full, found = full.best_lr.value, []
        for o, gap in zip(lora, gaps(lora, full)):
            ratio = dataclasses.replace(ratio_of([o], full), flags=(*o.flags, *full.flags))
            regrets = {
                name: o.regret(k * at_full) if at_full else None for name, k in RULES.items()
            }
            alpha = float(o.curve.key.get("alpha", math.nan))
            speed = rho(self.points[id(o)], self.points[id(full)])
            found.append(Ratio(self.name, base.rank_of(o), alpha, ratio, gap, regrets, rho=speed))
        if self.high:
            over = Ratio(self.name, None, self.alpha, self.ratio, base.UNKNOWN, rivals=self.laws)
            found.append(over)
        return found

    # ---- the highest rank's speed and losses

    def speed(self) -> Estimate:
        """Return rho of the highest rank."""
        full, top = (self.points[id(o)] for o in self.pair())
        return rho(
            top, full, at_best.pooled_over(log_rho(self.points[id(o)], full) for o in self.high)
        )

    def gates_on_speed(self) -> list[Gate]:
        curves = [self.points[id(o)].best for o in self.pair()]
        return base.gates_on_speed(self.pair()) + stalled(self.pair(), curves)

    @cached_property
    def gaps(self) -> dict[int, Gap]:
        """The gap in loss by rank."""
        mine = pd.concat([runs_of(self.runs, o.curve) for o in self.rests])
        return {g.rank: g for g in gaps_of(mine, self.rests)}

    @cached_property
    def at_ten_times(self) -> at_best.Cost:
        """The highest rank's regret at 10 times FullFT's optimum, in percent of FullFT's gain."""
        lrs = [10 * lr for lr in at_best.best_and_draws(self.full, 1)]

        def percent(rank: int, losses: at_best.AtBest[float]) -> at_best.AtBest[float]:
            (own,) = at_best.losses_at_best([self.gaps[rank].lora])
            gain = self.gaps[rank].gain
            return losses.minus(own).paired(gain, lambda lost, gain: 100 * lost / gain)

        arms = {rank: (gap.lora, lrs) for rank, gap in self.gaps.items()}
        return at_best.costs_at(arms, percent)[self.top]


def conditions(table: pd.DataFrame) -> list[Variant]:
    """Pair full fine-tuning of every model and data set with each variant of LoRA.

    Raises:
        TableError: a model and data set has several curves of full fine-tuning.
    """
    optima = base.fit(table)
    points = dict(zip(map(id, optima), curves_at_best(table, optima)))
    sizes = table["hidden_size"].fillna(0) if "hidden_size" in table else pd.Series(0, table.index)
    widths = dict(zip(table["model"], sizes.astype(int)))
    found = []
    for group, mine in base.by_group(optima).items():
        full = [o for o in mine if o.curve.key["method"] == "fullft"]
        if len(full) > 1:
            raise TableError(
                f"{group}: {len(full)} fullft curves, but lr_ratio compares with one. Keep a "
                "single scope, schedule and precision per table."
            )
        for name, lora in (base.by_variant(base.lora_of(mine), group) or {group: []}).items():
            arms = [*full, *lora]
            width = widths.get(arms[0].curve.key["model"], 0)
            found.append(Variant(name, table, arms, width, points))
    return found


def _pooled(found: Sequence[Variant]) -> RandomEffects | None:
    """Pool ln ratio over models and data sets; None with variants, which share a FullFT curve."""
    of_variants = any(";" in c.name for c in found)
    return None if of_variants else pool_ratios([c.ratio for c in found if not c.missing])


ESTIMANDS = [
    base.Estimand[Variant](
        "lr_ratio",
        lambda c: c.ratio,
        lambda c: base.gates_on(c.rests),
        log=True,
        rivals=lambda c: c.laws,
    ),
    base.LR_DRIFT,
    base.Estimand[Variant](
        "rho_top_rank",
        Variant.speed,
        Variant.gates_on_speed,
        log=True,
        seeds=lambda c: base.fewest_seeds(c.pair()),
        read=lambda c: f"rank {c.top}, to update {read_to([c.points[id(o)] for o in c.pair()])}",
    ),
    base.over_allowed(
        "over_allowed_top_rank",
        lambda c: c.gaps[c.top],
        seeds=lambda c: base.fewest_seeds(c.pair()),
        read=lambda c: f"rank {c.top}",
    ),
    base.Estimand[Variant](
        "ten_times_regret",
        lambda c: c.at_ten_times.estimate,
        lambda c: base.gates_on(c.pair()),
        seeds=lambda c: base.fewest_seeds(c.pair()),
        margin_gates=lambda c, margin: c.at_ten_times.gates(margin[1]),
        read=lambda c: f"rank {c.top}",
    ),
]


def measures(found: Sequence[Variant], asked: base.Asked) -> dict[str, Any]:
    """Return ratios, drifts and the pooled ratio."""
    place = {id(o): k for k, o in enumerate(base.distinct(o for c in found for o in c.optima))}
    ratios = [
        dataclasses.replace(r, at=None if r.rank is None else place[id(c.by_rank[r.rank])])
        for c in found
        for r in c.ratios
    ]
    drifts = {c.name: c.drift for c in found if not c.missing}
    return {"ratios": ratios, "drift": drifts, "pooled": _pooled(found)}


def sections(found: Sequence[Variant], asked: base.Asked) -> list[base.Section]:
    """Return the published laws, and the table of ratios."""
    out = []
    for c in (c for c in found if not c.missing and c.laws):
        rows, known = [], c.ratio.value is not None and c.ratio.has_interval()
        for law, value in c.laws.items():
            inside = known and c.ratio.interval[0] <= value <= c.ratio.interval[1]
            rows.append([law, value, "yes" if inside else "no" if known else "-"])
        title = f"Published laws of the ratio, {c.name}, alpha {c.alpha:g}"
        out.append(base.Section.of(title, "law | predicts | inside the interval", rows))
    ratios: list[list[Any]] = []
    for r in (r for c in found for r in c.ratios):
        between = f" [{signed(r.gap.low)}, {signed(r.gap.high)}]" if r.gap.has_interval() else ""
        regrets = [signed(r.regrets.get(rule)) for rule in RULES]
        gap = signed(r.gap.value) + between
        ratios.append([r.name, r.group, f"{r.alpha:g}", r.ratio, gap, r.rho, *regrets])
    head = (
        "LoRA / FullFT | model and data | alpha | ratio [95%] | NLL gap | rho [95%] | "
        "regret of FullFT's LR | regret of 10x FullFT's LR"
    )
    notes = []
    for c in (c for c in found if not c.missing):
        tests, d = "", c.drift
        if d.p_slope is not None:
            tests = f" (no slope: p {d.p_slope:.2g}; all ranks equal: p {d.p_equal:.2g})"
        slope = with_interval(d.slope)
        notes.append(f"Drift of ln(best LR) per doubling of the rank, {c.name}: {slope}{tests}.")
    if (p := _pooled(found)) is not None:
        logs = (p.mean, p.low, p.high, p.tau, p.low_next, p.high_next)
        mean, low, high, between, low_next, high_next = (number(math.exp(v)) for v in logs)
        notes += [
            f"\nRatio pooled over {p.k} groups (random effects): {mean} [{low}, {high}]. Between "
            f"groups it varies by a factor {between}; the next group would lie in "
            f"[{low_next}, {high_next}].",
        ]
    notes += [
        "\nGap: lowest LoRA NLL minus lowest full fine-tuning NLL, nats per token. It has an "
        "interval where two fresh seeds are paired, each arm interpolated to its optimal LR. "
        "Regret: NLL lost by a rule of thumb against the tuned LoRA LR. rho: full fine-tuning's "
        "updates to LoRA's loss over LoRA's updates.",
    ]
    return [*out, base.Section.of("LoRA against full fine-tuning", head, ratios, notes)]


QUESTION = base.Question(
    ESTIMANDS,
    conditions,
    measures,
    sections,
    ratios=lambda c: [(r.name, r.ratio) for r in c.ratios],
    of_rates=True,
)
