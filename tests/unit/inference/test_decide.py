"""The decision rule over intervals, looks and claims; planned sweeps; intervals over few seeds."""

import math

import numpy as np
import pytest
from scipy import stats

from analysis.inference.decide import (
    REMEDIES,
    Gate,
    GateCode,
    holm,
    judge,
    look_level,
    outlook,
    p_value,
)
from analysis.inference.estimate import (
    SEEDS,
    Estimate,
    Part,
    PooledVariance,
    Spread,
    from_draws,
    from_sample,
    needed,
    pooled_variance,
)
from analysis.inference.meta import meta_regression, within_groups
from analysis.measures.at_best import AtBest, over_seeds


def draws(centre, sd, stream, n=4000):
    return centre + sd * np.random.default_rng(stream).standard_normal(n)


CLAIM = {"estimand": "lr_ratio", "expected": 10, "margin": [7.1, 14.1], "primary": True}


def judged(estimate, log=False, seeds=3, gates=(), level=0.95, name="c", **claim):
    return judge(name, {**CLAIM, **claim}, "g", estimate, gates, seeds, log, level)


@pytest.mark.parametrize(
    ("low", "value", "high", "better", "outcome", "is_better"),
    [
        (8, 10, 12, "higher", "SUPPORTED", False),
        (2, 3, 4, "higher", "REFUTED", False),
        (2, 3, 4, "lower", "REFUTED", True),
        (15, 20, 25, "higher", "REFUTED", True),
        (15, 20, 25, "lower", "REFUTED", False),
        (6, 10, 15, "higher", "UNDECIDED", False),
        (None, 10, None, "higher", "UNDECIDED", False),
    ],
)
def test_the_interval_is_compared_with_the_margin(low, value, high, better, outcome, is_better):
    verdict = judged(Estimate(value, low, high), log=True, better=better)
    assert verdict.outcome == outcome and verdict.is_better == is_better
    assert bool(verdict.needed) == (outcome == "UNDECIDED")
    gate = Gate(GateCode.TASK, "nearly solved")
    gated = judged(Estimate(value, low, high), log=True, gates=[gate])
    assert gated.outcome == "UNDECIDED" and gated.why == gate.sentence


def test_looks_are_judged_at_pococks_levels_and_p_is_the_level_at_which_it_is_decided():
    assert look_level(1) == pytest.approx(0.95) and look_level(3) == pytest.approx(0.9779)
    e = from_draws(np.exp(draws(math.log(10), 0.165, 0)), 9)
    once, thrice = (judged(e, log=True, level=look_level(n)) for n in (1, 3))
    assert once.outcome == "SUPPORTED" and thrice.outcome == "UNDECIDED" and "97.8%" in thrice.why
    values = np.exp(draws(math.log(10), 0.1, 1))
    p = p_value(values, 7.1, 14.1)
    low, high = np.quantile(values, [p / 2, 1 - p / 2])
    assert low >= 7.0 and high <= 14.2 and p < 0.01
    assert p_value(values, 9.9, 10.1) > 0.5 and p_value(values, 30, 40) <= 0.001


def test_holm_corrects_primary_claims_only():
    def verdict(name, sd, primary=True):
        estimate = from_draws(np.exp(draws(math.log(10), sd, 5)), 9)
        return judged(estimate, log=True, name=name, primary=primary)

    sure, close = verdict("sure", 0.05), verdict("close", 0.16)
    aside = verdict("aside", 0.16, primary=False)
    assert {v.outcome for v in (sure, close, aside)} == {"SUPPORTED"}
    # 0.05 / 3 is too strict for the two weak ones once three are judged together
    out = holm([close, sure, verdict("third", 0.165), aside])
    assert [v.outcome for v in out] == ["UNDECIDED", "SUPPORTED", "UNDECIDED", "SUPPORTED"]
    assert "Holm" in out[0].why
    assert [v.outcome for v in holm([close])] == ["SUPPORTED"]


def test_a_run_without_a_value_decides_nothing_and_makes_no_other_claim_easier():
    unknown = judged(from_sample([math.nan, -5.0, -5.1]), margin=[-10, 0], name="unknown")
    assert unknown.outcome == "UNDECIDED" and unknown.why == "no interval" and unknown.p is None
    one_sided = stats.norm.ppf((np.arange(4000) + 0.5) / 4000) - stats.norm.ppf(1 - 0.03 / 2)
    weak = judged(from_draws(one_sided, 5), margin=[-10, 0], name="weak")
    assert weak.outcome == "SUPPORTED" and weak.p == pytest.approx(0.03)
    assert [v.outcome for v in holm([unknown, weak])] == ["UNDECIDED", "UNDECIDED"]
    # nor where likely rates say nothing
    best, far = {s: 0.1 * s for s in range(3)}, dict.fromkeys(range(3), -math.inf)
    assert over_seeds(AtBest(best, (best,) * 40)).has_interval()
    one_in_four = over_seeds(AtBest(best, (best,) * 30 + (far,) * 10))
    assert not one_in_four.has_interval() and "unread_at_likely_rates" in one_in_four.flags
    verdict = judged(one_in_four, margin=[-1, 1])
    assert verdict.outcome == "UNDECIDED" and verdict.needed == REMEDIES["unread_at_likely_rates"]


def supported(n, sd, margin, level):
    """Share of planted samples of n seeds about 0 whose Student's interval lies in the margin."""
    x = sd * np.random.default_rng(n).standard_normal((8000, n))
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


@pytest.mark.parametrize(
    ("expected", "margin", "sd", "planned", "says"),
    [
        (-0.01, [-100, 0], 0.0038, 6, "-0.01 +- 0.004, margin [.., 0]: can decide"),
        (-0.01, [-100, 0], 0.0114, 6, "cannot decide: needs 13 seeds (planned 6)"),
        (0, [-0.1, 0.1], 0.01, 1, "without an interval, margin [-0.1, 0.1]: cannot decide"),
        (0, [-0.1, 0.1], 2.0, 6, "cannot decide: needs more than 64 seeds"),
        (0, [-0.1, 0.1], None, 6, "not known"),
    ],
)
def test_what_the_plan_says(expected, margin, sd, planned, says):
    found = outlook("c", expected, margin, sd, planned)
    assert says in found.line()
    assert found.warns == ("cannot" in says) == found.line().startswith("  warning, claim c")
    known = outlook("c", expected, margin, sd, planned, underpowered=True)
    assert not known.warns and "warning" not in known.line()
    assert ("says" in known.line()) == (sd is not None)


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
        *((own, 0.0) for own in ((1,) * 8, (1, 3), (1, 5), (1, 1, 4), (1, 1, 1, 1, 4))),
        *(((1,) * 5, 0.8), ((1,) * 5, 0.95), ((1, 2, 2, 3, 4), 0.8)),
    ],
)
def test_intervals_over_three_seeds_cover_and_are_at_least_students(spreads, shared):
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


@pytest.mark.parametrize("rounds", [1, 3, 5])
def test_the_wider_interval_is_picked_at_the_level_that_judges(rounds):
    """0.45 of the pooled spread: Student's three seeds are narrower at 95% and wider from 97.8% on."""
    level, pooled = look_level(rounds), PooledVariance(1.0, 10)
    own = from_sample(0.45 * np.array([-1.0, 0.0, 1.0]), pooled=pooled)
    e = judged(own, margin=[-9, 9], level=level).estimate
    both = [(0.45, 2), (1.0, 10)]
    widest = max(sd / math.sqrt(3) * stats.t.ppf(0.5 + level / 2, df) for sd, df in both)
    assert e.high == pytest.approx(widest, rel=2e-3) and e.low == pytest.approx(-widest, rel=2e-3)


def test_seeds_that_are_needed_narrow_the_interval_and_not_an_error_that_all_share():
    """Three seeds' t is 5.7: it narrows faster than 1/sqrt(n), which asked for 23 and not 9."""
    three = from_sample(np.exp(math.log(0.821) + 0.0766 * np.linspace(-1, 1, 3)), log=True)
    verdict = judged(three, log=True, level=0.9706, expected=1, margin=[0.9, 1.11])
    assert verdict.needed == "about 9 seeds at each optimum (now 3)" and verdict.missing == 6
    found = {}
    for shared in (0.0, 0.03, 0.06):
        spread = Spread(3, parts=(Part(0.05, 2),), shared=shared)
        half, _, _ = spread.at(3, 0.95)
        found[shared] = needed(spread, 0.1, (0.1 - half, 0.1 + half), (-9, 0), 0.95)
    assert found[0.0] < found[0.03] and found[0.06] is None
    spread = from_sample([1.0, 1.01, 0.99], pooled=PooledVariance(0.01, 8)).spread
    half, error, df = spread.at(6, 0.95)
    assert df == 20 and half == pytest.approx(2.086 * error, rel=1e-3)  # each sample adds to it
    e = from_sample([0.08, 0.1, 0.12], shifts=np.linspace(-0.1, 0.1, 50))
    assert "learning rates around the best ones" in judged(e, margin=[-9, 0.05]).needed


def test_what_is_counted_are_the_units_of_the_interval():
    trace = within_groups([[(0, 0.1), (1, 0.9), (2, 0.5)]] * 4, "layer sets")
    bases = meta_regression(np.array([0.1, 0.4, 0.2]), np.full(3, 0.01), np.ones((3, 1))).term(0)
    fit = Estimate(1.0, 0.85, 1.15, 40)  # of a fit: 40 runs, 3 seeds at the optimum
    for e, margin, unit in (
        (trace, [-1, 0.4], "layer sets"),
        (bases, [-9, 0.2], "bases"),
        (fit, [0.9, 1.11], f"{SEEDS} (now 3)"),
    ):
        verdict = judged(e, expected=1, margin=margin)
        assert verdict.outcome == "UNDECIDED" and unit in verdict.needed
    # A partial correlation counts the means that were subtracted: twelve pairs of four groups,
    # correlated within them. With n - 3 they held it in 90 to 92%.
    rng, held = np.random.default_rng(1), 0
    for _ in range(600):
        pairs = rng.multivariate_normal([0, 0], [[1, 0.8], [0.8, 1]], (4, 3))
        e = within_groups(pairs + rng.standard_normal((4, 1, 2)), "pairs")
        held += e.low <= 0.786 <= e.high  # Spearman's correlation of the centred pairs
    assert 0.935 < held / 600 < 0.99
    assert within_groups([[(0, 0), (1, 1)]] * 2, "pairs").value is None  # no degree of freedom
