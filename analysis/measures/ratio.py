"""Is the best LoRA learning rate about 10 times the best full fine-tuning one?

Estimands, per model and data set: the ratio of the best rates for each rank and over the ranks of 4
and more; the drift, the slope of ln(best LoRA rate) per doubling of the rank. Beside them the NLL
gap, and the regret of rules of thumb. A ratio's interval comes from draws of both optima; what the
arms have in common (seeds, the shape of their valleys) makes it cautious.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from scipy import stats

from analysis.inference.decide import MIN_SEEDS, holm, judge, look_level
from analysis.inference.estimate import LEVEL, Estimate, Verdict, from_draws
from analysis.inference.meta import Drift, RandomEffects, drift, random_effects
from analysis.optimum.fit import Optimum, fit_all
from analysis.runs.table import Curve, TableError, curves

PARITY = "rho_top_rank"
"""Estimands whose margin is one of ratios, above 0."""
MIN_RANK = 4
"""The claims on ratio and drift are about ranks of 4 and more: the study itself sets rank 1 apart.
"""
MIN_GAIN = 0.3
"""A task qualifies only if the untrained model's NLL is at least this far above its floor, in nats
..."""
MIN_REST = 0.2
"""... and the best run keeps at least this share of that excess: a solved task says nothing of
learning rates."""


@dataclass(frozen=True)
class Ratio:
    """LoRA against full fine-tuning at one rank of one model and data set."""

    group: str
    rank: int | None
    """None: over the ranks of MIN_RANK and more."""
    alpha: float
    ratio: Estimate
    gap: Estimate
    """Best LoRA NLL - best full fine-tuning NLL, nats; from fresh seeds only, paired by seed, where
    there are."""
    regrets: dict[str, float | None] = field(default_factory=dict)
    """NLL lost by a rule of thumb against the tuned rate, nats; None where the rule leaves the
    tried rates."""
    at: int | None = None
    """Place of the LoRA curve among the answer's optima; None over several."""
    rivals: dict[str, float] = field(default_factory=dict)
    """The ratio that each rival law in print gives at this width and alpha."""


@dataclass(frozen=True)
class Answer:
    """All that the question's runs say."""

    optima: list[Optimum]
    ratios: list[Ratio]
    drifts: dict[str, Drift]
    verdicts: list[Verdict]
    pooled: RandomEffects | None = None
    """ln ratio over the groups (models, data sets), where two or more have one."""
    members: dict[str, list[Optimum]] = field(default_factory=dict)
    """The curves that a verdict's group rests on: full fine-tuning and the ranks of MIN_RANK and
    more."""
    of_rates: ClassVar[bool] = True


def answer(
    curves: Sequence[Curve],
    claims: dict[str, Any],
    widths: dict[str, int] | None = None,
    level: float = LEVEL,
) -> Answer:
    """Fit all curves of a sweep, form the ratios and judge the claims.

    Args:
        widths: hidden size by model.
        level: of the intervals that are held against the margins (see verdicts.look_level).
    """
    optima = fit_all(curves)
    groups: dict[str, list[Optimum]] = {}
    for o in optima:
        groups.setdefault(o.curve.group, []).append(o)
    ratios: list[Ratio] = []
    drifts: dict[str, Drift] = {}
    groups_judged: dict[str, list[Optimum]] = {}
    verdicts: list[Verdict] = []
    for group, members in groups.items():
        full = [o for o in members if o.curve.key["method"] == "fullft"]
        if len(full) > 1:
            raise TableError(
                f"{group}: {len(full)} fullft curves, lr_ratio compares with one. Keep one scope, schedule and "
                "precision a table."
            )
        variants: dict[str, list[Optimum]] = {}
        for o in members:
            if o.curve.key["method"] == "lora":
                variants.setdefault(o.curve.variant, []).append(o)
        if not full or not variants:
            verdicts += _without_an_arm(group, claims, "fullft" if not full else "lora")
            continue
        for variant, lora in variants.items():
            name = group if len(variants) == 1 else f"{group}; {variant}"
            alpha = float(lora[0].curve.key.get("alpha", math.nan))
            width = (widths or {}).get(str(lora[0].curve.key["model"]), 0)
            place = {id(o): k for k, o in enumerate(optima)}
            ratios += [
                dataclasses.replace(_one(name, o, full[0], width), at=place[id(o)]) for o in lora
            ]
            high = [o for o in lora if o.curve.key["rank"] >= MIN_RANK]
            if not high:
                verdicts += _without_an_arm(name, claims, f"lora at a rank of {MIN_RANK} or more")
                continue
            overall = ratio_of(high, full[0])
            laws = rivals(width, alpha)
            ratios.append(Ratio(name, None, alpha, overall, Estimate(None), rivals=laws))
            drifts[name] = _drift(high)
            groups_judged[name] = [full[0], *high]
            verdicts += _judge_group(
                name, claims, high, full[0], overall, drifts[name].slope, laws, level
            )
    verdicts = holm(verdicts, 1 - level)  # over the primary claims of all models and data sets
    overall_ratios = [r.ratio for r in ratios if r.rank is None]
    pooled = (
        None if any(";" in r.group for r in ratios) else pool_ratios(overall_ratios)
    )  # variants share one FullFT curve
    return Answer(optima, ratios, drifts, verdicts, pooled, groups_judged)


def answer_of(table: pd.DataFrame, question: dict[str, Any]) -> Answer:
    """Fit and judge a sweep's runs under its claims, margins and planned rounds; parity, which
    needs learning curves, is judged where those are read (questions.lr_ratio)."""
    claims = {k: v for k, v in question["claims"].items() if v["estimand"] != PARITY}
    widths = (
        {}
        if "hidden_size" not in table
        else dict(zip(table["model"], table["hidden_size"].fillna(0).astype(int)))
    )
    return answer(curves(table), claims, widths, look_level(int(question.get("rounds", 1))))


def pool_ratios(ratios: Sequence[Estimate]) -> RandomEffects | None:
    """Pool ln ratios of independent groups; None with fewer than two that have an interval."""
    logs = [np.log(r.draws) for r in ratios if r.draws is not None]
    return (
        random_effects([d.mean() for d in logs], [d.std() for d in logs]) if len(logs) > 1 else None
    )


def _without_an_arm(group: str, claims: dict[str, Any], arm: str) -> list[Verdict]:
    gate = [f"no curve of {arm}"]
    return [
        judge(name, claim, group, Estimate(None), gate, 0, True) for name, claim in claims.items()
    ]


def rivals(width: int, alpha: float) -> dict[str, float]:
    """Return the ratios that laws in print predict at this hidden size and alpha."""
    if not width:
        return {}
    return {
        "constant 10 (the study)": 10.0,
        "10 sqrt(hidden/4096) (muA, arXiv 2602.06204, anchored)": 10 * math.sqrt(width / 4096),
        "hidden/(2 alpha) (withdrawn by the study's authors)": width / (2 * alpha),
        "sqrt(3) hidden/alpha (equal first step under Adam)": math.sqrt(3) * width / alpha,
    }


def _one(group: str, lora: Optimum, full: Optimum, width: int) -> Ratio:
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
        gap(lora, full),
        regrets,
        rivals(width, alpha),
    )


def ratio_of(lora: Sequence[Optimum], full: Optimum) -> Estimate:
    """Return exp(mean ln best LoRA rate - ln best full rate); a bound where that is all that is
    known."""
    a, f = [o.best_lr for o in lora], full.best_lr
    n = sum(e.n for e in [*a, f])

    def ln(v: float | None) -> float:
        return math.nan if v is None else math.log(v)

    if (
        any(e.value is None for e in a) or f.value is None
    ):  # from the ends of both sides that are known
        low = float(np.mean([ln(e.low) for e in a])) - ln(f.high)
        high = float(np.mean([ln(e.high) for e in a])) - ln(f.low)
        return Estimate(
            None, *(math.exp(v) if math.isfinite(v) else None for v in (low, high)), n=n
        )
    if any(e.draws is None for e in [*a, f]):
        return Estimate(math.exp(float(np.mean([ln(e.value) for e in a])) - ln(f.value)), n=n)
    return from_draws(np.exp(np.mean([np.log(e.draws) for e in a], axis=0) - np.log(f.draws)), n)


def gap(lora: Optimum, full: Optimum) -> Estimate:
    """Return best LoRA NLL - best full NLL, nats: each arm at its best tried rate, paired by seed,
    Student's interval.

    Only seeds that were not used to choose the rate count (all but each curve's first); with fewer
    than two of them there is the difference of the fitted minima, and no interval.
    """
    if lora.best_nll is None or full.best_nll is None:
        return Estimate(None)
    a, b = _fresh(lora), _fresh(full)
    both = sorted(a.keys() & b.keys())
    if len(both) < 2:
        return Estimate(lora.best_nll - full.best_nll)
    d = np.array([a[s] - b[s] for s in both])
    half = stats.t.ppf(0.5 + LEVEL / 2, len(d) - 1) * d.std(ddof=1) / math.sqrt(len(d))
    return Estimate(float(d.mean()), float(d.mean() - half), float(d.mean() + half), len(d))


def _fresh(o: Optimum) -> dict[int, float]:
    """NLL by seed at the tried rate nearest the optimum, the grid's seed (the one tried at most
    rates) left out."""
    c = o.curve
    x, y, seed = c.x[c.usable], c.y[c.usable], c.seed[c.usable]
    if not len(x) or o.best_lr.value is None:
        return {}
    grid_seed = max(sorted(set(seed)), key=lambda s: (seed == s).sum())
    at = x[np.argmin(np.abs(x - math.log(o.best_lr.value)))]
    return {int(s): float(v) for s, v in zip(seed[x == at], y[x == at]) if s != grid_seed}


def _drift(lora: Sequence[Optimum]) -> Drift:
    """Drift over ranks whose optimum has an interval; none if any is missing, since those at an
    edge are no accident."""
    n = sum(o.best_lr.n for o in lora)
    known = [o for o in lora if o.best_lr.draws is not None]
    if len(known) < len(lora):
        known = []
    return drift([o.curve.key["rank"] for o in known], [np.log(o.best_lr.draws) for o in known], n)


# ---------------------------------------------------------------- verdicts


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
    gates = gates_of(every)
    seeds = min(seeds_at_best(o) for o in every)
    known = {
        "lr_ratio": (overall, gates),
        "lr_drift_per_doubling": (drift, _drift_gates(gates_of(lora), lora)),
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


def _drift_gates(gates: list[str], lora: list[Optimum]) -> list[str]:
    return gates if len(lora) >= 2 else [*gates, "one rank only"]


def gates_of(optima: list[Optimum]) -> list[str]:
    """List what forbids a verdict."""
    found = []
    for o in optima:
        stops = [
            f
            for f in o.flags
            if f
            in (
                "at_edge",
                "bounded_by_divergence",
                "flat",
                "few_points",
                "no_usable_points",
                "no_variance",
            )
        ]
        if stops:
            found.append(f"{o.curve.name}: {', '.join(stops)}")
        seeds = seeds_at_best(o)
        if seeds < MIN_SEEDS:
            found.append(f"{o.curve.name}: {seeds} seed(s) at the optimum, {MIN_SEEDS} needed")
    found += task_problems([o.curve for o in optima], [o.best_nll for o in optima])
    return found


def task_problems(curves: Sequence[Curve], best: Sequence[float | None]) -> list[str]:
    """Say why the task is unfit for the question, where its floor is known (science:
    qualification)."""
    start, floor = curves[0].nll_start, curves[0].floor
    lowest = min((b for b in best if b is not None), default=math.nan)
    if not (math.isfinite(start) and math.isfinite(floor) and math.isfinite(lowest)):
        return []
    found = []
    if start - floor < MIN_GAIN:
        found.append(
            f"task: the base starts {start - floor:.2f} nats above the floor, {MIN_GAIN} needed"
        )
    elif (lowest - floor) / (start - floor) < MIN_REST:
        found.append("task: nearly solved, less than a fifth of the starting excess is left")
    return found


def seeds_at_best(o: Optimum) -> int:
    """Count the seeds at the two rates on both sides of the fitted optimum (without one: about the
    best rate)."""
    x = o.curve.x[o.curve.usable]
    if not len(x):
        return 0
    rates = sorted(set(x))
    y = o.curve.y[o.curve.usable]
    if o.best_lr.value is not None and rates[0] <= math.log(o.best_lr.value) <= rates[-1]:
        m = math.log(o.best_lr.value)
        sides = (max(r for r in rates if r <= m), min(r for r in rates if r >= m))
        return min(len(set(o.curve.seed[o.curve.usable][x == r])) for r in sides)
    best = min(range(len(rates)), key=lambda k: y[x == rates[k]].mean())
    around = rates[max(0, best - 1) : best + 2]
    return min(len(set(o.curve.seed[o.curve.usable][x == r])) for r in around)
