"""Straightness: 1 on a line over the logarithm of updates, and no value where there is none."""

import math

import pytest

from analysis.measures.at_best import AtBest
from analysis.measures.speed import bend, least_straight, straightness

STEPS = (1, 2, 3, 4, 6, 8, 16, 24, 32, 64, 100, 128)


def curve(fall, steps=STEPS):
    return [(s, 3.0 - fall(math.log(s))) for s in steps]


def test_the_last_fall_over_the_one_before_comes_back():
    assert bend(curve(lambda x: 0.1 * x)) == pytest.approx(0, abs=1e-9)
    squared = bend(curve(lambda x: 0.1 * x**2, [2**k for k in range(8)]))  # 128, 32 and 8 updates
    assert math.exp(squared) == pytest.approx((7**2 - 5**2) / (5**2 - 3**2))


def test_a_short_or_rising_or_empty_curve_has_none():
    assert math.isnan(bend([]))
    assert math.isnan(bend(curve(lambda x: -x)))
    assert math.isnan(bend(curve(lambda x: x, (16, 32, 64))))  # begins later than 64 / 16


def test_of_two_curves_the_one_further_from_a_line_is_taken():
    line = AtBest({s: curve(lambda x: 0.1 * x) for s in range(3)})
    bent = AtBest({s: curve(lambda x: math.sqrt(x)) for s in range(3)})
    assert straightness(line).value == pytest.approx(1)
    assert least_straight(line, bent).value == straightness(bent).value < 0.9
    none = AtBest({0: curve(lambda x: x, (64,))})
    assert least_straight(line, none).value is None
