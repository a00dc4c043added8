"""`layers` on planted runs: attention against MLP at equal parameters."""

import math

import pytest

from analysis.questions.layers import PARAMETERS_AGREE
from lorasweep.methods.lora import LoRA as Lora
from tests.planted import GAIN, LORA, World, arms, around, ask, base, check, runs

pytestmark = pytest.mark.slow  # fits dozens of curves
STEPS = 96
RANKS = {"mlp": (4,), "attention": (4, 8), "attention+mlp": (4,)}
"""As in the shipped sweep: attention at rank 8 has about the MLP's parameters at rank 4."""


def layer_runs(*models):
    found = []
    for model in models:
        spec = base(model, "dialect_smoke")
        found += arms(spec, (), steps=STEPS)
        for layers, ranks in RANKS.items():
            for rank in ranks:
                found += runs(spec, Lora(rank=rank, layers=layers), around(LORA), steps=STEPS)
    return found


def speeds(attention):
    return {"attention": attention, "mlp": 0.8, "attention+mlp": 0.82}


@pytest.mark.parametrize(("attention", "outcome"), [(0.4, "SUPPORTED"), (0.85, "REFUTED")])
def test_layer_sets(attention, outcome, tmp_path):
    world = World(lambda s: speeds(attention)[s.method.layers])
    folder = tmp_path if outcome == "SUPPORTED" else None
    _, found = ask("layers", world, layer_runs("tiny64"), folder)
    check(found, attention_worse=(outcome, pytest.approx(attention / 0.8, rel=0.05)))
    check(found, mlp_is_enough="SUPPORTED", mlp_loses_nothing="SUPPORTED")
    lost = math.log2((1 + STEPS * 0.8) / (1 + STEPS * attention))  # in doublings of the updates
    allowed = 0.05 * math.log2(1 + STEPS)
    gap = pytest.approx((lost - allowed) * GAIN, abs=0.03 * GAIN)
    check(found, attention_loses=(outcome, gap))


def test_a_claim_about_all_tasks_is_supported_only_if_it_holds_on_each():
    """Attention is slower on one base and faster on the other."""
    of_base = {"tiny64": speeds(0.4), "tiny64-s1": speeds(0.9)}
    world = World(lambda s: of_base[s.model.name][s.method.layers])
    out, found = ask("layers", world, layer_runs(*of_base))
    worse = [v for v in out["verdicts"] if v["claim"] == "attention_worse"]
    outcomes = {v["group"].split()[0]: v["outcome"] for v in worse}
    assert outcomes == {"tiny64": "SUPPORTED", "tiny64-s1": "REFUTED"}
    check(found, attention_everywhere="REFUTED")
    assert found["attention_everywhere"]["why"].startswith("by task: REFUTED on 1, SUPPORTED on 1")


@pytest.mark.parametrize("scale", ["smoke", "tiny", "small", "paper"])
def test_attention_and_mlp_have_equal_parameters_at_every_scale(compose, scale):
    points = [p for p in compose("+sweep=layers", f"scale={scale}").points if p.arm == "lora"]
    sizes = {}
    for p in points:
        size = sizes.setdefault(p.spec.model.name, {})
        size[p.spec.method.layers] = p.spec.method.n_trainable(p.spec.model)
    for size in sizes.values():
        assert abs(math.log(size["attention"] / size["mlp"])) < math.log(1 + PARAMETERS_AGREE)
