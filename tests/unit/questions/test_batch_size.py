"""`batch_size` on planted runs: what LoRA loses a doubling of the batch, apart from updates."""

import math

import pytest

from tests.planted import World

pytestmark = pytest.mark.slow  # fits hundreds of curves

LENGTHS = {4: 256, 16: 128, 64: 32}
FULL, LORA = "[4e-4,8e-4,1.6e-3,3.2e-3,6.4e-3]", "[8e-4,1.6e-3,3.2e-3,6.4e-3,1.28e-2]"


def cells(rates, lengths=LENGTHS):
    sizes = (f"{{batch_size:{b},steps:{n},lr:{rates}}}" for b, n in lengths.items())
    return f"[{','.join(sizes)}]"


def falls(step):
    """LoRA's speed at the start over that after `step` updates: half of it is lost in 64."""
    return step ** (-1 / 6)


@pytest.mark.parametrize(("b", "outcome"), [(-0.1, "SUPPORTED"), (0.0, "REFUTED")])
def test_batch_penalty(ask, b, outcome):
    out, found = ask(
        "batch_size",
        World(lambda s: 0.9 * math.exp(b * math.log2(s.batch_size / 4)), falls=falls),
        f"sweep.at.smoke.fullft={cells(FULL)}",
        f"sweep.at.smoke.lora={cells(LORA)}",
        "sweep.at.smoke.ranks=[1,4]",
        report=outcome == "SUPPORTED",
    )
    assert found["penalty"]["outcome"] == outcome
    assert found["penalty"]["estimate"]["value"] == pytest.approx(b, abs=0.02)
    assert found["any_rank"]["estimate"]["value"] == pytest.approx(0, abs=0.03)
    assert found["any_rank"]["outcome"] == "SUPPORTED"
    assert found["below_32"]["outcome"] == "REFUTED"  # 0.9 and falling: more than 5% of the gain
    assert found["below_256"]["why"].startswith("no curve of batch 256")
    assert "batches of 4 to 64 after 8 to 128 updates" in out["read"]["batch_effect"]


@pytest.mark.full
def test_each_model_has_an_effect_of_its_own(ask):
    """Nothing on one base, a penalty on the other: together they would be neither."""
    b = {"tiny64": -0.1, "tiny64-s1": 0.0}
    out, _ = ask(
        "batch_size",
        World(lambda s: 0.9 * math.exp(b[s.model.name] * math.log2(s.batch_size / 4)), falls=falls),
        f"sweep.at.smoke.fullft={cells(FULL)}",
        f"sweep.at.smoke.lora={cells(LORA)}",
        "sweep.at.smoke.model=[tiny64,tiny64-s1]",
    )
    found = {v["group"].split()[0]: v for v in out["verdicts"] if v["claim"] == "penalty"}
    assert {m: v["estimate"]["value"] for m, v in found.items()} == pytest.approx(b, abs=0.02)


def test_runs_of_two_lengths_of_one_batch_are_judged_together(ask):
    """Best rates fall with updates: at 16 only the short runs reach them, which are tuned for it."""
    long = cells("[2e-4,4e-4,8e-4,1.6e-3,3.2e-3]", {4: 64, 16: 64})
    short = cells("[1.6e-3,3.2e-3,6.4e-3,1.28e-2,2.56e-2]", {4: 16, 16: 16})
    both = f"{long[:-1]},{short[1:]}"
    out, found = ask(
        "batch_size",
        World(best=lambda s, step: 6e-3 if step <= 16 else 8e-4),
        f"sweep.at.smoke.fullft={both}",
        f"sweep.at.smoke.lora={both}",
    )
    assert found["penalty"]["estimate"]["value"] == pytest.approx(0, abs=0.03)
    assert "batches of 4 to 16 after 8 to 64 updates" in out["read"]["batch_effect"]


def test_every_batch_has_to_take_part(ask):
    """The rates of batch 64 do not bracket its best: what the others say is not enough."""
    _, found = ask(
        "batch_size",
        World(best=lambda s, step: 1e-2 if s.batch_size == 64 else 1.6e-3),
        f"sweep.at.smoke.fullft={cells(FULL)}",
        f"sweep.at.smoke.lora={cells(FULL)}",
    )
    assert found["penalty"]["outcome"] == "UNDECIDED"
    assert found["penalty"]["why"].startswith("batch 64, ")
