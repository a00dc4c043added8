"""Is the best LoRA learning rate about 10 times the best full fine-tuning one?

Estimands, per model and data set: the ratio of the best rates for each rank and over the ranks of 4 and more; the
drift, the slope of ln(best LoRA rate) per doubling of the rank. Beside them the NLL gap, and the regret of rules
of thumb. Intervals of a difference come from the two optima's own intervals (MOVER; Zou & Donner 2008), which may be
lopsided; seeds shared by both arms make it cautious.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import stats

from analysis.lr_optimum import Optimum, fit_all
from analysis.results import Estimate, Verdict
from analysis.table import GROUP_KEYS, Curve, TableError
from analysis.verdicts import MIN_SEEDS, judge

ESTIMANDS = ("lr_ratio", "lr_drift_per_doubling")
MIN_RANK = 4
"""The claims on ratio and drift are about ranks of 4 and more: the study itself sets rank 1 apart."""
MIN_GAIN = 0.3
"""A task qualifies only if the untrained model's NLL is at least this far above its floor, in nats ..."""
MIN_REST = 0.2
"""... and the best run keeps at least this share of that excess: a solved task says nothing of learning rates."""


@dataclass(frozen=True)
class Ratio:
    """LoRA against full fine-tuning at one rank of one model and data set."""

    group: str
    rank: int | None
    """None: over the ranks of MIN_RANK and more."""
    alpha: float
    ratio: Estimate
    gap: float | None
    """Best LoRA NLL - best full fine-tuning NLL, nats."""
    regrets: dict[str, float | None] = field(default_factory=dict)
    """NLL lost by a rule of thumb against the tuned rate, nats; None where the rule leaves the tried rates."""
    rivals: dict[str, float] = field(default_factory=dict)
    """The ratio that each rival law in print gives at this width and alpha."""


@dataclass(frozen=True)
class Answer:
    """All that the question's runs say."""

    optima: list[Optimum]
    ratios: list[Ratio]
    drifts: dict[str, Estimate]
    verdicts: list[Verdict]


def answer(curves: Sequence[Curve], claims: dict[str, Any], widths: dict[str, int] | None = None) -> Answer:
    """Fit all curves of a sweep, form the ratios and judge the claims. `widths`: hidden size by model."""
    optima = fit_all(curves)
    groups: dict[str, list[Optimum]] = {}
    for o in optima:
        groups.setdefault(o.curve.group, []).append(o)
    ratios: list[Ratio] = []
    drifts: dict[str, Estimate] = {}
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
                rest = {k: v for k, v in o.curve.key.items() if k not in (*GROUP_KEYS, "method", "rank", "scope")}
                variants.setdefault(", ".join(f"{k} {v}" for k, v in rest.items() if v == v), []).append(o)
        if not full or not variants:
            verdicts += _without_an_arm(group, claims, "fullft" if not full else "lora")
            continue
        for variant, lora in variants.items():
            name = group if len(variants) == 1 else f"{group}; {variant}"
            alpha = float(lora[0].curve.key.get("alpha", math.nan))
            width = (widths or {}).get(str(lora[0].curve.key["model"]), 0)
            ratios += [_one(name, o, full[0], width) for o in lora]
            high = [o for o in lora if o.curve.key["rank"] >= MIN_RANK]
            if not high:
                verdicts += _without_an_arm(name, claims, f"lora at a rank of {MIN_RANK} or more")
                continue
            overall = Estimate(*_log_ratio(high, full[0]), n=sum(o.best_lr.n for o in [*high, *full]))
            laws = rivals(width, alpha)
            ratios.append(Ratio(name, None, alpha, overall, None, rivals=laws))
            drifts[name] = _drift(high)
            verdicts += _judge_group(name, claims, high, full[0], overall, drifts[name], laws)
    return Answer(optima, ratios, drifts, verdicts)


def _without_an_arm(group: str, claims: dict[str, Any], arm: str) -> list[Verdict]:
    gate = [f"no curve of {arm}"]
    return [judge(name, claim, group, Estimate(None), gate, 0, True) for name, claim in claims.items()]


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
    value, low, high = _log_ratio([lora], full)
    base = full.best_lr.value
    rules = {"FullFT's best LR": 1.0, "10 x FullFT's best LR": 10.0}
    regrets = {name: lora.regret(k * base) if base else None for name, k in rules.items()}
    gap = None
    if lora.best_lr.value is not None and full.best_lr.value is not None:
        gap = lora.best_nll - full.best_nll
    estimate = Estimate(value, low, high, lora.best_lr.n + full.best_lr.n, (*lora.flags, *full.flags))
    return Ratio(group, int(lora.curve.key["rank"]), alpha, estimate, gap, regrets, rivals(width, alpha))


def _log_ratio(lora: Sequence[Optimum], full: Optimum) -> tuple[float | None, float | None, float | None]:
    """Return (value, low, high) of exp(mean ln best LoRA rate - ln best full rate); bounds where that is all."""
    a = [o.best_lr for o in lora]
    f = full.best_lr

    def ln(v: float | None) -> float:
        return math.nan if v is None else math.log(v)

    if any(e.value is None for e in a) or f.value is None:  # a bound, from the ends of both sides that are known
        low = _mean([ln(e.low) for e in a]) - ln(f.high)
        high = _mean([ln(e.high) for e in a]) - ln(f.low)
        return None, *(math.exp(v) if math.isfinite(v) else None for v in (low, high))
    centre = _mean([ln(e.value) for e in a]) - ln(f.value)
    if not all(e.has_interval() for e in [*a, f]):
        return math.exp(centre), None, None
    down = math.sqrt(sum((ln(e.value) - ln(e.low)) ** 2 for e in a)) / len(a)
    up = math.sqrt(sum((ln(e.high) - ln(e.value)) ** 2 for e in a)) / len(a)
    low = centre - math.hypot(down, ln(f.high) - ln(f.value))
    high = centre + math.hypot(up, ln(f.value) - ln(f.low))
    return math.exp(centre), math.exp(low), math.exp(high)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _drift(lora: Sequence[Optimum]) -> Estimate:
    """Slope of ln(best rate) per doubling of the rank, by least squares weighted by the optima's intervals.

    The slope is a sum of the optima, so its interval is formed from theirs (MOVER). With three ranks and more it is
    widened where they scatter about the line by more than their intervals say.
    """
    n = sum(o.best_lr.n for o in lora)
    known = [o for o in lora if o.best_lr.value is not None and o.best_lr.has_interval()]
    if len(known) < 2 or len(known) < len(lora):
        return Estimate(None, n=n, flags=("needs two or more optima with intervals, and none at an edge",))
    x = np.array([math.log2(o.curve.key["rank"]) for o in known])
    y = np.array([math.log(o.best_lr.value) for o in known])
    half = np.array([(math.log(o.best_lr.high) - math.log(o.best_lr.low)) / 2 for o in known])
    w = 1 / half**2
    centre = (w * x).sum() / w.sum()
    spread = (w * (x - centre) ** 2).sum()
    if spread == 0:
        return Estimate(None, n=n, flags=("one rank only",))
    k = w * (x - centre) / spread
    slope = float((k * y).sum())
    down = y - np.log([o.best_lr.low for o in known])
    up = np.log([o.best_lr.high for o in known]) - y
    low = math.sqrt(float(((k * np.where(k > 0, down, up)) ** 2).sum()))
    high = math.sqrt(float(((k * np.where(k > 0, up, down)) ** 2).sum()))
    left = len(known) - 2
    if left > 0:
        rest = y - np.average(y, weights=w) - slope * (x - centre)
        scatter = float((w * rest**2).sum()) * 1.96**2 / left  # squares in units of standard errors
        if scatter > 1:
            wider = math.sqrt(scatter) * stats.t.ppf(0.975, left) / 1.96
            low, high = low * wider, high * wider
    return Estimate(slope, slope - low, slope + high, n)


# ---------------------------------------------------------------- verdicts


def _judge_group(
    group: str, claims: dict[str, Any], lora: list[Optimum], full: Optimum, overall: Estimate, drift: Estimate,
    laws: dict[str, float],
) -> list[Verdict]:  # fmt: skip
    every = [full, *lora]
    gates = _gates(every)
    seeds = min(seeds_at_best(o) for o in every)
    known = {"lr_ratio": (overall, True, gates), "lr_drift_per_doubling": (drift, False, _drift_gates(gates, lora))}
    verdicts = []
    for name, claim in claims.items():
        if claim["estimand"] not in known:
            raise TableError(
                f"claim {name!r}: lr_ratio measures {', '.join(known)}, not {claim['estimand']!r}."
            )
        estimate, log, stops = known[claim["estimand"]]
        claim = {**claim, "rivals": {**(claim.get("rivals") or {}), **laws}} if log else claim
        verdicts.append(judge(name, claim, group, estimate, stops, seeds, log))
    return verdicts


def _drift_gates(gates: list[str], lora: list[Optimum]) -> list[str]:
    return gates if len(lora) >= 2 else [*gates, "one rank only"]


def _gates(optima: list[Optimum]) -> list[str]:
    """List what forbids a verdict."""
    found = []
    for o in optima:
        stops = [f for f in o.flags if f in ("at_edge", "bounded_by_divergence", "flat", "few_points",
                                             "no_usable_points", "no_variance")]  # fmt: skip
        if stops:
            found.append(f"{o.curve.name}: {', '.join(stops)}")
        seeds = seeds_at_best(o)
        if seeds < MIN_SEEDS:
            found.append(f"{o.curve.name}: {seeds} seed(s) at the optimum, {MIN_SEEDS} needed")
    found += task_problems([o.curve for o in optima], [o.best_nll for o in optima])
    return found


def task_problems(curves: Sequence[Curve], best: Sequence[float | None]) -> list[str]:
    """Say why the task is unfit for the question, where its floor is known (science: qualification)."""
    start, floor = curves[0].nll_start, curves[0].floor
    lowest = min((b for b in best if b is not None), default=math.nan)
    if not (math.isfinite(start) and math.isfinite(floor) and math.isfinite(lowest)):
        return []
    found = []
    if start - floor < MIN_GAIN:
        found.append(f"task: the base starts {start - floor:.2f} nats above the floor, {MIN_GAIN} needed")
    elif (lowest - floor) / (start - floor) < MIN_REST:
        found.append("task: nearly solved, less than a fifth of the starting excess is left")
    return found


def seeds_at_best(o: Optimum) -> int:
    """Count the seeds at the two rates on both sides of the fitted optimum (without one: about the best rate)."""
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
