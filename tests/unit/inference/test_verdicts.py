"""The decision rule on one interval, and bounds in words."""

import pytest

from analysis.inference.decide import judge
from analysis.inference.estimate import AT_LEAST, Estimate, with_interval
from analysis.inference.gates import Gate, GateCode


@pytest.mark.parametrize(
    ("low", "value", "high", "outcome"),
    [
        (8, 10, 12, "SUPPORTED"),
        (2, 3, 4, "REFUTED"),
        (15, 20, 25, "REFUTED"),
        (6, 10, 15, "UNDECIDED"),
        (None, 10, None, "UNDECIDED"),
    ],
)
def test_the_decision_rule(low, value, high, outcome):
    claim = {"estimand": "lr_ratio", "expected": 10, "margin": [7.1, 14.1]}
    verdict = judge("ratio", claim, "g", Estimate(value, low, high), [], 3, True)
    assert verdict.outcome == outcome
    assert bool(verdict.needed) == (outcome == "UNDECIDED")
    gate = Gate(GateCode.TASK, "nearly solved")
    gated = judge("ratio", claim, "g", Estimate(value, low, high), [gate], 3, True)
    assert gated.outcome == "UNDECIDED" and gated.why == "task: nearly solved"


def test_bounds_are_written_as_bounds():
    assert with_interval(Estimate(None, 2.0, None)) == "> 2"
    assert with_interval(Estimate(None, None, 2.0)) == "< 2"
    assert with_interval(Estimate(3.0, 2.0, 4.0)) == "3 [2, 4]"
    assert with_interval(Estimate(3.0, 2.0, 4.0, flags=(AT_LEAST,))) == "at least 3 [2, 4]"
    assert with_interval(Estimate(None)) == "-"
