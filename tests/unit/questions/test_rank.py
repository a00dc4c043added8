"""`rank` on planted runs: which ranks keep up, from where on they do not, and at which cost."""

import math

import pytest

from tests.planted import FULL, GRIDS, LORA, World

pytestmark = pytest.mark.slow  # fits hundreds of curves


@pytest.mark.parametrize(("top", "outcome"), [(1.0, "SUPPORTED"), (0.5, "REFUTED")])
def test_rank_departures_and_parity(ask, top, outcome):
    rho = {1: 0.1, 4: 0.3, 8: top}
    out, found = ask(
        "rank",
        World(lambda s: rho[s.method.rank]),
        *GRIDS,
        "sweep.arms.lora.rank=[1,4,8]",
        "sweep.axes.steps=384",
        "sweep.arms.common.lr=3.2e-3",
        report=outcome == "SUPPORTED",
    )
    assert found["parity"]["outcome"] == outcome, found["parity"]["why"]
    assert found["parity"]["estimate"]["value"] == pytest.approx(top, rel=0.05)
    assert (
        found["start_popular"]["outcome"] == "REFUTED"
    )  # rank 1 is apart from the first update on
    left = out["departures"]
    assert max(left["1"]) <= min(left["4"])
    assert all(v is None for v in left["8"]) == (top == 1.0)


def test_what_a_run_is_at_a_best_rate_that_was_not_tried_is_interpolated(ask):
    between = {
        "fullft": 2.1e-3,
        "lora": 4.4e-3,
    }  # the tried rates are a factor 2 apart: 1.6e-3, 3.2e-3, 6.4e-3
    world = World(
        lambda s: {1: 0.2, 4: 0.8}[s.method.rank], best=lambda spec, step: between[spec.method.name]
    )
    _, found = ask("rank", world, *GRIDS, "sweep.axes.steps=384", "sweep.arms.common.lr=3.2e-3")
    assert found["parity"]["estimate"]["value"] == pytest.approx(0.8, rel=0.03)


def test_ranks_that_all_leave_at_once_have_no_order(ask):
    _, found = ask(
        "rank",
        World(lambda s: 0.05 * s.method.rank),
        *GRIDS,
        "sweep.axes.steps=384",
        "sweep.arms.common.lr=3.2e-3",
    )
    assert (
        found["order"]["outcome"] == "UNDECIDED"
        and "order is not resolved" in found["order"]["why"]
    )


AT = ("sweep.arms.lora.rank=[1,4,8]", "sweep.axes.steps=96", *GRIDS)
SEEDS = ("sweep.arms.common.seed=[0,1,2]",)
RULES = "+sweep.axes.generator_params=[{rule_shift:0.25,new_exceptions:0.0}]"


@pytest.mark.parametrize(("slope", "outcome"), [(0.2, "SUPPORTED"), (-0.2, "REFUTED")])
def test_a_higher_rank_that_learns_faster_or_slower_where_exceptions_are_new(ask, slope, outcome):
    _out, found = ask("rank", World(lambda s: 0.5 * s.method.rank ** (slope / math.log(2))), *AT)
    assert found["faster"]["outcome"] == outcome, found["faster"]["why"]
    assert found["faster"]["estimate"]["value"] == pytest.approx(slope, abs=0.03)
    assert found["alike"]["outcome"] == "UNDECIDED" and "no cell" in found["alike"]["why"]


@pytest.mark.parametrize(("slope", "outcome"), [(0.0, "SUPPORTED"), (0.2, "REFUTED")])
def test_the_rank_makes_no_difference_where_rules_alone_are_new(ask, slope, outcome):
    world = World(lambda s: 0.5 * s.method.rank ** (slope / math.log(2)))
    _, found = ask("rank", world, *AT, RULES)
    assert found["alike"]["outcome"] == outcome, found["alike"]["why"]
    assert found["alike"]["estimate"]["value"] == pytest.approx(slope, abs=0.03)
    assert found["faster"]["outcome"] == "UNDECIDED"


@pytest.mark.parametrize(("factor", "outcome"), [(2.0, "SUPPORTED"), (0.5, "REFUTED")])
def test_whether_rank_1_has_a_lower_best_rate_comes_back(ask, factor, outcome):
    def best(spec, step):
        if spec.method.name == "fullft":
            return FULL
        return LORA / factor if spec.method.rank == 1 else LORA

    _, found = ask("rank", World(lambda s: 0.5, best=best), *AT, RULES)
    assert found["rank_1_lower"]["outcome"] == outcome, found["rank_1_lower"]["why"]
    assert found["rank_1_lower"]["estimate"]["value"] == pytest.approx(factor, rel=0.1)
    # A line over ln(1 + updates) is nearly one over ln(updates), and ranks of one speed stay equal.
    assert found["straight"]["outcome"] == "SUPPORTED"
    assert found["straight"]["estimate"]["value"] == pytest.approx(1.1, abs=0.1)


def test_the_difference_of_two_ranks_grows_at_the_planted_slope(ask):
    """At one rate, rank 1 lies 0.02 nats further behind at every doubling."""
    world = World(lambda s: 1.0, best=lambda spec, step: 3.2e-3)
    same = world.loss

    def loss(spec, step):
        behind = spec.method.name == "lora" and spec.method.rank == 1
        return same(spec, step) + (0.02 * math.log2(step) if behind else 0.0)

    world.loss = loss
    _, found = ask("rank", world, *AT, "sweep.arms.common.lr=3.2e-3", *SEEDS)
    assert found["grows"]["outcome"] == "SUPPORTED", found["grows"]["why"]
    assert found["grows"]["estimate"]["value"] == pytest.approx(0.02, abs=1e-3)


def test_each_model_is_compared_with_full_fine_tuning_of_itself(ask):
    """As at the study's size, where one sweep asks two models on two data sets."""
    top = {"tiny64": 1.0, "tiny64-s1": 0.5}
    out, _ = ask(
        "rank",
        World(lambda s: {1: 0.1, 8: top[s.model.name]}[s.method.rank]),
        *GRIDS,
        "sweep.axes.model=[tiny64,tiny64-s1]",
        "sweep.arms.lora.rank=[1,8]",
        "sweep.axes.steps=384",
        "sweep.arms.common.lr=3.2e-3",
        report=True,
    )
    parity = {v["group"].split()[0]: v for v in out["verdicts"] if v["claim"] == "parity"}
    assert {m: v["outcome"] for m, v in parity.items()} == {
        "tiny64": "SUPPORTED",
        "tiny64-s1": "REFUTED",
    }
    for model, rho in top.items():
        assert parity[model]["estimate"]["value"] == pytest.approx(rho, rel=0.05)
    assert {name.split()[0] for name in out["tasks"]} == set(top)
