"""Values at a best rate that was not tried, and the rank that is needed, on planted gaps."""

import math

import pytest

from analysis.measures.at_best import AtBest, weights
from analysis.measures.regret import change_of_needed, crossing


def test_weights_are_lagranges_and_keep_away_from_a_cliff():
    tried = [math.log(r) for r in (1e-3, 2e-3, 4e-3, 8e-3)]
    at = math.log(2.8e-3)
    for heights in ({x: -x for x in tried}, {x: x for x in tried}):
        found = weights(tried, at, heights)
        assert len(found) == 3 and sum(found.values()) == pytest.approx(1)
        parabola = sum(w * (x - 1) ** 2 for x, w in found.items())
        assert parabola == pytest.approx((at - 1) ** 2)
    assert min(found) == tried[0]  # the loss falls towards lower rates, so the third one lies there
    assert weights(tried, math.log(0.5e-3), heights) == {tried[0]: 1.0}
    assert weights(tried, tried[1], heights) == {tried[1]: 1.0}
    assert set(weights([tried[0], tried[1]], math.log(1.5e-3), heights)) == {tried[0], tried[1]}


def test_the_needed_rank_lies_where_the_gap_last_falls_to_what_is_allowed():
    x = [0.0, 2.0, 3.0, 4.0]
    assert crossing(x, [6.0, 2.0, 0.0, -2.0]) == pytest.approx(3)
    assert 2 < crossing(x, [6.0, 2.0, -2.0, -3.0]) < 3
    assert crossing(x, [-1.0, -1.0, -2.0, -2.0]) == -math.inf
    assert crossing(x, [3.0, 2.0, 1.0, 0.1]) == math.inf
    # A rank that does well between two that do not is chance: what counts is the last crossing.
    assert 3 < crossing(x, [3.0, -1.0, 1.0, -1.0]) < 4
    assert math.isnan(crossing(x, [3.0, math.nan, -1.0, -2.0]))


def test_its_change_is_counted_a_doubling_and_is_none_outside_the_ranks_tried():
    first, last = AtBest({100: 2.0, 101: 3.0}), AtBest({100: 3.0, 101: 5.0})
    assert change_of_needed(first, last, 2).best == {100: 0.5, 101: 1.0}
    assert change_of_needed(first, AtBest({100: 3.0, 101: math.inf}), 2) is None
