"""The decision rule over intervals, looks and claims, and whether a planned sweep can decide."""

import math

import numpy as np
import pytest
from scipy import stats

from analysis.inference.decide import holm, judge, look_level, p_value
from analysis.inference.design import outlook
from analysis.inference.estimate import Estimate, from_draws
from analysis.inference.gates import REMEDIES, Gate, GateCode
from analysis.inference.seeds import from_sample
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


CASES = 8000


def supported(n, sd, margin, level):
    """Share of planted samples of n seeds about 0 whose Student's interval lies in the margin."""
    x = sd * np.random.default_rng(n).standard_normal((CASES, n))
    half = stats.t.ppf(0.5 + level / 2, n - 1) * x.std(1, ddof=1) / math.sqrt(n)
    return float(((margin[0] <= x.mean(1) - half) & (x.mean(1) + half <= margin[1])).mean())


@pytest.mark.parametrize("rounds", [1, 3, 5])
@pytest.mark.parametrize("margin", [(-1, 1), (-1000, 1)])
@pytest.mark.parametrize("sd", [0.25, 0.4, 0.7, 1.0, 1.5])
def test_the_seeds_that_are_named_decide_in_four_cases_of_five(sd, margin, rounds):
    """The promise is 80% at the smallest number of seeds; with few seeds one more can be too many.
    The approximation in `spread.needed` costs up to 5 points at four and five seeds."""
    found = outlook("c", 0, margin, sd, 6, rounds=rounds)
    share = [supported(n, sd, margin, found.level) for n in (found.needed, found.needed - 1)]
    assert share[0] > 0.74 and share[1] < 0.82
    if found.needed >= 8:
        assert 0.77 < share[0] < 0.88
    assert found.can_decide == (found.needed <= 6)


def test_the_interval_to_expect_is_the_one_that_the_seeds_give():
    """Also for a ratio, whose distances are of logarithms, and at the level of one of three looks."""
    x = np.exp(math.log(10) + 0.1 * stats.norm.ppf((np.arange(6) + 0.5) / 6))
    sd = float(np.std(np.log(x), ddof=1))
    found = outlook("ratio", 10, [7.1, 14.1], sd, 6, rounds=3, log=True)
    e = from_sample(list(x), log=True)
    e = from_draws(e.draws, 6, found.level)
    assert found.half_width == pytest.approx(math.log(e.high / e.low) / 2, rel=0.01)
    assert found.room == pytest.approx(math.log(10 / 7.1))
    low, high = (f"{v:.3g}" for v in (10 * math.exp(s * found.half_width) for s in (-1, 1)))
    assert f"10 [{low}, {high}], margin [7.1, 14.1]: can decide" in found.line()
    open_ends = outlook("c", 0.01, [-1000, 100000], None, 3)
    assert open_ends.plain()["room"] is None
    refuted = outlook("c", 0.01, [0.02, 1], 1e-3, 3)
    assert refuted.can_decide and refuted.room == pytest.approx(-0.01)


@pytest.mark.parametrize(
    ("expected", "margin", "sd", "planned", "says"),
    [
        (-0.01, [-100, 0], 0.0038, 6, "-0.01 +- 0.004, margin [.., 0]: can decide"),
        (-0.01, [-100, 0], 0.0114, 6, "cannot decide: needs 13 seeds (planned 6)"),
        (0.02, [-0.1, 0.05], 0.0, 1, "0.02 +- 0, margin [-0.1, 0.05]: can decide"),
        (1, [1, 1000], 0.01, 6, "margin [1, ..]: cannot decide"),
        (0, [-0.1, 0.1], 0.01, 1, "0 without an interval, margin [-0.1, 0.1]: cannot decide"),
        (0, [-0.1, 0.1], 2.0, 6, "cannot decide: needs more than 64 seeds (planned 6)"),
        (0, [-0.1, 0.1], None, 6, "claim c: not known: no standard deviation stated"),
        (0, [-0.1, 0.1], 0.27, 90, "can decide"),
    ],
)
def test_what_the_plan_says(expected, margin, sd, planned, says):
    found = outlook("c", expected, margin, sd, planned)
    assert says in found.line()
    assert found.warns == ("cannot" in says) == found.line().startswith("  warning, claim c")
    known = outlook("c", expected, margin, sd, planned, underpowered=True)
    assert not known.warns and "warning" not in known.line()
    assert ("says" in known.line()) == (sd is not None)
