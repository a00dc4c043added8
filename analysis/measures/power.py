"""Statistical power: how many seeds a claim needs, estimated before any run.

Planned runs are given the loss of an assumed curve; the spread of the resulting posterior is the
spread to expect.
"""

import dataclasses
import math

import numpy as np

from analysis.inference.gates import MIN_SEEDS
from analysis.optimum.likelihood import Likelihood, gather
from analysis.optimum.posterior import weigh
from analysis.optimum.valley import linex

NOISE, CURVATURE, SKEW, MISFIT = 4e-3, 0.15, 0.5, 0.35
"""Assumed until a sweep has measured its own: noise of one run (nats), curvature at the optimum
(nats per unit of ln(lr) squared), asymmetry, misfit of the curvature. The kept sweeps
(analysis/results) measured 4e-3 to 5e-3, 0.08 to 0.30, -0.1 to 1.4, 0.24 to 0.47."""
MAX_SEEDS = 16
"""A claim that needs more seeds than this is considered out of reach."""
N_AROUND = 3
"""Number of rates around the best one that get new seeds."""


def needed_seeds(
    margin: tuple[float, float],
    n_lora: int,
    noise: float = NOISE,
    curvature: float = CURVATURE,
    rates: int = 7,
    factor: float = 2.0,
) -> tuple[int | None, float]:
    """Return how many new seeds per curve a claim on a ratio needs, and the standard error reached.

    The new seeds run at the three best rates of each curve. They suffice when the ratio's standard
    error (in ln) is at most a quarter of the margin's width. The number is None if MAX_SEEDS are
    not enough.

    Args:
        margin: of the ratio; both ends above 0.
        n_lora: number of LoRA curves that are averaged against one full fine-tuning curve.
        noise: of one run, in nats.
        curvature: at the optimum, in nats per unit of ln(lr) squared.
        rates: number of rates in the grid.
        factor: between neighbouring rates.
    """
    if not 0 < margin[0] < margin[1]:
        return None, math.inf  # the width in ln needs a margin above 0
    target = (math.log(margin[1]) - math.log(margin[0])) / 4
    error = math.inf
    for n in range(MIN_SEEDS - 1, MAX_SEEDS + 1):
        one = _planned_error(rates, factor, n, noise, curvature)
        error = one * math.sqrt(1 + 1 / max(n_lora, 1))
        if error <= target:
            return n, error
    return None, error


def _planned_error(rates: int, factor: float, fresh: int, noise: float, curvature: float) -> float:
    """Return the expected standard deviation of one curve's ln(best LR).

    The curve has one seed over the whole grid and `fresh` more at the three best rates.
    """
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
    """Return the standard deviation of the minimum's posterior, in ln(lr).

    Args:
        noise: of one run, in nats, taken as known.
        misfit: taken as known.
    """
    ((posterior,), _) = weigh(
        [[dataclasses.replace(e, squares=100 * noise**2, df=100)]], misfit=misfit
    )[0]
    mean = float(posterior.m @ posterior.mass)
    return math.sqrt(max(float((posterior.m - mean) ** 2 @ posterior.mass), 0.0))
