"""`rank` and `batch_size` on planted runs: which ranks keep up, and what LoRA loses per doubling of the batch."""

import math

import pytest

from analysis.measures import speed
from tests import planted
from tests.planted import FULL, GAIN, LORA, World, ask, batches, check, is_full, rank_of, rank_runs

pytestmark = pytest.mark.slow  # fits dozens of curves
RULES = {"rule_shift": 0.25, "new_exceptions": 0.0}


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """No test here is about the bootstrap's interval of the step at which ranks part."""
    monkeypatch.setattr(speed, "RESAMPLES", 200)


def of_rank(rho, *best):
    return World(lambda s: rho[s.method.rank], *best)


def rising(slope):
    return World(lambda s: 0.5 * s.method.rank ** (slope / math.log(2)))


def rank_1_lower(factor):
    def best(spec, step):
        return FULL if is_full(spec) else LORA / (factor if rank_of(spec) == 1 else 1)

    return World(lambda s: 0.5, best=best)


def near(value, off):
    return pytest.approx(value, abs=off)


BETWEEN = of_rank({1: 0.2, 4: 0.8}, lambda spec, step: 2.1e-3 if is_full(spec) else 4.4e-3)
"""Optima between tried LRs: 1.6e-3, 3.2e-3, 6.4e-3."""
GROWS = planted.lost(lambda s, step: 0.02 * math.log2(step) * (rank_of(s) == 1))


@pytest.mark.parametrize(
    ("world", "of", "params", "expected"),
    [
        (BETWEEN, ((1, 4), 384), {}, {"parity": near(0.8, 0.024)}),
        (rising(0.2), (), {}, {"faster": ("SUPPORTED", near(0.2, 0.03)), "alike": "NO_CELL"}),
        (rising(0.2), (), RULES, {"alike": ("REFUTED", near(0.2, 0.03)), "faster": "NO_CELL"}),
        # A line over ln(1 + updates) is nearly one over ln(updates); ranks of one speed stay equal.
        (rank_1_lower(2), (), RULES, {"rank_1_lower": near(2, 0.2), "straight": near(1.1, 0.1)}),
        (GROWS, (), {}, {"grows": ("SUPPORTED", near(0.02, 1e-3))}),
    ],
)
def test_what_is_planted_of_ranks_comes_back(world, of, params, expected):
    check(ask("rank", world, rank_runs(*of, **params))[1], **expected)


@pytest.mark.parametrize(("top", "outcome"), [(1.0, "SUPPORTED"), (0.5, "REFUTED")])
def test_parity_and_the_steps_from_which_ranks_are_behind(top, outcome, tmp_path):
    world, folder = of_rank({1: 0.1, 4: 0.3, 8: top}), tmp_path if top == 1 else None
    out, found = ask("rank", world, rank_runs(steps=384), folder)
    check(found, parity=(outcome, pytest.approx(top, rel=0.05)))
    check(found, start_popular="REFUTED")  # rank 1 is apart at once
    left = out["departures"]
    assert max(left["1"]) <= min(left["4"])
    assert all(v is None for v in left["8"]) == (top == 1.0)


@pytest.mark.parametrize(("b", "outcome"), [(-0.1, "SUPPORTED"), (0.0, "REFUTED")])
def test_batch_penalty(b, outcome, tmp_path):
    """rho of 0.9 at batch 4, changing by exp(b) per doubling; half of it is lost in 64 updates."""
    world = World(
        lambda s: 0.9 * math.exp(b * math.log2(s.batch_size / 4)), falls=lambda t: t ** (-1 / 6)
    )
    out, found = ask("batch_size", world, batches((1, 4)), tmp_path if b else None)
    check(found, penalty=(outcome, near(b, 0.02)), any_rank=("SUPPORTED", near(0, 0.03)))
    # at equal examples, a doubling of the batch halves the updates
    at_examples = {r: e["value"] for r, e in out["batch_effect_at_equal_examples"].items()}
    assert at_examples == {r: near(b + math.log(2) / 6, 0.04) for r in ("1", "4")}
    # 0.9 and falling: more than 5% of the gain
    check(found, below_32="REFUTED", below_256="no curve of batch 256")
    assert "batches of 4 to 64 after 8 to 128 updates" in out["read"]["batch_effect"]


class ByBatch(World):
    """Losses after `examples` are `of(spec)`, whatever the batch; LoRA is `gap(step)` behind."""

    def __init__(self, of=lambda spec: 0.0, gap=lambda step: 0.0):
        super().__init__(lambda spec: 1.0)
        self.of, self.gap = of, gap

    def loss(self, spec, step):
        behind = 0.0 if is_full(spec) else self.gap(step)
        return super().loss(spec, step) + self.of(spec) + behind


@pytest.mark.parametrize(
    ("of_full", "of_lora", "outcome"),
    [(0.0, 0.0, "SUPPORTED"), (0.0, 0.8, "REFUTED"), (0.8, 0.8, "REFUTED")],
)
def test_the_best_batch_is_small_only_if_it_is_for_both_methods(of_full, of_lora, outcome):
    """1,024 examples: batch 4 after 256 updates is the best, batch 64 after 16 the best above 32.
    `of_full` and `of_lora` are added at batches up to 32."""
    world = ByBatch(lambda s: (of_full if is_full(s) else of_lora) * (s.batch_size <= 32))
    sizes = {4: 256, 16: 64, 64: 16, 128: 8}
    _, found = ask("batch_size", world, batches((1, 4), sizes))
    expected = GAIN * math.log2(257 / 17) - max(of_full, of_lora)
    check(found, small_best=(outcome, near(expected, 5e-3)))


@pytest.mark.parametrize(
    ("doubling", "outcome"), [(-0.02, "SUPPORTED"), (0.02, "REFUTED"), (0.0, "UNDECIDED")]
)
def test_whether_the_gap_at_batch_32_shrinks(doubling, outcome):
    """The gap changes by `doubling` nats at each doubling of the updates, here from 32 to 128."""
    world = ByBatch(gap=lambda step: 0.2 + doubling * math.log2(step / 32))
    runs = batches((4,), {32: 128, 512: 8})
    out, found = ask("large_batches", world, runs)
    check(found, shrinks=(outcome, near(2 * doubling, 3e-3)))
    assert out["read"]["gap_change_at_32"] == "rank 4, update 32 to 128"
    _, found = ask("large_batches", world, [s for s in runs if s.batch_size == 512])
    check(found, shrinks="no curve of batch 32")
