"""rho: updates that full fine-tuning needs for the loss that LoRA has."""

import math

import numpy as np
import pytest

from analysis.measures.at_best import AtBest
from analysis.measures.speed import rho, steps_to_reach


def test_steps_to_reach_interpolates_in_ln_steps():
    points = [(s, 3.0 - 0.5 * math.log(s)) for s in (1, 2, 4, 8, 16, 32)]
    assert steps_to_reach(points, 3.0 - 0.5 * math.log(11)) == pytest.approx(11)
    assert steps_to_reach(points, 0.1) is None and steps_to_reach(points, 5.0) == 1


def test_rho_comes_back_as_planted_and_is_a_bound_where_a_curve_begins_below():
    def curve(slow, shift=0.0):
        return [(s, 3.0 - 0.5 * math.log(s * slow) + shift) for s in (1, 2, 4, 8, 16, 32, 64)]

    e = rho(
        AtBest({s: curve(0.8, 0.01 * s) for s in range(4)}),
        AtBest({s: curve(1.0, 0.01 * s) for s in range(4)}),
    )
    assert e.value == pytest.approx(0.8) and e.low == pytest.approx(0.8) and e.n == 4
    ahead = rho(
        AtBest({0: curve(1.5), 1: curve(1.5)}), AtBest({0: curve(1.0), 1: curve(1.0, 1e-9)})
    )  # to what both reach
    assert ahead.value == pytest.approx(1.5)
    far = rho(AtBest({0: curve(100.0), 1: curve(100.0)}), AtBest({0: curve(1.0), 1: curve(1.0)}))
    assert far.value is None and far.low == pytest.approx(64) and far.flags
    assert rho(AtBest({0: curve(0.8)}), AtBest({1: curve(1.0)})).value is None  # no seed in common


def test_doubt_about_the_best_rate_widens_an_interval_over_seeds():
    def curve(slow):
        return [(s, 3.0 - 0.5 * math.log(s * slow)) for s in (1, 2, 4, 8, 16, 32, 64)]

    full = AtBest({s: curve(1.0) for s in range(3)})
    sure = rho(AtBest({s: curve(0.5 * 1.01**s) for s in range(3)}), full)
    rates = [
        0.5 * 1.2**z for z in np.linspace(-2, 2, 40)
    ]  # what rho would be at other rates that are as likely the best
    likely = tuple({s: curve(r * 1.01**s) for s in range(3)} for r in rates)
    doubtful = rho(AtBest({s: curve(0.5 * 1.01**s) for s in range(3)}, likely), full)
    assert doubtful.value == pytest.approx(sure.value, rel=0.02)
    assert sure.high / sure.low < 1.06 and 1.9 < doubtful.high / doubtful.low < 2.3
