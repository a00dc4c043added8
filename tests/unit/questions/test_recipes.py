"""`recipes` on planted runs: popular settings, and what they forget."""

import math

import pytest

from lorasweep.methods.lora import LoRA as Lora
from tests.planted import CURVATURE, FULL, GAIN, LORA, World, arms, around, ask, base, check, runs

pytestmark = pytest.mark.slow  # fits dozens of curves
STEPS, RANK = 96, 8


def recipe_runs():
    spec, common = base(dataset="dialect_smoke"), {"steps": STEPS}
    found = arms(spec, (RANK,), **common)
    found += runs(spec, Lora(rank=RANK, alpha=2.0 * RANK), around(LORA), **common)
    for layers in ("attention", "attention+mlp"):
        found += runs(spec, Lora(rank=RANK, layers=layers), around(2e-4), **common)
    original = Lora(rank=RANK, alpha=1.0 * RANK, layers="attention")
    found += runs(spec, original, around(2e-4), schedule="linear", **common)
    few = base(dataset="dialect_few")
    return found + [s for r in (1, RANK) for s in runs(few, Lora(rank=r), around(LORA), **common)]


def test_recipes(tmp_path):
    def more(spec):
        return {"retain_nll": 2.5 if spec.method.name == "fullft" else 2.2, "retain_start": 2.0}

    world = World(lambda s: 1.0 if s.method.rank == RANK else 0.6, more=more)
    _, found = ask("recipes", world, recipe_runs(), tmp_path)
    check(found, alpha_twice_rank="SUPPORTED", small_data_rank="REFUTED")  # of alpha: the same loss
    lost = CURVATURE * math.log(2e-4 / LORA) ** 2 / (GAIN * math.log2(STEPS + 1))
    check(found, default_rate=("REFUTED", pytest.approx(lost, rel=0.05)))
    check(found, retention=pytest.approx(0.4))


def test_forgetting_is_compared_where_both_have_learned_as_much():
    """Full fine-tuning forgets more at a higher LR; where it has learned what LoRA learns, at a
    quarter of its optimal LR, it has forgotten half of what LoRA has."""

    def more(spec):
        lost = 0.2 if spec.method.name == "lora" else 0.2 * math.sqrt(spec.lr / FULL)
        return {"retain_nll": 2.0 + lost, "retain_start": 2.0}

    rho = 2.0 ** -(CURVATURE * math.log(4) ** 2 / GAIN)
    _, found = ask("recipes", World(lambda s: rho, more=more), recipe_runs())
    check(found, retention=pytest.approx(1.0, rel=0.1))
    check(found, retention_equal=("REFUTED", pytest.approx(2.0, rel=0.1)))
