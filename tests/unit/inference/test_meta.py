"""Several values together, some of them bounds: lines, random effects, drift; planted and published numbers."""

import math

import numpy as np
import pytest
from scipy import optimize, stats

from analysis.inference.meta import (
    censored_slope,
    drift,
    pseudo_values,
    random_effects,
)

INF = math.inf


def test_without_bounds_it_is_least_squares():
    x, y = [0, 1, 2, 3, 1, 2], [0.1, 0.9, 2.3, 2.8, 1.2, 1.9]
    assert censored_slope(x, y, y) == pytest.approx(np.polyfit(x, y, 1)[0])
    one_abscissa = censored_slope([0, 0, 1], [1.0, 1.1, 2.0], [1.0, 1.1, INF])
    assert math.isnan(one_abscissa)
    # Pseudo-values of slopes over units that share abscissas are the units' slopes.
    x, rng = np.arange(4.0), np.random.default_rng(0)
    ys = [x + rng.standard_normal(4) for _ in range(3)]

    def slope(of):
        return censored_slope(np.tile(x, len(of)), *[np.concatenate(of)] * 2)

    own = pseudo_values(slope(ys), [slope([*ys[:k], *ys[k + 1 :]]) for k in range(3)])
    assert own == pytest.approx([slope([y]) for y in ys])


def test_it_is_the_maximum_of_the_likelihood():
    """Three values are known to be at least 2.2, one at most 0.7."""
    x = np.array([0, 1, 2, 3, 0, 1, 2, 3], float)
    value = np.array([1.0, 1.3, 2.0, 2.2, 0.7, 1.6, 2.2, 2.2])
    above, below = value == 2.2, value == 0.7
    low, high = np.where(below, -INF, value), np.where(above, INF, value)

    def loss(p):
        at, sd = p[0] + p[1] * x, math.exp(p[2])
        log = np.where(above, stats.norm.logsf(value, at, sd), stats.norm.logpdf(value, at, sd))
        return -np.where(below, stats.norm.logcdf(value, at, sd), log).sum()

    best = optimize.minimize(loss, [1, 0.5, -1], method="Nelder-Mead", options={"xatol": 1e-8})
    assert censored_slope(x, low, high) == pytest.approx(best.x[1], abs=1e-3)


# BCG vaccine against tuberculosis, 13 trials (Colditz et al. 1994): cases and non-cases, vaccinated
# and not
BCG = np.array(
    [
        *((4, 119, 11, 128), (6, 300, 29, 274), (3, 228, 11, 209), (62, 13536, 248, 12619)),
        *((33, 5036, 47, 5761), (180, 1361, 372, 1079), (8, 2537, 10, 619)),
        *((505, 87886, 499, 87892), (29, 7470, 45, 7232), (17, 1699, 65, 1600)),
        *((186, 50448, 141, 27197), (5, 2493, 3, 2338), (27, 16886, 29, 17825)),
    ],
    float,
)


def test_random_effects_are_those_published_for_the_bcg_trials():
    a, b, c, d = BCG.T
    y = np.log(a / (a + b)) - np.log(c / (c + d))
    v = 1 / a - 1 / (a + b) + 1 / c - 1 / (c + d)
    e = random_effects(y, np.sqrt(v))
    assert e.tau**2 == pytest.approx(0.318, abs=1e-3)  # Paule-Mandel, as in metafor's vignette
    assert e.mean == pytest.approx(-0.715, abs=1e-3)
    assert e.p_equal < 1e-20 and e.low_next < e.low < e.high < e.high_next and e.i2 > 0.9
    equal = random_effects([0.5, 0.5, 0.5], [0.1, 0.2, 0.1])
    assert equal.tau == 0 and equal.mean == pytest.approx(0.5) and equal.p_equal == pytest.approx(1)


def test_a_planted_drift_is_found_and_a_flat_one_is_not():
    def found(ranks, slope, sd=0.05):
        rngs = enumerate(map(np.random.default_rng, range(len(ranks))))
        return drift(ranks, [slope * k + sd * rng.standard_normal(4000) for k, rng in rngs], 40)

    steep, flat = (found([4, 8, 16, 32], slope) for slope in (0.3, 0.0))
    assert steep.slope.low < 0.3 < steep.slope.high
    assert steep.p_slope < 0.01 and steep.p_equal < 0.01
    assert flat.slope.low < 0 < flat.slope.high and flat.p_slope > 0.05 and flat.p_equal > 0.05
    assert found([4], 0.0).slope.value is found([4, 4], 0.0).slope.value is None
