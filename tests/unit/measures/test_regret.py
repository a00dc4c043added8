"""The rank that is needed, on planted gaps."""

import math

import pytest

from analysis.measures.at_best import AtBest
from analysis.measures.regret import change_of_needed, crossing


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
