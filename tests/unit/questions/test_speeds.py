"""`rank` and `batch_size` on planted runs: which ranks keep up, and what LoRA loses per doubling of the batch."""

import dataclasses
import math

import pytest

from analysis.measures import speed
from analysis.measures.at_best import AtBest
from analysis.measures.batch_effect import prefixes_of
from lorasweep.methods.fullft import FullFT
from tests.planted import (
    FULL,
    GAIN,
    LORA,
    World,
    ask,
    batches,
    check,
    planted_table,
    rank_runs,
)

pytestmark = pytest.mark.slow  # fits dozens of curves


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """No test here is about the bootstrap's interval of the step at which ranks part."""
    monkeypatch.setattr(speed, "RESAMPLES", 200)


RULES = {"rule_shift": 0.25, "new_exceptions": 0.0}


@pytest.mark.parametrize(("top", "outcome"), [(1.0, "SUPPORTED"), (0.5, "REFUTED")])
def test_parity_and_the_steps_from_which_ranks_are_behind(top, outcome, tmp_path):
    rho = {1: 0.1, 4: 0.3, 8: top}
    world, folder = World(lambda s: rho[s.method.rank]), tmp_path if top == 1 else None
    out, found = ask("rank", world, rank_runs(steps=384), folder)
    check(found, parity=(outcome, pytest.approx(top, rel=0.05)))
    check(found, start_popular="REFUTED")  # rank 1 is apart at once
    left = out["departures"]
    assert max(left["1"]) <= min(left["4"])
    assert all(v is None for v in left["8"]) == (top == 1.0)


def test_a_draw_that_diverged_says_nothing_about_the_others():
    table = planted_table(World(lambda s: 0.3), rank_runs(steps=32))
    start = speed.start_of(table, 8)
    table.loc[table["init_seed"] == 1, "status"] = "diverged"
    fewer = speed.start_of(table, 8)
    assert fewer.steps == start.steps and fewer.first.value is None
    table.loc[table["init_seed"] > 0, "status"] = "diverged"
    assert speed.start_of(table, 8) is None


def test_an_optimum_between_tried_lrs_is_interpolated():
    between = {"fullft": 2.1e-3, "lora": 4.4e-3}  # tried: 1.6e-3, 3.2e-3, 6.4e-3
    rho, best = {1: 0.2, 4: 0.8}, lambda spec, step: between[spec.method.name]
    _, found = ask("rank", World(lambda s: rho[s.method.rank], best), rank_runs((1, 4), 384))
    check(found, parity=pytest.approx(0.8, rel=0.03))


def test_a_curve_whose_straightness_has_no_interval_leaves_the_claim_open():
    straight = [(float(2**k), 3.0 - 0.1 * k) for k in range(9)]
    sure = AtBest({s: [(t, v + 1e-3 * s * (t == 1)) for t, v in straight] for s in range(3)})
    one_seed = AtBest({0: straight})
    assert speed.straightness(sure).has_interval()
    assert not speed.least_straight(sure, one_seed).has_interval()


@pytest.mark.parametrize(
    ("slope", "params", "claim", "other", "outcome"),
    [
        (0.2, {}, "faster", "alike", "SUPPORTED"),
        (-0.2, {}, "faster", "alike", "REFUTED"),
        (0.0, RULES, "alike", "faster", "SUPPORTED"),
        (0.2, RULES, "alike", "faster", "REFUTED"),
    ],
)
def test_the_slope_over_ranks_is_judged_in_its_regime(slope, params, claim, other, outcome):
    world = World(lambda s: 0.5 * s.method.rank ** (slope / math.log(2)))
    _, found = ask("rank", world, rank_runs(**params))
    check(found, **{claim: (outcome, pytest.approx(slope, abs=0.03))})
    assert [g["code"] for g in found[other]["gates"]] == ["NO_CELL"]


@pytest.mark.parametrize(("factor", "outcome"), [(2.0, "SUPPORTED"), (0.5, "REFUTED")])
def test_whether_rank_1_has_a_lower_optimal_lr_comes_back(factor, outcome):
    def best(spec, step):
        rank = getattr(spec.method, "rank", 0)
        return LORA / (factor if rank == 1 else 1) if rank else FULL

    _, found = ask("rank", World(lambda s: 0.5, best=best), rank_runs(**RULES))
    check(found, rank_1_lower=(outcome, pytest.approx(factor, rel=0.1)))
    # A line over ln(1 + updates) is nearly one over ln(updates), and ranks of one speed stay equal.
    check(found, straight=("SUPPORTED", pytest.approx(1.1, abs=0.1)))


def test_the_difference_of_two_ranks_grows_at_the_planted_slope():
    """At one LR, rank 1 lies 0.02 nats further behind at every doubling."""

    class Grows(World):
        def loss(self, spec, step):
            behind = spec.method.name == "lora" and spec.method.rank == 1
            return super().loss(spec, step) + (0.02 * math.log2(step) if behind else 0.0)

    _, found = ask("rank", Grows(lambda s: 1.0), rank_runs())
    check(found, grows=("SUPPORTED", pytest.approx(0.02, abs=1e-3)))


def test_each_model_is_compared_with_full_fine_tuning_of_itself():
    top = {"tiny64": 1.0, "tiny64-s1": 0.5}
    world = World(lambda s: {1: 0.1, 8: top[s.model.name]}[s.method.rank])
    out, _ = ask("rank", world, rank_runs((1, 8), 384, models=top))
    parity = {v["group"].split()[0]: v for v in out["verdicts"] if v["claim"] == "parity"}
    outcomes = {"tiny64": "SUPPORTED", "tiny64-s1": "REFUTED"}
    check(parity, **{m: (outcomes[m], pytest.approx(top[m], rel=0.05)) for m in top})
    assert {name.split()[0] for name in out["tasks"]} == set(top)


def falls(step):
    """LoRA's speed after `step` updates over that at the start: half of it is lost in 64."""
    return step ** (-1 / 6)


def test_a_control_is_not_what_batches_are_compared_with():
    """Full fine-tuning of the adapted matrices only, at half the speed."""
    world = World(lambda s: 0.8 if s.method.name == "lora" else 0.5)
    specs = batches((4,), {4: 32, 16: 16})
    full = [s for s in specs if s.method.name == "fullft"]
    controls = [dataclasses.replace(s, method=FullFT(scope="matrices")) for s in full]
    found = prefixes_of(planted_table(world, specs + controls))
    values = [p.rho.value for p in found]
    assert {p.full.curve.key["scope"] for p in found} == {"all"}
    assert values == pytest.approx([0.8] * len(values), abs=0.05)


@pytest.mark.parametrize(("b", "outcome"), [(-0.1, "SUPPORTED"), (0.0, "REFUTED")])
def test_batch_penalty(b, outcome, tmp_path):
    """rho of 0.9 at batch 4, changing by the factor exp(b) per doubling."""
    world = World(lambda s: 0.9 * math.exp(b * math.log2(s.batch_size / 4)), falls=falls)
    out, found = ask("batch_size", world, batches((1, 4)), tmp_path if b else None)
    check(found, penalty=(outcome, pytest.approx(b, abs=0.02)))
    check(found, any_rank=("SUPPORTED", pytest.approx(0, abs=0.03)))
    # half of LoRA's speed is lost in 64 updates: at equal examples, a doubling halves the updates
    at_examples = {r: e["value"] for r, e in out["batch_effect_at_equal_examples"].items()}
    regained = math.log(2) / 6
    assert at_examples == {r: pytest.approx(b + regained, abs=0.04) for r in ("1", "4")}
    check(found, below_32="REFUTED")  # 0.9 and falling: more than 5% of the gain
    assert found["below_256"]["why"] == "no curve of batch 256"
    assert "batches of 4 to 64 after 8 to 128 updates" in out["read"]["batch_effect"]


class ByBatch(World):
    """Losses after `examples` are `of(spec)`, whatever the batch; LoRA is `gap(step)` behind."""

    def __init__(self, of=lambda spec: 0.0, gap=lambda step: 0.0):
        super().__init__(lambda spec: 1.0)
        self.of, self.gap = of, gap

    def loss(self, spec, step):
        lora = spec.method.name == "lora"
        return super().loss(spec, step) + self.of(spec) + lora * self.gap(step)


@pytest.mark.parametrize(
    ("of_full", "of_lora", "outcome"),
    [(0.0, 0.0, "SUPPORTED"), (0.0, 0.8, "REFUTED"), (0.8, 0.8, "REFUTED")],
)
def test_the_best_batch_is_small_only_if_it_is_for_both_methods(of_full, of_lora, outcome):
    """1,024 examples: batch 4 after 256 updates is the best, batch 64 after 16 the best above 32.
    `of_full` and `of_lora` are added at batches up to 32."""

    def of(spec):
        return (of_full if spec.method.name == "fullft" else of_lora) * (spec.batch_size <= 32)

    sizes = {4: 256, 16: 64, 64: 16, 128: 8}
    _, found = ask("batch_size", ByBatch(of), batches((1, 4), sizes))
    by_updates = GAIN * math.log2(257 / 17)
    expected = by_updates - max(of_full, of_lora)
    check(found, small_best=(outcome, pytest.approx(expected, abs=5e-3)))
    _, found = ask("batch_size", ByBatch(of), batches((1, 4), {4: 32, 16: 8}))
    assert found["small_best"]["why"] == "no curve of batches up to 32 and above, of both methods"


@pytest.mark.parametrize(
    ("doubling", "outcome"), [(-0.02, "SUPPORTED"), (0.02, "REFUTED"), (0.0, "UNDECIDED")]
)
def test_whether_the_gap_at_batch_32_shrinks(doubling, outcome):
    """The gap changes by `doubling` nats at each doubling of the updates, here from 32 to 128."""
    world = ByBatch(gap=lambda step: 0.2 + doubling * math.log2(step / 32))
    runs_at = batches((4,), {32: 128, 512: 8})
    out, found = ask("large_batches", world, runs_at)
    check(found, shrinks=(outcome, pytest.approx(2 * doubling, abs=3e-3)))
    assert out["read"]["gap_change_at_32"] == "rank 4, update 32 to 128"
    _, found = ask("large_batches", world, batches((4,), {16: 128, 512: 8}))
    assert found["shrinks"]["why"] == "no curve of batch 32"


def test_runs_of_two_lengths_of_one_batch_are_judged_together():
    """Optima fall with updates: at 16 only the short runs reach them."""
    world = World(best=lambda s, step: 6e-3 if step <= 16 else 8e-4)
    long = batches(lengths={4: 64, 16: 64}, full=8e-4, lora=8e-4)
    short = batches(lengths={4: 16, 16: 16}, full=6.4e-3, lora=6.4e-3)
    out, found = ask("batch_size", world, [*long, *short])
    check(found, penalty=pytest.approx(0, abs=0.03))
    assert "batches of 4 to 16 after 8 to 64 updates" in out["read"]["batch_effect"]


def test_every_batch_has_to_take_part():
    """The LRs of batch 64 do not bracket its optimum: what the others say is not enough."""
    world = World(best=lambda s, step: 1e-2 if s.batch_size == 64 else 1.6e-3)
    out, found = ask("batch_size", world, batches(lora=FULL))
    check(found, penalty="UNDECIDED")
    assert [e["value"] for e in out["batch_effect_at_equal_examples"].values()] == [None]
    assert {g["place"].split(",")[0] for g in found["penalty"]["gates"]} == {"batch 64"}
