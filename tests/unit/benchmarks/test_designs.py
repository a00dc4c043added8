"""Simulated designs: what they run, what their intervals hold, and how many runs they stand for."""

import math

import numpy as np
import pytest

from analysis.inference.decide import judge
from analysis.inference.estimate import Estimate, from_draws
from benchmarks.calibration.designs import designs, plain_seeds, supported
from benchmarks.calibration.generators import Design, plant
from benchmarks.calibration.run import CLAIM
from lorasweep.sweep.replicates import lrs_around_optimum


@pytest.mark.parametrize("around", [1, 2, 3, 4])
def test_fresh_seeds_get_the_learning_rates_that_a_sweep_gives_them(around):
    design = Design(7, 2.0, 1, fresh=2, noise=1e-9, fresh_rates=around)
    for _ in range(5):
        curves, _ = plant("linex", design, np.random.default_rng(around))
        for c in curves:
            assert len(c.x) == design.runs == 7 + 2 * around
            loss = dict(zip(c.x[c.seed == 0], c.y[c.seed == 0]))
            for seed in (1, 2):
                assert list(c.x[c.seed == seed]) == lrs_around_optimum(loss, around)


def test_paired_seeds_shift_all_curves_alike():
    design = Design(7, 2.0, 40, noise=1e-3, curves=2)
    for paired in (True, False):
        curves, _ = plant("linex", design, np.random.default_rng(5), paired=paired)
        shifts = [[c.y[c.seed == s].mean() for s in range(40)] for c in curves]
        assert (np.corrcoef(shifts)[0, 1] > 0.9) == paired


def test_intervals_of_a_small_case_hold_the_planted_truth():
    plain, staged = (
        designs("linex", d, 2.0, 12)
        for d in (
            Design(7, 2.0, 3, noise=2e-3, curves=2),
            Design(5, 2.0, 1, 5, noise=2e-3, curves=2),
        )
    )
    for row in (plain, staged):
        assert row["ratio_answered"] == 1 and row["ratio_coverage"] >= 11 / 12
        assert row["gap_coverage"] >= 22 / 24 and row["false_supported"] == 0
    assert (plain["runs"], staged["runs"]) == (21, 20)
    # The gap in loss gains from seeds at the best rate; its place does not.
    assert staged["gap_half_width"] < plain["gap_half_width"] < 0.02
    assert plain["ratio_half_width"] < staged["ratio_half_width"] < 0.3


def test_a_scaled_ratio_is_supported_as_the_decision_rule_has_it():
    rng = np.random.default_rng(3)
    for centre, scale in ((1.1, 9.0), (0.9, 9.0), (1.0, 7.1), (1.2, 2.0), (1.0, 13.0)):
        draws = centre * np.exp(0.1 * rng.standard_normal(4000))
        verdict = judge("ratio", CLAIM, "g", from_draws(draws * scale, 9), [], 5, True)
        assert supported(from_draws(draws, 9), scale) == (verdict.outcome == "SUPPORTED")
    assert not supported(Estimate(None), 10.0)


def test_the_plain_grid_with_the_same_interval_is_found_between_those_tried():
    plain = [
        [{"seeds": s, "rates": 7, "ratio_half_width": w}]
        for s, w in ((2, 0.3), (3, 0.2), (6, 0.1), (12, 0.1))
    ]
    found = {w: plain_seeds(w, plain, "ratio") for w in (0.5, 0.3, 0.29, 0.2, 0.141, 0.1, 0.09)}
    assert [found[w] for w in (0.5, 0.3, 0.2)] == pytest.approx([2, 2, 3])
    assert found[0.29] == pytest.approx(2 * 1.5 ** (math.log(30 / 29) / math.log(1.5)))
    assert found[0.141] == pytest.approx(3 * 2 ** (math.log(0.2 / 0.141) / math.log(2)))
    assert (found[0.1], found[0.09]) == (pytest.approx(6), math.inf)
    assert math.isnan(plain_seeds(math.nan, plain, "ratio"))
