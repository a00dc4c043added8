"""Values at a best rate that was not tried, from those at rates that were."""

import math

import pytest

from analysis.measures.at_best import weights


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
