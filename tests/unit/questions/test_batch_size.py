"""`batch_size` on planted runs: what LoRA loses per doubling of the batch, apart from updates."""

import math

import pytest

from tests.planted import FULL, LORA, World, arms, ask, base, check

pytestmark = pytest.mark.slow  # fits dozens of curves
LENGTHS = {4: 256, 16: 128, 64: 32}


def batches(ranks=(4,), models=("tiny64",), lengths=LENGTHS, full=FULL, lora=LORA, n=5):
    found = []
    for model in models:
        spec = base(model, "dialect_smoke")
        for size, steps in lengths.items():
            found += arms(spec, ranks, full, lora, n, batch_size=size, steps=steps)
    return found


def falls(step):
    """LoRA's speed after `step` updates over that at the start: half of it is lost in 64."""
    return step ** (-1 / 6)


def penalty(b):
    """rho of 0.9 at batch 4, changing by the factor exp(b) per doubling."""
    return lambda s: 0.9 * math.exp(b[s.model.name] * math.log2(s.batch_size / 4))


@pytest.mark.parametrize(("b", "outcome"), [(-0.1, "SUPPORTED"), (0.0, "REFUTED")])
def test_batch_penalty(b, outcome, tmp_path):
    world, folder = World(penalty({"tiny64": b}), falls=falls), tmp_path if b else None
    out, found = ask("batch_size", world, batches((1, 4)), folder)
    check(found, penalty=(outcome, pytest.approx(b, abs=0.02)))
    check(found, any_rank=("SUPPORTED", pytest.approx(0, abs=0.03)))
    check(found, below_32="REFUTED")  # 0.9 and falling: more than 5% of the gain
    assert found["below_256"]["why"] == "no curve of batch 256"
    assert "batches of 4 to 64 after 8 to 128 updates" in out["read"]["batch_effect"]


@pytest.mark.full
def test_each_model_has_an_effect_of_its_own():
    """Nothing on one base, a penalty on the other: together they would be neither."""
    b = {"tiny64": -0.1, "tiny64-s1": 0.0}
    out, _ = ask("batch_size", World(penalty(b), falls=falls), batches(models=b))
    found = {v["group"].split()[0]: v for v in out["verdicts"] if v["claim"] == "penalty"}
    check(found, **{m: pytest.approx(v, abs=0.02) for m, v in b.items()})


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
    _, found = ask("batch_size", world, batches(lora=FULL))
    check(found, penalty="UNDECIDED")
    assert {g["place"].split(",")[0] for g in found["penalty"]["gates"]} == {"batch 64"}
