"""Statistical power: how many seeds a claim needs, before any run.

The planned runs are fitted as if they came out at an assumed curve: the posterior's spread is then
the one to expect.
"""

import dataclasses
import math

import numpy as np

from analysis.inference.decide import MIN_SEEDS
from analysis.optimum.likelihood import Likelihood, gather
from analysis.optimum.posterior import weigh
from analysis.optimum.valley import linex

NOISE, CURVATURE, SKEW, MISFIT = 4e-3, 0.15, 0.5, 0.35
"""Assumed before a sweep has measured its own: noise of one run (nats), curvature at the optimum
(nats per unit of ln(lr) squared), asymmetry, misfit of the curvature. Measured on the kept sweeps
(analysis/results): 4e-3 to 5e-3, 0.08 to 0.30, -0.1 to 1.4, 0.24 to 0.47."""
MAX_SEEDS = 16
"""A claim that needs more is out of reach."""
N_AROUND = 3
"""Rates around the best one that get fresh seeds."""


def needed_seeds(
    margin: tuple[float, float],
    n_lora: int,
    noise: float = NOISE,
    curvature: float = CURVATURE,
    rates: int = 7,
    factor: float = 2.0,
) -> tuple[int | None, float]:
    """Return the fresh seeds a curve at its three best rates after which a ratio's standard error
    is a quarter of the margin's width (in ln), and that error; None if MAX_SEEDS are not enough.

    Args:
        margin: of the ratio.
        n_lora: LoRA curves that are averaged against one full fine-tuning curve.
        noise: nats, of one run. curvature: nats per unit of ln(lr) squared, at the optimum.
    """
    if not 0 < margin[0] < margin[1]:
        return None, math.inf  # no lower edge to stay off: a ratio's margin starts above 0
    target = (math.log(margin[1]) - math.log(margin[0])) / 4
    error = math.inf
    for n in range(MIN_SEEDS - 1, MAX_SEEDS + 1):
        one = _planned_error(rates, factor, n, noise, curvature)
        error = one * math.sqrt(1 + 1 / max(n_lora, 1))
        if error <= target:
            return n, error
    return None, error


def _planned_error(rates: int, factor: float, fresh: int, noise: float, curvature: float) -> float:
    """Return the standard deviation of ln(best LR) to expect of one curve: one seed over the grid,
    `fresh` at the three best rates."""
    step = math.log(factor)
    grid = (np.arange(rates) - (rates - 1) / 2) * step
    errors = []
    for m in (0.0, 0.25 * step, 0.5 * step):
        loss = curvature * linex(grid - m, SKEW)
        first = min(max(int(np.argmin(loss)) - 1, 0), rates - N_AROUND)
        x = np.concatenate([grid, np.tile(grid[first : first + N_AROUND], fresh)])
        seeds = np.repeat(np.arange(fresh) + 1, N_AROUND)
        block = np.concatenate([np.zeros(rates, int), seeds])
        planned = gather(x, curvature * linex(x - m, SKEW), block)
        errors.append(expected_spread(planned, noise, MISFIT))
    return float(np.mean(errors))


def expected_spread(e: Likelihood, noise: float, misfit: float) -> float:
    """Return the standard deviation of the minimum's posterior, in ln(lr), at a known noise (nats)
    and misfit."""
    ((posterior,), _) = weigh(
        [[dataclasses.replace(e, squares=100 * noise**2, df=100)]], misfit=misfit
    )[0]
    mean = float(posterior.m @ posterior.mass)
    return math.sqrt(max(float((posterior.m - mean) ** 2 @ posterior.mass), 0.0))
