"""The decision rule: over one interval, interim looks and several claims."""

import math

import numpy as np
import pytest

from analysis.inference.decide import holm, judge, look_level, p_value
from analysis.inference.estimate import AT_LEAST, Estimate, from_draws, with_interval
from analysis.inference.gates import REMEDIES, Gate, GateCode
from analysis.measures.at_best import AtBest, over_seeds


def draws(centre, sd, stream, n=4000):
    return centre + sd * np.random.default_rng(stream).standard_normal(n)


CLAIM = {"estimand": "lr_ratio", "expected": 10, "margin": [7.1, 14.1], "primary": True}


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
def test_the_interval_is_compared_with_the_margin(low, value, high, outcome):
    verdict = judge("ratio", CLAIM, "g", Estimate(value, low, high), [], 3, True)
    assert verdict.outcome == outcome
    assert bool(verdict.needed) == (outcome == "UNDECIDED")
    gate = Gate(GateCode.TASK, "nearly solved")
    gated = judge("ratio", CLAIM, "g", Estimate(value, low, high), [gate], 3, True)
    assert gated.outcome == "UNDECIDED" and gated.why == gate.sentence


def test_bounds_are_written_as_bounds():
    assert with_interval(Estimate(None, 2.0, None)) == "> 2"
    assert with_interval(Estimate(None, None, 2.0)) == "< 2"
    assert with_interval(Estimate(3.0, 2.0, 4.0)) == "3 [2, 4]"
    assert with_interval(Estimate(3.0, 2.0, 4.0, flags=(AT_LEAST,))) == "at least 3 [2, 4]"
    assert with_interval(Estimate(None)) == "-"


def test_looks_are_judged_at_pococks_levels():
    assert look_level(1) == pytest.approx(0.95) and look_level(3) == pytest.approx(0.9779)
    ln = draws(math.log(10), 0.165, 0)
    once = judge("r", CLAIM, "g", from_draws(np.exp(ln), 9), [], 5, True, look_level(1))
    thrice = judge("r", CLAIM, "g", from_draws(np.exp(ln), 9), [], 5, True, look_level(3))
    assert once.outcome == "SUPPORTED" and thrice.outcome == "UNDECIDED" and "97.8%" in thrice.why
    with pytest.raises(ValueError, match="at most 5"):
        look_level(6)


@pytest.mark.parametrize(
    "better, centre, said",
    [("higher", 40, True), ("higher", 2, False), ("lower", 2, True), ("lower", 40, False)],
)
def test_a_refutation_on_the_better_side_says_so(better, centre, said):
    estimate = from_draws(np.exp(draws(math.log(centre), 0.05, 2)), 9)
    found = judge("r", {**CLAIM, "better": better}, "g", estimate, [], 5, True)
    assert found.outcome == "REFUTED" and ("better side" in found.why) == said


def test_the_p_value_is_the_level_at_which_it_is_decided():
    values = np.exp(draws(math.log(10), 0.1, 1))
    p = p_value(values, 7.1, 14.1)
    low, high = np.quantile(values, [p / 2, 1 - p / 2])
    assert low >= 7.0 and high <= 14.2 and p < 0.01
    assert p_value(values, 9.9, 10.1) > 0.5
    assert p_value(values, 30, 40) <= 0.001


def test_holm_corrects_primary_claims_only():
    def verdict(name, sd, primary=True):
        estimate = from_draws(np.exp(draws(math.log(10), sd, 5)), 9)
        return judge(name, {**CLAIM, "primary": primary}, "g", estimate, [], 5, True)

    sure, close = verdict("sure", 0.05), verdict("close", 0.16)
    aside = verdict("aside", 0.16, primary=False)
    assert {v.outcome for v in (sure, close, aside)} == {"SUPPORTED"}
    # 0.05 / 3 is too strict for the two weak ones once three are judged together
    out = holm([close, sure, verdict("third", 0.165), aside])
    assert [v.outcome for v in out] == ["UNDECIDED", "SUPPORTED", "UNDECIDED", "SUPPORTED"]
    assert "Holm" in out[0].why
    assert [v.outcome for v in holm([close])] == ["SUPPORTED"]


def test_where_likely_rates_say_nothing_there_is_no_interval():
    best, far = {s: 0.1 * s for s in range(3)}, dict.fromkeys(range(3), -math.inf)
    assert over_seeds(AtBest(best, (best,) * 40)).has_interval()
    one_in_four = over_seeds(AtBest(best, (best,) * 30 + (far,) * 10))
    assert not one_in_four.has_interval() and "unread_at_likely_rates" in one_in_four.flags
    judged = judge("c", {"margin": [-1, 1], "expected": 0}, "g", one_in_four, [], 3, False)
    assert judged.outcome == "UNDECIDED" and judged.needed == REMEDIES["unread_at_likely_rates"]
