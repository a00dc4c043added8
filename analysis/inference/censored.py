"""A straight line through values of which some are only known to lie beyond a bound."""

import math
from collections.abc import Sequence

import numpy as np
from scipy import optimize
from scipy.special import log_ndtr

SHARPEST = 0.01
"""Smallest standard deviation about the line: values that lie on a line exactly have no maximum of
the likelihood."""


def censored_slope(x: Sequence[float], low: Sequence[float], high: Sequence[float]) -> float:
    """Return the slope of a line by maximum likelihood (Tobin, Econometrica 26, 1958).

    The values are normal about the line, with one standard deviation sigma. A value counts with its
    density where it is known, and with the probability of its range where it is censored. Without a
    censored value this is least squares. In (intercept, slope, 1) / sigma the log likelihood is
    concave (Olsen, Econometrica 46, 1978), so the maximum found is the only one.

    NaN where the slope has no maximum: fewer than two different x with a known value.

    Args:
        x: abscissas.
        low: lower ends; -inf if only an upper bound is known.
        high: upper ends; equal to `low` where the value is known, inf if only a lower one is known.
    """
    at, a, b = (np.asarray(v, float) for v in (x, low, high))
    known, above = a == b, np.isinf(b)
    if len(set(at[known])) < 2:
        return math.nan
    centre = at[known].mean()
    design = np.stack([np.ones(len(at)), at - centre], 1)
    line = np.linalg.lstsq(design[known], a[known], rcond=None)[0]
    if known.all():
        return float(line[1])
    ends = np.where(above, a, b)

    def loss(p: np.ndarray) -> tuple[float, np.ndarray]:
        """Return minus the log likelihood and its gradient at (line, 1) / sigma."""
        z = p[2] * ends - design @ p[:2]  # residuals over sigma
        tail = np.where(above, -z, z)
        log_tail = log_ndtr(tail)
        hazard = np.exp(-0.5 * tail**2 - 0.5 * math.log(2 * math.pi) - log_tail)
        dz = np.where(known, z, np.where(above, hazard, -hazard))
        total = np.where(known, 0.5 * z**2, -log_tail).sum() - known.sum() * math.log(p[2])
        steep = float(dz @ ends) - known.sum() / p[2]
        return float(total), np.append(-design.T @ dz, steep)

    rest = a[known] - design[known] @ line
    sigma = max(float(np.sqrt((rest**2).mean())), 10 * SHARPEST)
    bounds = [(None, None), (None, None), (1e-6, 1 / SHARPEST)]
    start = np.append(line, 1.0) / sigma
    found = optimize.minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds)
    return float(found.x[1] / found.x[2])


def pseudo_values(whole: float, without: Sequence[float]) -> list[float]:
    """Return the jackknife's pseudo-values of an estimate, one per unit (Tukey, 1958).

    n x whole - (n - 1) x (the estimate without the unit). Their mean and Student's interval with
    n - 1 degrees of freedom are the estimate's. For a least-squares slope over units with the same
    abscissas they are exactly the units' own slopes.

    Args:
        whole: the estimate from all units.
        without: the estimates that leave out one unit each.
    """
    n = len(without)
    return [n * whole - (n - 1) * v for v in without]
