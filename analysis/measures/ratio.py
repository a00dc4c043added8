"""Measure LoRA's optimal learning rate over full fine-tuning's, and fit a law of this ratio.

The interval of a ratio comes from independent draws of both optima. It is conservative, since the
two methods share seeds and the shape of their LR curves.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from analysis.inference.estimate import (
    Estimate,
    MetaRegression,
    exp_of,
    exp_or_none,
    from_draws,
    meta_regression,
)
from analysis.optimum.fit import Optimum

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


class Ratio(NamedTuple):
    """One measured ratio of optimal LRs: its logarithm, and the standard error of the logarithm."""

    base: str
    hidden: float
    alpha: float
    log: float
    error: float


class RatioLaw(NamedTuple):
    """The fit of ln ratio = a + p ln(hidden / 1000) + q ln(alpha / 32)."""

    p: Estimate
    q: Estimate
    bases: int
    """Number of base models to which p is fitted; `bases_q`: to which q is fitted."""
    bases_q: int


def ratio_law(ratios: Sequence[Ratio], wider: Sequence[Ratio] = ()) -> RatioLaw:
    """Fit the law to measured ratios.

    p comes from a regression over bases at one alpha: 32, or the one that most bases have. It
    has a variance between bases, and one row per base, since the ratios of a base share its full
    fine-tuning curve. q is the mean over bases of the slope over ln(alpha). If hidden size or alpha
    does not vary, its exponent has no value.

    `wider`: more bases, used only to estimate the variance between bases.
    """
    tried = {r.alpha for r in ratios}
    bases_at = {a: len({r.base for r in ratios if r.alpha == a}) for a in sorted(tried)}
    alpha = 32.0 if 32.0 in tried else max(bases_at, key=lambda a: bases_at[a], default=32.0)
    many = _at(alpha, [*ratios, *(r for r in wider if r not in ratios)])
    rows = _at(alpha, ratios)
    width, found_q = _regress(rows, _regress(many)), _within_bases(ratios)
    unknown = Estimate(None, n=len(rows))
    p, q = width.term(1) if width else unknown, found_q.term(0) if found_q else unknown
    return RatioLaw(p, q, len(rows), found_q.n if found_q else 0)


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
