"""`layers` on planted runs: attention against MLP at equal parameters."""

import math

import pytest

from analysis.questions import layers
from tests.planted import FULL_LR, GAIN, LORA_LR, World

pytestmark = pytest.mark.slow  # sweeps of hundreds of planted runs


@pytest.mark.parametrize(("attention", "outcome"), [(0.4, "SUPPORTED"), (0.85, "REFUTED")])
def test_layer_sets(ask, attention, outcome):
    rho = {"attention": attention, "mlp": 0.8, "attention+mlp": 0.82}
    lr = {
        "fullft": "[4e-4,8e-4,1.6e-3,3.2e-3,6.4e-3]",
        "lora": "[8e-4,1.6e-3,3.2e-3,6.4e-3,1.28e-2]",
        "unembedding": "[8e-4,1.6e-3,3.2e-3,6.4e-3,1.28e-2]",
    }
    task = {
        k: f"sweep.arms.{k}.task=[{{model:tiny64,dataset:dialect,steps:96,lr:{v}}}]"
        for k, v in lr.items()
    }
    world = World(lambda s: rho.get(s.method.layers, 0.9))
    _out, found = ask("layers", world, *task.values(), report=outcome == "SUPPORTED")
    assert found["attention_worse"]["outcome"] == outcome
    assert found["attention_worse"]["estimate"]["value"] == pytest.approx(attention / 0.8, rel=0.05)
    assert found["mlp_is_enough"]["outcome"] == "SUPPORTED"
    losses = math.log2((1 + 96 * 0.8) / (1 + 96 * attention))  # in units of what a doubling gains
    allowed = 0.05 * math.log2(1 + 96)
    gap = found["attention_loses"]["estimate"]["value"] / GAIN
    assert gap == pytest.approx(losses - allowed, abs=0.03)
    assert found["attention_loses"]["outcome"] == outcome
    assert found["mlp_loses_nothing"]["outcome"] == "SUPPORTED"
    assert found["attention_everywhere"]["outcome"] == outcome  # one task is all tasks


def test_tasks_that_disagree_have_verdicts_of_their_own(ask):
    """Attention is slower on one base and faster on the other: no claim about both is supported."""
    bases = ("tiny64", "tiny64-s1")
    rates = {"fullft": FULL_LR, "lora": LORA_LR, "unembedding": LORA_LR}
    tasks = {
        k: ",".join(f'{{model:{b},dataset:dialect,steps:96,lr:"{v}"}}' for b in bases)
        for k, v in rates.items()
    }
    slow = {"attention": 0.4, "mlp": 0.8, "attention+mlp": 0.82}
    fast = {"attention": 0.9, "mlp": 0.8, "attention+mlp": 0.82}
    world = World(lambda s: (slow if s.model.name == "tiny64" else fast).get(s.method.layers, 0.9))
    asked = [f"sweep.arms.{k}.task=[{v}]" for k, v in tasks.items()]
    out, found = ask("layers", world, *asked)
    outcomes = {
        v["group"].split()[0]: v["outcome"]
        for v in out["verdicts"]
        if v["claim"] == "attention_worse"
    }
    assert outcomes == {"tiny64": "SUPPORTED", "tiny64-s1": "REFUTED"}
    assert found["attention_everywhere"]["outcome"] == "REFUTED"
    assert found["attention_everywhere"]["why"].startswith("by task: REFUTED on 1, SUPPORTED on 1")


@pytest.mark.parametrize("scale", ["smoke", "tiny", "small", "paper"])
def test_attention_and_mlp_have_equal_parameters_at_every_scale(compose, scale):
    points = [p for p in compose("+sweep=layers", f"scale={scale}").points if p.arm == "lora"]
    sizes = {}
    for p in points:
        size = sizes.setdefault(p.spec.model.name, {})
        size[p.spec.method.layers] = p.spec.method.n_trainable(p.spec.model)
    for size in sizes.values():
        assert abs(math.log(size["attention"] / size["mlp"])) < math.log(
            1 + layers.PARAMETERS_AGREE
        )
