"""`batch_size` on planted runs: what LoRA loses a doubling of the batch."""

import math

import pytest

from tests.planted import World

pytestmark = pytest.mark.slow  # fits hundreds of curves


@pytest.mark.parametrize(("power", "outcome"), [(-0.15, "SUPPORTED"), (0.0, "REFUTED")])
def test_batch_penalty(ask, power, outcome):
    cells = ",".join(
        f"{{batch_size:{b},steps:{1536 // b},lr:[4e-4,8e-4,1.6e-3,3.2e-3,6.4e-3]}}"
        for b in (4, 16, 64)
    )
    lora = cells.replace("4e-4,8e-4,1.6e-3,3.2e-3,6.4e-3", "8e-4,1.6e-3,3.2e-3,6.4e-3,1.28e-2")
    _out, found = ask(
        "batch_size",
        World(lambda s: 0.9 * (s.batch_size / 4) ** power),
        f"sweep.at.smoke.fullft=[{cells}]",
        f"sweep.at.smoke.lora=[{lora}]",
        "sweep.at.smoke.ranks=[1,4]",
        report=outcome == "SUPPORTED",
    )
    assert found["penalty"]["outcome"] == outcome
    assert found["penalty"]["estimate"]["value"] == pytest.approx(power * math.log(2), abs=0.02)
    assert found["any_rank"]["estimate"]["value"] == pytest.approx(0, abs=0.03)
    assert found["below_32"]["estimate"]["value"] == pytest.approx(0.9 * 4**power, rel=0.05)
