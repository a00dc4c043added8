"""`recipes` on planted runs: popular settings, and what they forget."""

import math

import pytest

from tests.planted import CURVATURE, FULL, GAIN, GRIDS, LORA, LORA_LR, World

pytestmark = pytest.mark.slow  # fits hundreds of curves


def test_recipes(ask):
    def best(spec, step):
        return FULL if spec.method.name == "fullft" else LORA

    world = World(
        lambda s: 1.0 if s.method.rank == 8 else 0.6,
        best,
        more=lambda s: {
            "retain_nll": 2.5 if s.method.name == "fullft" else 2.2,
            "retain_start": 2.0,
        },
    )
    _out, found = ask(
        "recipes",
        world,
        *(g.replace("arms.lora", "arms.tuned") for g in GRIDS),
        "sweep.arms.tuned.rank=8",
        "sweep.arms.small_data.rank=[1,8]",
        "sweep.arms.alpha_2r.alpha=16",
        "sweep.axes.steps=96",
        f"sweep.arms.small_data.lr={LORA_LR}",
        report=True,
    )
    gain = GAIN * math.log2(97)
    assert found["alpha_twice_rank"]["outcome"] == "SUPPORTED"  # the same loss
    lost = CURVATURE * math.log(2e-4 / LORA) ** 2 / gain
    assert found["default_rate"]["outcome"] == "REFUTED"
    assert found["default_rate"]["estimate"]["value"] == pytest.approx(lost, rel=0.05)
    assert found["retention"]["estimate"]["value"] == pytest.approx(0.4)
    assert found["small_data_rank"]["outcome"] == "REFUTED"


def test_forgetting_is_compared_where_both_have_learned_as_much(ask):
    """Full fine-tuning forgets with its rate; where it has learned what LoRA learns, it has
    forgotten half of what LoRA has."""

    def more(spec):
        lost = 0.2 if spec.method.name == "lora" else 0.2 * math.sqrt(spec.lr / FULL)
        return {"retain_nll": 2.0 + lost, "retain_start": 2.0}

    rho = 2.0 ** -(
        CURVATURE * math.log(4) ** 2 / GAIN
    )  # a loss that full fine-tuning has at a quarter of its best rate
    _out, found = ask(
        "recipes",
        World(lambda s: rho, more=more),
        *(g.replace("arms.lora", "arms.tuned") for g in GRIDS),
        "sweep.arms.tuned.rank=8",
        "sweep.arms.small_data.rank=[1,8]",
        "sweep.arms.alpha_2r.alpha=16",
        "sweep.axes.steps=96",
        "sweep.arms.fullft.seed=[0,1,2,3]",
    )
    assert found["retention"]["estimate"]["value"] == pytest.approx(1.0, rel=0.1)
    assert found["retention_equal"]["estimate"]["value"] == pytest.approx(2.0, rel=0.1)
    assert found["retention_equal"]["outcome"] == "REFUTED"
