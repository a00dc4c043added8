"""`layers` on planted runs: attention against MLP at equal parameters."""

import math

import pytest

from analysis.measures import layer_sets
from tests.planted import World

pytestmark = pytest.mark.slow  # sweeps of hundreds of planted runs


@pytest.mark.parametrize(("attention", "outcome"), [(0.4, "SUPPORTED"), (0.85, "REFUTED")])
def test_layer_sets(ask, attention, outcome):
    rho = {"attention": attention, "mlp": 0.8, "attention+mlp": 0.82}
    lr = {
        "fullft": "[4e-4,8e-4,1.6e-3,3.2e-3,6.4e-3]",
        "lora": "[8e-4,1.6e-3,3.2e-3,6.4e-3,1.28e-2]",
    }
    task = {
        k: f"sweep.at.smoke.{k}=[{{model:tiny64,dataset:dialect,lr:{v}}}]" for k, v in lr.items()
    }
    world = World(lambda s: rho.get(s.method.layers, 0.9))
    _out, found = ask(
        "layers", world, *task.values(), "sweep.at.smoke.steps=96", report=outcome == "SUPPORTED"
    )
    assert found["attention_worse"]["outcome"] == outcome
    assert found["attention_worse"]["estimate"]["value"] == pytest.approx(attention / 0.8, rel=0.05)
    assert found["mlp_is_enough"]["outcome"] == "SUPPORTED"


@pytest.mark.parametrize("scale", ["smoke", "tiny", "small", "paper"])
def test_attention_and_mlp_have_equal_parameters_at_every_scale(compose, scale):
    points = [p for p in compose("+sweep=layers", f"scale={scale}").points if p.arm == "lora"]
    size = {p.spec.method.layers: p.spec.method.n_trainable(p.spec.model) for p in points}
    assert abs(math.log(size["attention"] / size["mlp"])) < math.log(
        1 + layer_sets.PARAMETERS_AGREE
    )
