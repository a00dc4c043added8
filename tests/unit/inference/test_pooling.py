"""Several optima together, against published numbers and planted ones; the decision rule over
rounds and claims."""

import math

import numpy as np
import pytest

from analysis.inference.decide import holm, judge, look_level, p_value
from analysis.inference.estimate import Estimate, from_draws
from analysis.inference.meta import drift, meta_regression, random_effects
from analysis.inference.seeds import from_sample, pooled_variance
from analysis.measures.at_best import AtBest, over_seeds
from analysis.measures.efficiency import rho, steps_to_reach
from analysis.measures.lr_law import by_loss, by_optima, published, regret
from analysis.measures.ratio_law import Ratio, ratio_law
from analysis.optimum.fit import fit_all
from analysis.optimum.valley import linex
from analysis.runs.lr_curves import LrCurve

# BCG vaccine against tuberculosis, 13 trials (Colditz et al. 1994): cases and non-cases, vaccinated
# and not
BCG = np.array(
    [
        (4, 119, 11, 128),
        (6, 300, 29, 274),
        (3, 228, 11, 209),
        (62, 13536, 248, 12619),
        (33, 5036, 47, 5761),
        (180, 1361, 372, 1079),
        (8, 2537, 10, 619),
        (505, 87886, 499, 87892),
        (29, 7470, 45, 7232),
        (17, 1699, 65, 1600),
        (186, 50448, 141, 27197),
        (5, 2493, 3, 2338),
        (27, 16886, 29, 17825),
    ],
    float,
)


def test_random_effects_are_those_published_for_the_bcg_trials():
    a, b, c, d = BCG.T
    y = np.log(a / (a + b)) - np.log(c / (c + d))
    v = 1 / a - 1 / (a + b) + 1 / c - 1 / (c + d)
    e = random_effects(y, np.sqrt(v))
    assert e.tau**2 == pytest.approx(
        0.318, abs=1e-3
    )  # Paule-Mandel, as metafor's vignette gives it
    assert e.mean == pytest.approx(-0.715, abs=1e-3)
    assert e.p_equal < 1e-20 and e.low_next < e.low < e.high < e.high_next and e.i2 > 0.9


def test_equal_groups_have_no_spread():
    e = random_effects([0.5, 0.5, 0.5], [0.1, 0.2, 0.1])
    assert e.tau == 0 and e.mean == pytest.approx(0.5) and e.p_equal == pytest.approx(1)


def draws(centre, sd, stream, n=4000):
    return centre + sd * np.random.default_rng(stream).standard_normal(n)


def test_a_planted_drift_is_found_and_a_flat_one_is_not():
    ranks = [4, 8, 16, 32]
    steep = drift(ranks, [draws(0.3 * k, 0.05, k) for k in range(4)], 40)
    assert (
        steep.slope.low < 0.3 < steep.slope.high and steep.p_slope < 0.01 and steep.p_equal < 0.01
    )
    flat = drift(ranks, [draws(0.0, 0.05, k) for k in range(4)], 40)
    assert flat.slope.low < 0 < flat.slope.high and flat.p_slope > 0.05 and flat.p_equal > 0.05
    assert drift([4], [draws(0, 1, 0)], 1).slope.value is None
    assert drift([4, 4], [draws(0, 1, 0), draws(0, 1, 1)], 1).slope.value is None


def test_false_positives_of_the_drift_test_are_as_many_as_promised():
    rng = np.random.default_rng(3)
    p = [
        drift(
            [4, 8, 16], [rng.normal(0, 0.1) + 0.1 * rng.standard_normal(1000) for _ in range(3)], 3
        )
        for _ in range(300)
    ]
    assert np.mean([d.p_equal < 0.05 for d in p]) <= 0.09
    assert np.mean([not d.slope.low <= 0 <= d.slope.high for d in p]) <= 0.09


# ---------------------------------------------------------------- verdicts


CLAIM = {"estimand": "lr_ratio", "expected": 10, "margin": [7.1, 14.1], "primary": True}


def test_looks_are_judged_at_pococks_levels():
    assert look_level(1) == pytest.approx(0.95) and look_level(3) == pytest.approx(0.9779)
    ln = draws(math.log(10), 0.165, 0)
    once = judge("r", CLAIM, "g", from_draws(np.exp(ln), 9), [], 5, True, look_level(1))
    thrice = judge("r", CLAIM, "g", from_draws(np.exp(ln), 9), [], 5, True, look_level(3))
    assert once.outcome == "SUPPORTED" and thrice.outcome == "UNDECIDED" and "97.8%" in thrice.why
    with pytest.raises(ValueError, match="at most 5"):
        look_level(6)


def test_three_looks_at_the_margins_edge_err_in_five_percent():
    """Truth outside the margin at its edge, error shrinking from look to look: support in any of
    them stays rare."""
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(2000):
        sums, n = 0.0, 0
        for _ in range(3):
            sums, n = sums + rng.normal(math.log(14.1), 0.15), n + 1
            mean, se = sums / n, 0.15 / math.sqrt(n)
            half = se * 2.2889  # normal quantile of Pocock's level
            if mean + half <= math.log(14.1) and mean - half >= math.log(7.1):
                wrong += 1
                break
    assert wrong / 2000 <= 0.032  # one side of 5%


def test_the_p_value_is_the_level_at_which_it_is_decided():
    values = np.exp(draws(math.log(10), 0.1, 1))
    p = p_value(values, 7.1, 14.1)
    low, high = np.quantile(values, [p / 2, 1 - p / 2])
    assert low >= 7.0 and high <= 14.2 and p < 0.01
    assert p_value(values, 9.9, 10.1) > 0.5
    assert p_value(values, 30, 40) <= 0.001


def test_holm_corrects_primary_claims_only():
    def verdict(name, sd, primary=True):
        claim = {**CLAIM, "primary": primary}
        return judge(
            name, claim, "g", from_draws(np.exp(draws(math.log(10), sd, 5)), 9), [], 5, True
        )

    sure, close, aside = (
        verdict("sure", 0.05),
        verdict("close", 0.16),
        verdict("aside", 0.16, primary=False),
    )
    assert {v.outcome for v in (sure, close, aside)} == {"SUPPORTED"}
    # 0.05 / 3 is too strict for the two weak ones once three are judged together
    out = holm([close, sure, verdict("third", 0.165), aside])
    assert [v.outcome for v in out] == ["UNDECIDED", "SUPPORTED", "UNDECIDED", "SUPPORTED"]
    assert "Holm" in out[0].why
    assert [v.outcome for v in holm([close])] == ["SUPPORTED"]


# ---------------------------------------------------------------- rho


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


# ---------------------------------------------------------------- seeds


def test_the_usual_variance_is_that_of_most_samples():
    rng = np.random.default_rng(5)
    samples = [rng.normal(0, 0.1, n) for n in (2, 3, 6) for _ in range(700)]
    assert pooled_variance(samples).var == pytest.approx(0.01, rel=0.05) and pooled_variance(
        samples
    ).df == 700 * (1 + 2 + 5)
    assert pooled_variance([*samples, *(rng.normal(0, 10, 3) for _ in range(100))]).var < 0.012
    assert pooled_variance([[1.0, 2.0]]) is None


@pytest.mark.parametrize(
    ("spreads", "shared"),
    [
        ((1,) * 8, 0.0),
        ((1, 3), 0.0),
        ((1, 5), 0.0),
        ((1, 1, 4), 0.0),
        ((1, 1, 1, 1, 4), 0.0),
        ((1,) * 5, 0.8),
        ((1,) * 5, 0.95),
        ((1, 2, 2, 3, 4), 0.8),
    ],
)
def test_intervals_over_three_seeds_cover_alike_or_not_and_are_never_narrower_than_students(
    spreads, shared
):
    """Samples of unlike spread, and correlated by seed: the noisiest one's 95% interval holds its
    mean in 95% as well."""
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


def test_where_likely_rates_say_nothing_there_is_no_interval():
    best, far = {s: 0.1 * s for s in range(3)}, dict.fromkeys(range(3), -math.inf)
    assert over_seeds(AtBest(best, (best,) * 40)).has_interval()
    one_in_four = over_seeds(AtBest(best, (best,) * 30 + (far,) * 10))
    assert not one_in_four.has_interval() and "unread_at_likely_rates" in one_in_four.flags
    told = judge("c", {"margin": [-1, 1], "expected": 0}, "g", one_in_four, [], 3, False)
    assert told.outcome == "UNDECIDED" and told.needed == "more learning rates around the best one"


# ---------------------------------------------------------------- laws


def planted_curves(p, at=5e-4, widths=(512, 1024, 2048, 4096, 8192), noise=1e-4):
    rng = np.random.default_rng(2)
    curves, hidden = [], {}
    for h in widths:
        model = f"org/Llama-{h}"
        hidden[model] = float(h)
        best = math.log(at * (2000 / h) ** p)
        for rank in (8, 16):
            x = best + rng.uniform(-0.3, 0.3) + (np.arange(7) - 3) * math.log(2)
            y = 2 + 0.1 * linex(x - best, 0.5) + noise * rng.standard_normal(7)
            key = {
                "model": model,
                "dataset": "d",
                "method": "lora",
                "rank": float(rank),
                "alpha": 32.0,
            }
            zero = np.zeros(7, int)
            curves.append(LrCurve(key, x, y, zero, zero, np.ones(7, bool), math.nan, math.nan))
    return curves, hidden


@pytest.mark.parametrize("p", [0.0, 0.8])
def test_both_ways_find_a_planted_law(p):
    curves, hidden = planted_curves(p)
    (loss,) = by_loss(curves, hidden)
    (fit,) = by_optima(fit_all(curves), hidden)
    for law, off in ((loss, 0.15), (fit, 0.05)):
        assert law.family == "llama" and law.n_models == 5
        assert law.p.value == pytest.approx(p, abs=off) and law.p.low <= p <= law.p.high
        assert law.at_2000.value == pytest.approx(5e-4, rel=0.15)
    assert loss.regret < 0.5


def test_the_published_formula_gives_its_published_rates():
    key = {"model": "meta-llama/Llama-3.1-8B", "dataset": "d", "method": "lora", "rank": 16.0}
    none = np.zeros(0)
    c = LrCurve(key, none, none, none, none, none.astype(bool), math.nan, math.nan)
    assert published(c, 4096) == pytest.approx(2.86e-4, rel=2e-3)
    assert published(
        LrCurve({**key, "method": "fullft"}, *[none] * 4, none.astype(bool), 0, 0), 2048
    ) == pytest.approx(4.91e-5, rel=2e-3)
    assert published(
        LrCurve({**key, "model": "Qwen/Qwen3-8B"}, *[none] * 4, none.astype(bool), 0, 0), 4096
    ) == pytest.approx(4.73e-4, rel=2e-3)
    assert (
        published(
            LrCurve({**key, "model": "google/gemma"}, *[none] * 4, none.astype(bool), 0, 0), 4096
        )
        is None
    )


def test_regret_outside_the_rates_tried_is_no_number():
    (c, *_), _ = planted_curves(0.0)
    assert regret(c, 5e-4).percent == pytest.approx(0, abs=0.3)
    assert regret(c, 1.0).percent is None


def test_a_law_over_one_hidden_size_has_no_exponent():
    curves, hidden = planted_curves(0.5, widths=(1024,))
    (law,) = by_loss(curves, hidden)
    assert law.p.value is None and "one hidden size" in law.flags
    (fit,) = by_optima(fit_all(curves), hidden)
    assert fit.p.value is None


@pytest.mark.parametrize(
    ("p", "q", "name"),
    [
        (0.0, 0.0, "constant 10 (the study)"),
        (0.0, -0.7, "constant 10 (the study)"),
        (0.5, 0.0, "sqrt(hidden) (muA, arXiv 2602.06204)"),
        (1.0, -1.0, "sqrt(3) hidden/alpha (equal first step under Adam)"),
    ],
)
def test_the_ratios_law_tells_rivals_apart(p, q, name):
    rng = np.random.default_rng(4)
    bases = [(f"{h}-{s}", h, rng.normal(0, 0.03)) for h in (64, 128, 256) for s in range(3)]
    ratios = [
        Ratio(
            b,
            h,
            a,
            1.0 + p * math.log(h / 1000) + q * math.log(a / 32) + u + rng.normal(0, 0.05),
            0.05,
        )
        for b, h, u in bases
        for a in (8, 32, 128)
    ]
    law = ratio_law(ratios)
    assert law.bases == law.bases_q == 9
    assert law.p.low < p < law.p.high and law.q.low < q < law.q.high
    assert law.rivals[name] > 0.05
    others = {
        k: v for k, v in law.rivals.items() if k != name and not (p == 1.0 and "2 alpha" in k)
    }
    assert all(v < 0.05 for v in others.values())


def test_several_alphas_of_one_base_are_no_several_witnesses_of_its_width():
    """Bases that differ by 0.3 beyond their width: 95% intervals of p hold the truth, however many
    alphas each has."""
    rng, held = np.random.default_rng(9), 0
    for _ in range(300):
        bases = [(f"{h}-{s}", h, rng.normal(0, 0.3)) for h in (64, 128, 256) for s in range(2)]
        p = ratio_law(
            [
                Ratio(b, h, a, u - math.log(a) + rng.normal(0, 0.02), 0.02)
                for b, h, u in bases
                for a in (8, 32, 128)
            ]
        ).p
        held += p.low <= 0 <= p.high
    assert 0.92 < held / 300 < 0.98


def test_several_data_sets_of_one_base_are_one_row():
    rng, held = np.random.default_rng(9), 0
    for _ in range(300):
        bases = [(f"{h}-{s}", h, rng.normal(0, 0.3)) for h in (64, 128, 256) for s in range(2)]
        law = ratio_law(
            [Ratio(b, h, 32, u + rng.normal(0, 0.02), 0.02) for b, h, u in bases for _ in range(5)]
        )
        held += law.p.low <= 0 <= law.p.high
    assert law.bases == 6 and held / 300 > 0.9


def test_a_factor_that_does_not_vary_has_no_exponent():
    law = ratio_law([Ratio(str(h), h, 32, y, 0.05) for h, y in ((64, 1.0), (128, 1.1), (256, 1.2))])
    assert law.q.value is None and "alpha does not vary" in law.flags and law.p.value is not None
    one = ratio_law([Ratio("a", 64, 32, 1.0, 0.05), Ratio("b", 64, 32, 1.1, 0.05)])
    assert (
        one.p.value is None
        and one.flags[0] == "hidden size does not vary"
        and all(v is None for v in one.rivals.values())
    )


def test_meta_regression_without_spread_is_weighted_least_squares():
    x = np.array([0.0, 1, 2, 3])
    fit = meta_regression(1 + 2 * x, np.array([0.1, 0.2, 0.1, 0.3]), np.stack([np.ones(4), x], 1))
    assert fit.beta == pytest.approx([1, 2]) and fit.tau == 0


def test_estimates_are_plain_without_their_draws():
    e = from_draws(draws(0, 1, 0), 5)
    assert "draws" not in e.plain() and Estimate(**{**e.plain(), "flags": ()}).value == e.value
