"""Turn a posterior of the best rate into a value with an interval, or a bound.

A best rate at the edge of the rates tried, or next to one that diverged, is reported as a bound. A
curve too flat for its noise has neither value nor bound.
"""

import hashlib
import math

import numpy as np

from analysis.inference.estimate import Estimate
from analysis.optimum.likelihood import first_diverged
from analysis.optimum.posterior import Posterior
from analysis.runs.lr_curves import LrCurve


def value_or_bound(
    posterior: Posterior,
    ends: tuple[float, float],
    rates: np.ndarray,
    curve: LrCurve,
    known: bool,
    level: float,
) -> Estimate:
    """Return a value with an interval, or a bound if the interval extends beyond the rates tried.

    Args:
        ends: of the interval, ln(lr).
        rates: usable rates, ln(lr), rising.
        known: whether the noise is known; if not, there is no interval.
        level: of the interval.
    """
    low, high = ends
    open_low, open_high = low < rates[0], high > rates[-1]
    if not (open_low or open_high):
        value = math.exp(float(posterior.quantile(0.5)))
        if not known:
            return Estimate(value, level=level)
        draws = np.exp(posterior.draws(_stream(curve)))
        return Estimate(value, math.exp(low), math.exp(high), draws=draws, level=level)
    if open_low and open_high:
        return Estimate(None, flags=("flat",), level=level)
    if open_low:
        return Estimate(
            None, None, math.exp(high) if known else None, flags=("at_edge",), level=level
        )
    end = first_diverged(curve)
    flag = "bounded_by_divergence" if math.isfinite(end) else "at_edge"
    return Estimate(
        None, math.exp(low) if known else None, _finite(end), flags=(flag,), level=level
    )


def bound_at_end(
    curve: LrCurve, rates: np.ndarray, best: int, posterior: Posterior | None
) -> Estimate:
    """Return a bound if the best rate is the first or the last one tried.

    On the inner side the bound is the neighbouring rate, or further if the noise allows it; on the
    outer side it is the first rate that diverged, if there is one.

    Args:
        rates: usable rates, ln(lr), rising.
        best: index of the best one.
    """
    low, high = (
        (-math.inf, math.inf) if posterior is None else posterior.quantile(np.array([0.025, 0.975]))
    )
    end = first_diverged(curve)
    if best == 0 and len(rates) > 1:
        inner = max(rates[1], high) if math.isfinite(high) else rates[1]
        if inner >= rates[-1] and len(rates) > 2:
            return Estimate(None, flags=("at_edge", "flat"))
        return Estimate(None, None, math.exp(inner), flags=("at_edge",))
    if best == 0:
        return Estimate(None, None, _finite(end), flags=("at_edge",))
    inner = min(rates[best - 1], low) if math.isfinite(low) else rates[best - 1]
    if inner <= rates[0] and len(rates) > 2:
        return Estimate(None, None, _finite(end), flags=("at_edge", "flat"))
    flag = "bounded_by_divergence" if math.isfinite(end) else "at_edge"
    return Estimate(None, math.exp(inner), _finite(end), flags=(flag,))


def _finite(ln_lr: float) -> float | None:
    return math.exp(ln_lr) if math.isfinite(ln_lr) else None


def _stream(curve: LrCurve) -> int:
    """Derive a random stream from the curve's settings, the same on every machine."""
    name = repr(sorted((k, str(v)) for k, v in curve.key.items()))
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")


def cubic_vertex(rates: np.ndarray, means: np.ndarray, best: int) -> float | None:
    """Return the minimum, in ln(lr), of a least-squares cubic; None if it has none inside.

    The cubic is fitted to the five rates around the best one.
    """
    at = slice(min(max(0, best - 2), max(0, len(rates) - 5)), max(best + 3, 5))
    x, y = rates[at] - rates[best], means[at]
    if len(x) < 4:
        return None
    slope = np.polyder(np.polyfit(x, y, 3))
    flat = [
        r.real
        for r in np.roots(slope)
        if abs(r.imag) < 1e-12 and np.polyval(np.polyder(slope), r.real) > 0
    ]
    return float(rates[best] + flat[0]) if flat and x[0] <= flat[0] <= x[-1] else None
