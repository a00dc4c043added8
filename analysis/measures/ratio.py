"""The ratio of LoRA's best learning rate to full fine-tuning's, and their gap in loss.

A ratio's interval comes from independent draws of both optima. The arms share seeds and the shape
of their curves, which makes such an interval conservative. Judges no claim.
"""

import math
from collections.abc import Sequence

import numpy as np

from analysis.inference.estimate import Estimate, exp_or_none, from_draws
from analysis.inference.meta import Drift, RandomEffects, drift, random_effects
from analysis.inference.seeds import pooled_variance
from analysis.measures.at_best import losses_at_best, over_seeds
from analysis.optimum.optimum import Optimum

MIN_RANK = 4
"""Claims on ratio and drift are about ranks from 4 up; the study treats rank 1 separately."""


def ratio_of(lora: Sequence[Optimum], full: Optimum) -> Estimate:
    """Return exp(mean ln best LoRA rate - ln best full rate), or a bound if no more is known."""
    a, f = [o.best_lr for o in lora], full.best_lr
    n = sum(e.n for e in [*a, f])

    def ln(v: float | None) -> float:
        return math.nan if v is None else math.log(v)

    if any(e.draws is None for e in [*a, f]):
        # Bounds from the ends that are known; an unknown end makes the bound NaN.
        value = float(np.mean([ln(e.value) for e in a])) - ln(f.value)
        low = float(np.mean([ln(e.low) for e in a])) - ln(f.high)
        high = float(np.mean([ln(e.high) for e in a])) - ln(f.low)
        return Estimate(exp_or_none(value), exp_or_none(low), exp_or_none(high), n=n)
    return from_draws(np.exp(np.mean([e.log_draws for e in a], axis=0) - f.log_draws), n)


def lr_drift(lora: Sequence[Optimum]) -> Drift:
    """Return the slope of ln(best rate) per doubling of the rank; none if a rank has no interval.

    Leaving out the ranks at an edge would bias the slope.
    """
    draws = {o.curve.key["rank"]: o.best_lr.draws for o in lora}
    known = {rank: np.log(d) for rank, d in draws.items() if d is not None}
    if len(known) < len(lora):
        known = {}
    return drift(list(known), list(known.values()), sum(o.best_lr.n for o in lora))


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


def gaps(lora: Sequence[Optimum], full: Optimum) -> list[Estimate]:
    """Return each curve's best LoRA NLL - best full fine-tuning NLL, in nats.

    Losses are interpolated to each arm's best rate and paired by seed; the interval is Student's,
    at least as wide as by the variance pooled over the curves, and includes the error of the best
    rates. Only seeds that were not used to choose the rates count (all but each curve's first).
    With fewer than two of them, returns the difference of the fitted minima without an interval.
    """
    at = dict(zip(map(id, [full, *lora]), losses_at_best([full, *lora])))
    fresh = [
        at[id(o)]
        .paired(at[id(full)], lambda a, f: a - f)
        .without({_grid_seed(o), _grid_seed(full)})
        for o in lora
    ]
    pooled = pooled_variance([list(v.best.values()) for v in fresh])
    return [
        over_seeds(v, pooled) if len(v.best) > 1 else _of_minima(o, full)
        for o, v in zip(lora, fresh)
    ]


def _of_minima(lora: Optimum, full: Optimum) -> Estimate:
    if lora.best_nll is None or full.best_nll is None:
        return Estimate(None)
    return Estimate(lora.best_nll - full.best_nll)


def _grid_seed(o: Optimum) -> int | None:
    """Return the seed that ran at most of the rates; None without a usable run."""
    seeds = o.curve.seed[o.curve.usable]
    return max(sorted(set(map(int, seeds))), key=lambda s: (seeds == s).sum(), default=None)
