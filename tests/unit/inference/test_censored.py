"""A line through values of which some are only bounds."""

import math

import numpy as np
import pytest

from analysis.inference.censored import censored_slope, pseudo_values

INF = math.inf


def test_without_bounds_it_is_least_squares():
    x, y = [0, 1, 2, 3, 1, 2], [0.1, 0.9, 2.3, 2.8, 1.2, 1.9]
    assert censored_slope(x, y, y) == pytest.approx(np.polyfit(x, y, 1)[0])
    one_abscissa = censored_slope([0, 0, 1], [1.0, 1.1, 2.0], [1.0, 1.1, INF])
    assert math.isnan(one_abscissa)


def test_bounds_pull_the_line_and_points_on_a_line_keep_it():
    x = [0, 1, 2, 3]
    on = [0.0, 1.0, 2.0, 2.5]
    assert censored_slope(x, on, [0, 1, 2, INF]) == pytest.approx(1, abs=0.02)
    flat = [0.0, 0.5, 0.4, 2.5]  # the last one is at least 2.5
    high = [*flat[:3], INF]
    assert censored_slope(x, flat, high) > np.polyfit(x[:3], flat[:3], 1)[0] + 0.3
    low = [-INF, 1.0, 1.1, 2.0]  # the first one is at most -1
    assert censored_slope(x, low, [-1.0, 1.0, 1.1, 2.0]) > np.polyfit(x[1:], low[1:], 1)[0] + 0.1


def test_it_is_the_maximum_of_the_likelihood():
    from scipy import optimize, stats

    x = np.array([0, 1, 2, 3, 0, 1, 2, 3], float)
    low = np.array([1.0, 1.3, 2.0, 2.2, 0.7, 1.6, 2.2, 2.2])
    high = np.where(low == 2.2, INF, low)

    def loss(p):
        at, sd = p[0] + p[1] * x, math.exp(p[2])
        known = low == high
        return -(
            stats.norm.logpdf(low[known], at[known], sd).sum()
            + stats.norm.logsf(low[~known], at[~known], sd).sum()
        )

    best = optimize.minimize(loss, [1, 0.5, -1], method="Nelder-Mead", options={"xatol": 1e-8})
    assert censored_slope(x, low, high) == pytest.approx(best.x[1], abs=1e-3)


def test_pseudo_values_of_slopes_over_units_are_the_units_slopes():
    x, rng = np.arange(4.0), np.random.default_rng(0)
    ys = [x + rng.standard_normal(4) for _ in range(3)]

    def slope(of):
        y = np.concatenate(of)
        return censored_slope(np.tile(x, len(of)), y, y)

    own = pseudo_values(slope(ys), [slope([*ys[:k], *ys[k + 1 :]]) for k in range(3)])
    assert own == pytest.approx([slope([y]) for y in ys])
