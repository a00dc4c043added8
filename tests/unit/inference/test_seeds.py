"""Intervals over few seeds, and how many seeds decide a claim: planted means and spreads."""

import math

import numpy as np
import pytest
from scipy import stats

from analysis.inference.decide import judge, look_level
from analysis.inference.estimate import Estimate
from analysis.inference.meta import meta_regression, within_groups
from analysis.inference.seeds import PooledVariance, from_sample, pooled_variance
from analysis.inference.spread import SEEDS, Part, Spread, needed


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


CLAIM = {"estimand": "rho", "expected": 1, "margin": [0.9, 1.11]}
VALUE, SD, LEVEL = 0.821, 0.0766, 0.9706


def test_three_seeds_need_nine_and_not_twenty_three():
    """The interval of three seeds is wide because t is 5.7 there: it narrows faster than 1/sqrt(n),
    which asked for 23. How often the seeds that are named decide: test_decide.py."""
    three = np.exp(math.log(VALUE) + SD * np.linspace(-1, 1, 3))
    verdict = judge("c", CLAIM, "g", from_sample(three, log=True), [], 3, True, LEVEL)
    assert verdict.needed == "about 9 seeds at each optimum (now 3)" and verdict.missing == 6


def test_an_error_that_all_seeds_share_does_not_fall_with_their_number():
    parts = (Part(0.05, 2),)
    found = {}
    for shared in (0.0, 0.03, 0.06):
        spread = Spread(3, parts=parts, shared=shared)
        half, _, _ = spread.at(3, 0.95)
        found[shared] = needed(spread, 0.1, (0.1 - half, 0.1 + half), (-9, 0), 0.95)
    assert found[0.0] < found[0.03] and found[0.06] is None
    e = from_sample([0.08, 0.1, 0.12], shifts=np.linspace(-0.1, 0.1, 50))
    verdict = judge("c", {**CLAIM, "margin": [-9, 0.05]}, "g", e, [], 3, False)
    assert "learning rates around the best ones" in verdict.needed


def test_the_pooled_variance_gains_degrees_of_freedom_from_every_sample():
    spread = from_sample([1.0, 1.01, 0.99], pooled=PooledVariance(0.01, 8)).spread
    half, error, df = spread.at(6, 0.95)
    assert df == 20 and error == pytest.approx(0.1 / math.sqrt(6))
    assert half == pytest.approx(2.086 * error, rel=1e-3)


def test_what_is_counted_are_the_units_of_the_interval():
    trace = within_groups([[(0, 0.1), (1, 0.9), (2, 0.5)]] * 4, "layer sets")
    open_ = judge("c", {**CLAIM, "margin": [-1, 0.4]}, "g", trace, [], 3, False)
    assert open_.outcome == "UNDECIDED" and "layer sets" in open_.needed
    bases = meta_regression(np.array([0.1, 0.4, 0.2]), np.full(3, 0.01), np.ones((3, 1))).term(0)
    assert "bases" in judge("c", {**CLAIM, "margin": [-9, 0.2]}, "g", bases, [], 7, False).needed
    fit = Estimate(1.0, 0.85, 1.15, 40)  # of a fit: 40 runs, 3 seeds at the optimum
    assert f"{SEEDS} (now 3)" in judge("c", CLAIM, "g", fit, [], 3, False).needed


def test_a_partial_correlation_counts_the_means_that_were_subtracted():
    """Twelve pairs of four groups, correlated within them: 95% intervals hold the truth. With n - 3
    for the variance they held it in 90 to 92%."""
    rng, held = np.random.default_rng(1), 0
    for _ in range(1500):
        pairs = rng.multivariate_normal([0, 0], [[1, 0.8], [0.8, 1]], (4, 3))
        e = within_groups(pairs + rng.standard_normal((4, 1, 2)), "pairs")
        held += e.low <= 0.786 <= e.high  # Spearman's correlation of the centred pairs
    assert 0.94 < held / 1500 < 0.985
    assert within_groups([[(0, 0), (1, 1)]] * 2, "pairs").value is None  # no degree of freedom
