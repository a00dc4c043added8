"""Planted ratios through sweep file, grid, store, second stage, table, fit and verdict: they come
back as what they are, and each verdict can be reached."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from analysis.__main__ import main
from analysis.optimum.valley import linex
from tests.planted import FULL_BEST, START, Valley

pytestmark = pytest.mark.slow  # fits hundreds of curves


@pytest.mark.parametrize(
    ("ratio", "primary", "order"),
    [
        (1, "REFUTED", "REFUTED"),
        (3, "REFUTED", "REFUTED"),
        (6, None, None),
        (20, "REFUTED", None),
    ],
)
def test_planted_ratio_comes_back(ask_ratio, ratio, primary, order):
    out, verdicts = ask_ratio(Valley(ratio))
    check_ratio(out, verdicts, ratio, primary, order)


def check_ratio(out, verdicts, ratio, primary, order):
    estimate = verdicts["ratio"]["estimate"]
    assert estimate["low"] <= ratio <= estimate["high"]
    assert abs(math.log(estimate["value"] / ratio)) < math.log(1.15)
    assert primary is None or verdicts["ratio"]["outcome"] == primary
    assert verdicts["ratio"]["outcome"] != "SUPPORTED" or 7.1 <= ratio <= 14.1
    assert order is None or verdicts["order"]["outcome"] == order
    assert all(c["low"] < c["best_lr"] < c["high"] for c in out["curves"])


def test_a_ratio_of_ten_is_supported_up_to_the_report_and_a_flipped_table_flips_it(
    ask_ratio, tmp_path
):
    out, verdicts = ask_ratio(Valley(10), report=True)
    check_ratio(out, verdicts, 10, "SUPPORTED", "SUPPORTED")
    (report,) = (tmp_path / "reports").glob("lr_ratio-smoke-*")
    assert "**SUPPORTED**" in (report / "report.md").read_text()
    table = pd.read_parquet(report / "table.parquet")
    table.loc[table["method"] == "lora", "lr"] /= 5
    table.to_csv(tmp_path / "flipped.csv", index=False)
    places = ("--reports-dir", tmp_path / "reports", "--out", tmp_path / "again")
    assert main(["lr_ratio", *map(str, places), "--table", f"{tmp_path}/flipped.csv"]) == 0
    text = (tmp_path / "again" / "report.md").read_text()
    primary = next(line for line in text.splitlines() if line.startswith("| ratio (primary)"))
    assert "**REFUTED**" in primary


DRIFT = "sweep.claims.order={says:no drift,estimand:lr_drift_per_doubling,expected:0,margin:[-0.099,0.099]}"
"""The claim of sweep `rank` in the place of another, asked of runs of 3 ranks."""


def test_no_drift_is_supported(ask_ratio):
    _, flat = ask_ratio(Valley(3, noise=2e-4, steep=0.3), DRIFT)
    assert flat["order"]["outcome"] == "SUPPORTED"


def test_a_planted_drift_is_refuted(ask_ratio):
    _, steep = ask_ratio(Valley(3, noise=2e-4, steep=0.3, drift=0.5), DRIFT)
    assert steep["order"]["outcome"] == "REFUTED"
    assert steep["order"]["estimate"]["value"] == pytest.approx(0.5 * math.log(2), abs=0.1)


def test_a_cliff_just_right_of_the_best_rate_gives_a_bound_and_no_verdict(ask_ratio):
    """The loss falls until the run breaks down: where the optimum would lie is not known."""
    out, verdicts = ask_ratio(Valley(3, cliff=0.9))
    lora = [c for c in out["curves"] if c["method"] == "lora"]
    assert all(c["best_lr"] is None and "bounded_by_divergence" in c["flags"] for c in lora)
    assert all(c["low"] < FULL_BEST * 3 < c["high"] * 1.5 for c in lora)
    assert verdicts["ratio"]["outcome"] == "UNDECIDED" and verdicts["ratio"]["needed"]


def test_a_cliff_beyond_the_valley_leaves_the_optimum(ask_ratio):
    _, verdicts = ask_ratio(Valley(10, cliff=3.0))
    assert verdicts["ratio"]["estimate"]["low"] <= 10 <= verdicts["ratio"]["estimate"]["high"]


def test_an_optimum_off_the_grid_is_a_bound_answered_by_rates_beyond_it(
    ask_ratio, tmp_path, capsys
):
    grid = "sweep.arms.fullft.lr=[1e-5,2e-5,4e-5,8e-5,1.6e-4]"
    out, verdicts = ask_ratio(Valley(3), grid, report=True)
    full = next(c for c in out["curves"] if c["method"] == "fullft")
    assert full["best_lr"] is None and "at_edge" in full["flags"] and full["low"] is not None
    assert verdicts["ratio"]["outcome"] == "UNDECIDED" and verdicts["ratio"]["needed"]
    assert main(["suggest", "lr_ratio", "--reports-dir", str(tmp_path / "reports"), "--json"]) == 0
    wanted = [s for s in json.loads(capsys.readouterr().out) if s["method"] == "fullft"]
    assert [s["lr"] for s in wanted] == pytest.approx([3.2e-4, 6.4e-4])
    assert "beyond the edge" in wanted[0]["why"]


def test_one_seed_leaves_it_undecided_with_the_seeds_still_needed(ask_ratio):
    _, few = ask_ratio(Valley(10), seeds=())
    assert few["ratio"]["outcome"] == "UNDECIDED" and "seed" in few["ratio"]["why"]
    assert "seeds" in few["ratio"]["needed"]


def test_noise_leaves_it_undecided(ask_ratio):
    _, noisy = ask_ratio(Valley(10, noise=0.04))
    assert noisy["ratio"]["outcome"] == "UNDECIDED"


ALL_RATES = "sweep.replicate.n_lrs=7"


@pytest.mark.parametrize(("ratio", "outcome"), [(3, "REFUTED"), (10, "SUPPORTED")])
def test_what_ten_times_the_full_rate_costs(ask_ratio, ratio, outcome):
    """At a planted ratio of 3 that rate is 3.3 times LoRA's best one."""
    valley = Valley(ratio)
    _, verdicts = ask_ratio(valley, ALL_RATES)
    lost = 0.16 * float(linex(np.array(math.log(10 / ratio)), valley.steep))
    gain = START - 2.0
    found = verdicts["ten_times"]
    assert found["outcome"] == outcome, found["why"]
    assert found["estimate"]["low"] <= 100 * lost / gain <= found["estimate"]["high"]


def test_ten_times_the_full_rate_at_rates_that_one_seed_ran_is_not_judged(ask_ratio):
    _, verdicts = ask_ratio(Valley(3))
    assert verdicts["ten_times"]["outcome"] == "UNDECIDED"


@pytest.mark.parametrize(("behind", "outcome"), [(0.0, "SUPPORTED"), (0.1, "REFUTED")])
def test_what_the_highest_rank_gives_up(ask_ratio, behind, outcome):
    """Behind by a tenth of the gain, where a twentieth is allowed; rank 4 does not count."""
    valley = Valley(3)
    alone = valley.nll

    def nll(spec):
        return alone(spec) + {4: 0.3, 16: behind}.get(getattr(spec.method, "rank", 0), 0) * (
            START - 2.0
        )

    valley.nll = nll
    _, verdicts = ask_ratio(valley)
    assert verdicts["no_regret"]["outcome"] == outcome, verdicts["no_regret"]["why"]
    value = verdicts["no_regret"]["estimate"]["value"]
    assert value == pytest.approx((behind - 0.05) * (START - 2.0), abs=2e-3)
