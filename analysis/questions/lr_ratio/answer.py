"""Question: is LoRA's best rate about 10 times full fine-tuning's. The answer in numbers.

Estimands, per model and data set: the ratio of the best rates, for each rank and over the ranks
from 4 up; and the drift, the slope of ln(best LoRA rate) per doubling of the rank. Also the NLL gap
and the regret of rules of thumb. `lr_ratio` formats the answer for the report.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pandas as pd

from analysis.inference.decide import holm, judge, look_level
from analysis.inference.estimate import LEVEL, Estimate, Verdict
from analysis.inference.gates import Gate, GateCode
from analysis.inference.meta import Drift, RandomEffects
from analysis.measures.ratio import MIN_RANK, gaps, lr_drift, pool_ratios, ratio_of, rivals
from analysis.optimum.fit import fit_all
from analysis.optimum.optimum import Optimum, seeds_at_best
from analysis.questions.base import gates_on, lora_of
from analysis.runs.lr_curves import LrCurve, lr_curves
from analysis.runs.table import TableError

PARITY, NO_REGRET, TEN_TIMES = "rho_top_rank", "over_allowed_top_rank", "ten_times_regret"
OF_LOSSES = (PARITY, NO_REGRET, TEN_TIMES)
"""Estimands that need more than the best rates; they are judged by `lr_ratio`."""


@dataclass(frozen=True)
class Ratio:
    """LoRA against full fine-tuning at one rank of one model and data set."""

    group: str
    rank: int | None
    """None: over the ranks from MIN_RANK up."""
    alpha: float
    ratio: Estimate
    gap: Estimate
    """Best LoRA NLL - best full fine-tuning NLL, in nats; see `analysis.measures.ratio.gaps`."""
    regrets: dict[str, float | None] = field(default_factory=dict)
    """NLL lost by a rule of thumb compared with the tuned rate, in nats; None if the rule's rate
    lies outside those tried."""
    at: int | None = None
    """Index of the LoRA curve among the answer's optima; None over several ranks."""
    rivals: dict[str, float] = field(default_factory=dict)
    """The ratio by each published law at this width and alpha; only over ranks."""


@dataclass(frozen=True)
class Answer:
    """The results of the question."""

    optima: list[Optimum]
    ratios: list[Ratio]
    drifts: dict[str, Drift]
    verdicts: list[Verdict]
    pooled: RandomEffects | None = None
    """ln ratio pooled over groups (models, data sets), if at least two have one."""
    members: dict[str, list[Optimum]] = field(default_factory=dict)
    """Curves on which a verdict rests, by its group: full fine-tuning and the ranks from MIN_RANK
    up."""
    of_rates: ClassVar[bool] = True


def answer(
    curves: Sequence[LrCurve],
    claims: dict[str, Any],
    widths: dict[str, int] | None = None,
    level: float = LEVEL,
) -> Answer:
    """Fit all curves of a sweep, form the ratios and judge the claims.

    Args:
        curves: of all arms.
        claims: by name, as in the sweep's file.
        widths: hidden size by model.
        level: of the intervals that are compared with the margins (see `decide.look_level`).

    Raises:
        TableError: a group has more than one full fine-tuning curve, or a claim is about an
            unknown estimand.
    """
    optima = fit_all(curves)
    groups = _grouped(optima, lambda o: o.curve.group)
    ratios: list[Ratio] = []
    drifts: dict[str, Drift] = {}
    groups_judged: dict[str, list[Optimum]] = {}
    verdicts: list[Verdict] = []
    for group, members in groups.items():
        full = [o for o in members if o.curve.key["method"] == "fullft"]
        if len(full) > 1:
            raise TableError(
                f"{group}: {len(full)} fullft curves, but lr_ratio compares with one. Keep a "
                "single scope, schedule and precision per table."
            )
        variants = _grouped(lora_of(members), lambda o: o.curve.variant)
        if not full or not variants:
            verdicts += _without_an_arm(group, claims, "fullft" if not full else "lora")
            continue
        for variant, lora in variants.items():
            name = group if len(variants) == 1 else f"{group}; {variant}"
            alpha = float(lora[0].curve.key.get("alpha", math.nan))
            width = (widths or {}).get(str(lora[0].curve.key["model"]), 0)
            ratios += _by_rank(name, lora, full[0], optima)
            high = [o for o in lora if o.curve.key["rank"] >= MIN_RANK]
            if not high:
                verdicts += _without_an_arm(name, claims, f"lora at a rank of {MIN_RANK} or more")
                continue
            overall = ratio_of(high, full[0])
            laws = rivals(width, alpha)
            ratios.append(Ratio(name, None, alpha, overall, Estimate(None), rivals=laws))
            drifts[name] = lr_drift(high)
            groups_judged[name] = [full[0], *high]
            verdicts += _judge_group(
                name, claims, high, full[0], overall, drifts[name].slope, laws, level
            )
    verdicts = holm(verdicts, 1 - level)  # over the primary claims of all models and data sets
    overall_ratios = [r.ratio for r in ratios if r.rank is None]
    # Variants share one full fine-tuning curve, so their ratios are not independent.
    pooled = None if any(";" in r.group for r in ratios) else pool_ratios(overall_ratios)
    return Answer(optima, ratios, drifts, verdicts, pooled, groups_judged)


def answer_of(table: pd.DataFrame, question: dict[str, Any]) -> Answer:
    """Fit and judge a sweep's runs under its claims, margins and planned rounds.

    Claims about OF_LOSSES are judged by `analysis.questions.lr_ratio.question`.
    """
    claims = {k: v for k, v in question["claims"].items() if v["estimand"] not in OF_LOSSES}
    widths = (
        {}
        if "hidden_size" not in table
        else dict(zip(table["model"], table["hidden_size"].fillna(0).astype(int)))
    )
    return answer(lr_curves(table), claims, widths, look_level(int(question.get("rounds", 1))))


def _grouped(optima: Sequence[Optimum], key: Callable[[Optimum], str]) -> dict[str, list[Optimum]]:
    found: dict[str, list[Optimum]] = {}
    for o in optima:
        found.setdefault(key(o), []).append(o)
    return found


def _without_an_arm(group: str, claims: dict[str, Any], arm: str) -> list[Verdict]:
    gate = [Gate(GateCode.MISSING, arm)]
    return [
        judge(name, claim, group, Estimate(None), gate, 0, True) for name, claim in claims.items()
    ]


def _by_rank(
    group: str, lora: Sequence[Optimum], full: Optimum, optima: Sequence[Optimum]
) -> list[Ratio]:
    place = {id(o): k for k, o in enumerate(optima)}
    return [_one(group, o, full, gap, place[id(o)]) for o, gap in zip(lora, gaps(lora, full))]


def _one(group: str, lora: Optimum, full: Optimum, gap: Estimate, at: int) -> Ratio:
    alpha = float(lora.curve.key.get("alpha", math.nan))
    base = full.best_lr.value
    rules = {"FullFT's best LR": 1.0, "10 x FullFT's best LR": 10.0}
    regrets = {name: lora.regret(k * base) if base else None for name, k in rules.items()}
    estimate = ratio_of([lora], full)
    estimate = dataclasses.replace(estimate, flags=(*lora.flags, *full.flags))
    return Ratio(
        group,
        int(lora.curve.key["rank"]),
        alpha,
        estimate,
        gap,
        regrets,
        at,
    )


def _judge_group(
    group: str,
    claims: dict[str, Any],
    lora: list[Optimum],
    full: Optimum,
    overall: Estimate,
    drift: Estimate,
    laws: dict[str, float],
    level: float,
) -> list[Verdict]:
    every = [full, *lora]
    gates = gates_on(every)
    seeds = min(seeds_at_best(o) for o in every)
    known = {
        "lr_ratio": (overall, gates),
        "lr_drift_per_doubling": (drift, drift_gates(lora)),
    }
    verdicts = []
    for name, claim in claims.items():
        if claim["estimand"] not in known:
            raise TableError(
                f"claim {name!r}: lr_ratio measures {', '.join(known)}, not {claim['estimand']!r}."
            )
        estimate, stops = known[claim["estimand"]]
        log = claim["estimand"] == "lr_ratio"
        claim = {**claim, "rivals": {**(claim.get("rivals") or {}), **laws}} if log else claim
        verdicts.append(judge(name, claim, group, estimate, stops, seeds, log, level))
    return verdicts


def drift_gates(lora: list[Optimum]) -> list[Gate]:
    """Return what forbids to judge a drift of the best rate over these ranks."""
    one = [Gate(GateCode.ONE_RANK)] if len(lora) < 2 else []
    return gates_on(lora) + one
