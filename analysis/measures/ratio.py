"""The ratio of LoRA's best learning rate to full fine-tuning's, and their gap in loss.

A ratio's interval comes from independent draws of both optima. The arms share seeds and the shape
of their curves, which makes such an interval conservative. Judges no claim.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from analysis.inference.estimate import LEVEL, Estimate, exp_or_none, from_draws
from analysis.inference.meta import RandomEffects, random_effects
from analysis.optimum.optimum import Optimum

MIN_RANK = 4
"""Claims on ratio and drift are about ranks from 4 up; the study treats rank 1 separately."""


def ratio_of(lora: Sequence[Optimum], full: Optimum) -> Estimate:
    """Return exp(mean ln best LoRA rate - ln best full rate), or a bound if no more is known."""
    a, f = [o.best_lr for o in lora], full.best_lr
    n = sum(e.n for e in [*a, f])

    def ln(v: float | None) -> float:
        return math.nan if v is None else math.log(v)

    if any(e.value is None for e in a) or f.value is None:
        # Bounds from the ends that are known; an unknown end makes the bound NaN.
        low = float(np.mean([ln(e.low) for e in a])) - ln(f.high)
        high = float(np.mean([ln(e.high) for e in a])) - ln(f.low)
        return Estimate(None, exp_or_none(low), exp_or_none(high), n=n)
    if any(e.draws is None for e in [*a, f]):
        return Estimate(math.exp(float(np.mean([ln(e.value) for e in a])) - ln(f.value)), n=n)
    return from_draws(np.exp(np.mean([e.log_draws for e in a], axis=0) - f.log_draws), n)


def pool_ratios(ratios: Sequence[Estimate]) -> RandomEffects | None:
    """Pool ln ratios of independent groups; None with fewer than two that have an interval."""
    logs = [np.log(r.draws) for r in ratios if r.draws is not None]
    return (
        random_effects([d.mean() for d in logs], [d.std() for d in logs]) if len(logs) > 1 else None
    )


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


def gap(lora: Optimum, full: Optimum) -> Estimate:
    """Return best LoRA NLL - best full NLL, in nats, with Student's interval over paired seeds.

    Each arm is at its best tried rate. Only seeds that were not used to choose the rate count (all
    but each curve's first). With fewer than two of them, returns the difference of the fitted
    minima without an interval.
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
    """Return the NLL by seed at the tried rate nearest the optimum.

    The grid's seed, which ran at most of the rates, is left out.
    """
    c = o.curve
    x, y, seed = c.x[c.usable], c.y[c.usable], c.seed[c.usable]
    if not len(x) or o.best_lr.value is None:
        return {}
    grid_seed = max(sorted(set(seed)), key=lambda s: (seed == s).sum())
    at = x[np.argmin(np.abs(x - math.log(o.best_lr.value)))]
    return {int(s): float(v) for s, v in zip(seed[x == at], y[x == at]) if s != grid_seed}
