"""Intervals over few seeds."""

import math

import numpy as np
import pytest
from scipy import stats

from analysis.inference.decide import judge, look_level
from analysis.inference.seeds import PooledVariance, from_sample, pooled_variance


def test_the_usual_variance_is_that_of_most_samples():
    rng = np.random.default_rng(5)
    samples = [rng.normal(0, 0.1, n) for n in (2, 3, 6) for _ in range(700)]
    found = pooled_variance(samples)
    assert found.var == pytest.approx(0.01, rel=0.05) and found.df == 700 * (1 + 2 + 5)
    assert pooled_variance([*samples, *(rng.normal(0, 10, 3) for _ in range(100))]).var < 0.012
    assert pooled_variance([[1.0, 2.0]]) is None


@pytest.mark.full
@pytest.mark.parametrize(
    ("spreads", "shared"),
    [
        *(((1,) * 8, 0.0), ((1, 3), 0.0), ((1, 5), 0.0), ((1, 1, 4), 0.0)),
        *(((1, 1, 1, 1, 4), 0.0), ((1,) * 5, 0.8), ((1,) * 5, 0.95), ((1, 2, 2, 3, 4), 0.8)),
    ],
)
def test_intervals_over_three_seeds_cover_and_are_at_least_students(spreads, shared):
    """Samples of different spread, correlated by seed."""
    rng, inside, n = np.random.default_rng(7), np.zeros(len(spreads)), 500
    for _ in range(n):
        common = rng.standard_normal(3)
        samples = [
            s * (math.sqrt(shared) * common + math.sqrt(1 - shared) * rng.standard_normal(3))
            for s in spreads
        ]
        pooled = pooled_variance(samples)
        for k, s in enumerate(samples):
            e, alone = from_sample(s, pooled=pooled), from_sample(s)
            assert e.high - e.low >= (alone.high - alone.low) * (1 - 1e-9)
            inside[k] += e.low <= 0 <= e.high
    assert (inside / n > 0.925).all()


def test_seeds_that_agree_by_chance_do_not_make_an_interval_narrow():
    others = [[0.00, 0.03, 0.05], [0.10, 0.06, 0.08], [0.20, 0.24, 0.21], [0.30, 0.28, 0.33]]
    lucky = [0.4150, 0.4151, 0.4149]
    e, alone = from_sample(lucky, pooled=pooled_variance([lucky, *others])), from_sample(lucky)
    assert alone.high - alone.low < 6e-4 and e.high - e.low > 0.01


@pytest.mark.parametrize("rounds", [1, 3, 5])
def test_the_wider_interval_is_picked_at_the_level_that_judges(rounds):
    """0.45 of the pooled spread: Student's three seeds are narrower at 95% and wider from 97.8% on."""
    level, pooled = look_level(rounds), PooledVariance(1.0, 10)
    own = 0.45 * np.array([-1.0, 0.0, 1.0])
    claim = {"estimand": "rho", "expected": 0, "margin": [-9, 9]}
    e = judge("c", claim, "g", from_sample(own, pooled=pooled), [], 3, False, level).estimate
    both = [(0.45, 2), (1.0, 10)]
    widest = max(sd / math.sqrt(3) * stats.t.ppf(0.5 + level / 2, df) for sd, df in both)
    assert e.high == pytest.approx(widest, rel=2e-3) and e.low == pytest.approx(-widest, rel=2e-3)
