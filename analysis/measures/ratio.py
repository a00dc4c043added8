"""Measure LoRA's optimal learning rate over full fine-tuning's, and fit a law of this ratio.

The interval of a ratio comes from independent draws of both optima. It is conservative, since the
two methods share seeds and the shape of their LR curves. Published laws are called rivals.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from analysis.inference.estimate import (
    Estimate,
    MetaRegression,
    exp_of,
    exp_or_none,
    from_draws,
    meta_regression,
)
from analysis.optimum.fit import Optimum, rate_means
from analysis.runs.curves import LrCurve

MIN_RANK = 4
"""Claims on ratio and drift are about ranks from 4 up; the study treats rank 1 separately."""


def ratio_of(lora: Sequence[Optimum], full: Optimum) -> Estimate:
    """Return exp(mean ln optimal LoRA LR - ln optimal full fine-tuning LR), or a bound of it.

    There is only a bound if one of the optima is a bound.
    """
    a, f = [o.best_lr for o in lora], full.best_lr
    n = sum(e.n for e in [*a, f])
    if all(e.draws is not None for e in [*a, f]):
        return from_draws(np.exp(np.mean([e.log_draws for e in a], axis=0) - f.log_draws), n)
    ends: list[float | None] = []
    for mine, others in (("value", "value"), ("low", "high"), ("high", "low")):
        known = [*(getattr(e, mine) for e in a), getattr(f, others)]
        *logs, of_full = [math.nan if v is None else math.log(v) for v in known]
        ends.append(exp_or_none(float(np.mean(logs)) - of_full))  # None if one is unknown
    value, low, high = ends
    return Estimate(value, low, high, n)


def lr_drift(lora: Sequence[Optimum]) -> Estimate:
    """Return the slope of ln(optimal LR) per doubling of the rank, if all ranks have intervals.

    It is fitted by least squares, weighted by 1 / variance. If three or more optima scatter about
    the line by more than their own errors explain, the slope's spread is multiplied by sqrt(chi^2 /
    df), the Particle Data Group's scale factor.
    """
    n, known = sum(o.best_lr.n for o in lora), [o for o in lora if o.best_lr.draws is not None]
    draws = {o.curve.key["rank"]: o.best_lr.log_draws for o in known}
    if len(draws) < max(len(lora), 2):
        few = "needs two or more optima with intervals, and none at an edge"
        return Estimate(None, n=n, flags=(few,))
    x, y = np.log2(np.array([*draws], float)), np.array([np.median(d) for d in draws.values()])
    w = 1 / np.array([np.var(d) for d in draws.values()])
    centre = (w * x).sum() / w.sum()
    k = w * (x - centre) / float((w * (x - centre) ** 2).sum())
    slope = float(k @ y)
    off = sum(ki * (d - yi) for ki, d, yi in zip(k, draws.values(), y))
    if len(draws) > 2:
        rest = y - np.average(y, weights=w) - slope * (x - centre)
        birge = float((w * rest**2).sum()) / (len(draws) - 2)
        off = off * math.sqrt(max(birge, 1.0))
    return from_draws(slope + off, n)


def pool_ratios(ratios: Sequence[Estimate]) -> tuple[Estimate, float] | None:
    """Return the mean ratio of independent groups, by random effects, and their spread (a factor).

    None with fewer than two groups that have an interval. The spread is between groups.
    """
    logs = [np.log(r.draws) for r in ratios if r.draws is not None]
    if len(logs) < 2:
        return None
    means, variances = (np.array(v) for v in zip(*((d.mean(), d.var()) for d in logs)))
    fit = meta_regression(means, variances, np.ones((len(logs), 1)))
    return exp_of(fit.term(0)), math.exp(fit.tau)


def rivals(width: int, alpha: float) -> dict[str, float]:
    """Return the ratios that published laws predict at this hidden size and alpha."""
    if not width:
        return {}
    return {
        "constant 10 (the study)": 10.0,
        "10 sqrt(hidden/4096) (muA, arXiv 2602.06204, anchored)": 10 * math.sqrt(width / 4096),
        "hidden/(2 alpha) (withdrawn by the study's authors)": width / (2 * alpha),
        "sqrt(3) hidden/alpha (equal first step under Adam)": math.sqrt(3) * width / alpha,
    }


RIVALS: dict[str, tuple[float, float | None]] = {
    "constant 10 (the study)": (0.0, None),
    "sqrt(hidden) (muA, arXiv 2602.06204)": (0.5, None),
    "hidden/(2 alpha) (withdrawn by the study's authors)": (1.0, -1.0),
    "sqrt(3) hidden/alpha (equal first step under Adam)": (1.0, -1.0),
}
"""Published law -> exponents of hidden size and alpha. None: the law says nothing about alpha."""
ALPHA = 32.0
"""The study's alpha. p is fitted to the ratios at this alpha, if it was tried."""


class Ratio(NamedTuple):
    """One measured ratio of optimal LRs: its logarithm, and the standard error of the logarithm."""

    base: str
    hidden: float
    alpha: float
    log: float
    error: float


class RatioLaw(NamedTuple):
    """The fit of ln ratio = a + p ln(hidden / 1000) + q ln(alpha / 32), and tests of rivals."""

    at_reference: Estimate
    """The ratio at hidden size 1000, at the alpha at which p was fitted."""
    p: Estimate
    q: Estimate
    bases: int
    """Number of base models to which p is fitted; `bases_q`: to which q is fitted."""
    bases_q: int
    rivals: dict[str, float | None]
    """Published law -> p-value of its exponents; None: too few bases to test."""


def ratio_law(ratios: Sequence[Ratio], wider: Sequence[Ratio] = ()) -> RatioLaw:
    """Fit the law to measured ratios.

    p comes from a regression over bases at one alpha: ALPHA, or the one that most bases have. It
    has a variance between bases, and one row per base, since the ratios of a base share its full
    fine-tuning curve. q is the mean over bases of the slope over ln(alpha). If hidden size or alpha
    does not vary, its exponent has no value.

    `wider`: more bases, used only to estimate the variance between bases.
    """
    tried = {r.alpha for r in ratios}
    bases_at = {a: len({r.base for r in ratios if r.alpha == a}) for a in sorted(tried)}
    alpha = ALPHA if ALPHA in tried else max(bases_at, key=lambda a: bases_at[a], default=ALPHA)
    many = _at(alpha, [*ratios, *(r for r in wider if r not in ratios)])
    rows = _at(alpha, ratios)
    width, found_q = _regress(rows, _regress(many)), _within_bases(ratios)
    unknown, rivals = Estimate(None, n=len(rows)), dict[str, float | None]()
    level = dataclasses.replace(exp_of(width.term(0)), n=len(rows)) if width else unknown
    for name, (of_width, of_alpha) in RIVALS.items():
        found = [
            None if width is None else width.p_of(1, of_width),
            None if found_q is None or of_alpha is None else found_q.p_of(0, of_alpha),
        ]
        known = [v for v in found if v is not None]  # Bonferroni over the two tests
        rivals[name] = min(1.0, len(known) * min(known)) if known else None
    p, q = width.term(1) if width else unknown, found_q.term(0) if found_q else unknown
    return RatioLaw(level, p, q, len(rows), found_q.n if found_q else 0, rivals)


def _at(alpha: float, ratios: Sequence[Ratio]) -> list[Ratio]:
    """Average the ln ratios, and their errors, of each base at one alpha: they share runs."""
    out: list[Ratio] = []
    for base in dict.fromkeys(r.base for r in ratios if r.alpha == alpha):
        mine = [r for r in ratios if (r.base, r.alpha) == (base, alpha)]
        log, error = np.mean([(r.log, r.error) for r in mine], axis=0).tolist()
        out.append(mine[0]._replace(log=log, error=error))
    return out


def _regress(rows: Sequence[Ratio], wider: MetaRegression | None = None) -> MetaRegression | None:
    if len({r.hidden for r in rows}) < 2:
        return None
    design = np.stack([np.ones(len(rows)), np.log([r.hidden / 1000 for r in rows])], 1)
    logs, errors = np.array([(r.log, r.error) for r in rows]).T
    return meta_regression(logs, errors**2, design, wider)


def _within_bases(ratios: Sequence[Ratio]) -> MetaRegression | None:
    """Average over bases the slope of ln ratio over ln(alpha); None if no base has two alphas."""
    slopes, variances = [], []
    for base in sorted({r.base for r in ratios}):
        mine = [r for r in ratios if r.base == base]
        x, w = np.log([r.alpha for r in mine]), np.array([r.error**-2.0 for r in mine])
        off = x - np.average(x, weights=w)
        if (spread := float((w * off**2).sum())) > 1e-12:
            slopes.append(float((w * off * [r.log for r in mine]).sum()) / spread)
            variances.append(1 / spread)
    if not slopes:
        return None
    return meta_regression(np.array(slopes), np.array(variances), np.ones((len(slopes), 1)))


PUBLISHED = {"base": 5e-5, "M": 10.0, "llama": 0.781, "qwen": 0.0775}
"""Published constants, with p by family (tinker-cookbook, docs/sl-hyperparams, 2025)."""
REFERENCE = 2000.0
"""Hidden size of the law's constant."""


def family(model: str) -> str:
    """Return a model's family: the leading letters of its name, e.g. Qwen/Qwen3-8B -> qwen."""
    found = re.match(r"[A-Za-z]+", str(model).rsplit("/", 1)[-1])
    return found.group(0).lower() if found else str(model).lower()


def published(curve: LrCurve, hidden: float) -> float | None:
    """Return the LR by the published formula; None for a family without a published exponent."""
    p = PUBLISHED.get(family(curve.key["model"]))
    if p is None or not hidden > 0:
        return None
    m = PUBLISHED["M"] if curve.key["method"] == "lora" else 1.0
    return PUBLISHED["base"] * m * (REFERENCE / hidden) ** p


def regret(curve: LrCurve, lr: float) -> float | None:
    """Return (loss at an LR - lowest loss over the LRs tried) / the lowest loss, in percent.

    The loss is interpolated linearly in ln(lr). None outside the usable LRs.
    """
    lrs, means = rate_means(curve)
    if len(lrs) < 2 or not lrs[0] <= math.log(lr) <= lrs[-1] or not means.min():
        return None
    best = float(means.min())
    return 100 * (float(np.interp(math.log(lr), lrs, means)) - best) / abs(best)


def by_loss(curves: Sequence[LrCurve], hidden: dict[str, float]) -> list[dict[str, Any]]:
    """Fit each family and method by minimising the summed loss; intervals resample the models.

    A curve's term is (loss at the law's LR - best loss tried) / best loss tried, interpolated.
    Outside the LRs tried, the last segment of the curve is extrapolated, but never downward:
    otherwise the fit could prefer LRs without data. With one hidden size, p is not fitted.

    `hidden`: model -> hidden size. The law: LR = lr_at_2000 x (2000 / hidden size)^p;
    `regret_percent` is the mean of the terms at its LRs.
    """
    laws: list[dict[str, Any]] = []
    groups: dict[tuple[str, str], list[LrCurve]] = {}
    for c in curves:
        if len(np.unique(c.x[c.usable])) >= 2 and hidden.get(c.key["model"], math.nan) > 0:
            groups.setdefault((family(c.key["model"]), c.key["method"]), []).append(c)
    for (name, method), members in sorted(groups.items(), key=lambda group: group[0]):
        of = [c.key["model"] for c in members]
        widths, models, n = np.array([hidden[m] for m in of]), sorted(set(of)), len(members)
        one_size, enough = len(set(widths)) < 2, len(models) >= 4
        ps = np.zeros(1) if one_size else np.linspace(-1.5, 2.0, 141)
        tried = np.concatenate([c.x[c.usable] for c in members])
        ks = np.linspace(tried.min() - 1, tried.max() + 1, 161)
        at = [(ks + ps[:, None] * math.log(REFERENCE / h)).ravel() for h in widths]
        loss = np.array([_extrapolated(c, x) for c, x in zip(members, at)])
        even = [1 / len(models)] * len(models)
        count = np.random.default_rng(7).multinomial(len(models), even, 400)
        drawn = np.argmin(count[:, [models.index(m) for m in of]] @ loss, axis=1)
        best, fits = int(np.argmin(loss.sum(0))), []
        all_ks, all_ps = np.tile(ks, len(ps)), np.repeat(ps, len(ks))
        for v in (np.exp(all_ks), all_ps):
            low, high = np.quantile(v[drawn], [0.025, 0.975], method="hazen").tolist()
            value = float(v[best])
            known = Estimate(value, min(low, value), max(high, value), n)
            fits.append(known if enough else Estimate(value, n=n))
        logs = all_ks[best] + all_ps[best] * np.log(REFERENCE / widths)
        costs = [regret(c, math.exp(x)) for c, x in zip(members, logs)]
        percent = [v for v in costs if v is not None]
        flags = ["one hidden size"] * one_size
        flags += [] if enough else [f"{len(models)} model(s): no interval"]
        mean = float(np.mean(percent)) if percent else None
        laws.append(
            {"family": name, "method": method, "lr_at_2000": fits[0]}
            | {"p": Estimate(None, n=n) if one_size else fits[1], "models": len(models)}
            | {"regret_percent": mean, "flags": flags}
        )
    return laws


def _extrapolated(curve: LrCurve, ln_lr: np.ndarray) -> np.ndarray:
    lrs, means = rate_means(curve)
    inside = np.interp(ln_lr, lrs, means)
    left = max((means[0] - means[1]) / (lrs[1] - lrs[0]), 0.0) * np.maximum(lrs[0] - ln_lr, 0)
    right = max((means[-1] - means[-2]) / (lrs[-1] - lrs[-2]), 0.0) * np.maximum(ln_lr - lrs[-1], 0)
    return (inside + left + right - means.min()) / (abs(means.min()) or 1.0)
