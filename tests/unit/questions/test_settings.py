"""Planted settings and costs: `layers`, `recipes`, `invariance`, `experts`, `capacity`, `compute`."""

import dataclasses
import json
import math

import numpy as np
import pytest

from analysis.questions import capacity, invariance, lengths
from analysis.runs.table import TableError
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from tests.planted import (
    CURVATURE,
    FULL,
    GAIN,
    LORA,
    World,
    arms,
    around,
    ask,
    base,
    check,
    facts,
    is_full,
    layers,
    planted_table,
    runs,
)

pytestmark = pytest.mark.slow  # fits dozens of curves


def speeds(attention):
    return {"attention": attention, "mlp": 0.8, "attention+mlp": 0.82}


@pytest.mark.parametrize(("attention", "outcome"), [(0.4, "SUPPORTED"), (0.85, "REFUTED")])
def test_layer_sets(attention, outcome, tmp_path):
    folder = tmp_path if outcome == "SUPPORTED" else None
    _, found = ask(*layers(lambda s: speeds(attention)), folder)
    check(found, attention_worse=(outcome, pytest.approx(attention / 0.8, rel=0.05)))
    check(found, mlp_is_enough="SUPPORTED", mlp_loses_nothing="SUPPORTED")
    lost = math.log2((1 + 64 * 0.8) / (1 + 64 * attention))  # in doublings of the updates
    gap = (lost - 0.05 * math.log2(1 + 64)) * GAIN
    check(found, attention_loses=(outcome, pytest.approx(gap, abs=0.03 * GAIN)))


LENGTH, RANK = 96, 8


def recipe_runs():
    spec, common = base(dataset="dialect_smoke"), {"steps": LENGTH}
    found = arms(spec, (RANK,), **common)
    found += runs(spec, LoRA(rank=RANK, alpha=2.0 * RANK), around(LORA), **common)
    for of in ("attention", "attention+mlp"):
        found += runs(spec, LoRA(rank=RANK, layers=of), around(2e-4), **common)
    original = LoRA(rank=RANK, alpha=1.0 * RANK, layers="attention")
    found += runs(spec, original, around(2e-4), schedule="linear", **common)
    few = base(dataset="dialect_few")
    return found + [s for r in (1, RANK) for s in runs(few, LoRA(rank=r), around(LORA), **common)]


def forgets(of_full):
    """LoRA forgets 0.2 nats, and full fine-tuning `of_full(spec)`."""

    def more(spec):
        return {"retain_nll": 2 + (of_full(spec) if is_full(spec) else 0.2), "retain_start": 2.0}

    return {"more": more}


def test_recipes(tmp_path):
    world = World(lambda s: 1.0 if s.method.rank == RANK else 0.6, **forgets(lambda s: 0.5))
    _, found = ask("recipes", world, recipe_runs(), tmp_path)
    check(found, alpha_twice_rank="SUPPORTED", small_data_rank="REFUTED")  # of alpha: the same loss
    lost = CURVATURE * math.log(2e-4 / LORA) ** 2 / (GAIN * math.log2(LENGTH + 1))
    check(found, default_rate=("REFUTED", pytest.approx(lost, rel=0.05)))
    check(found, retention=pytest.approx(0.4))


def test_forgetting_is_compared_where_both_have_learned_as_much():
    """Full fine-tuning forgets more at a higher LR; where it has learned what LoRA learns, at a
    quarter of its optimal LR, it has forgotten half of what LoRA has."""
    rho = 2.0 ** -(CURVATURE * math.log(4) ** 2 / GAIN)
    world = World(lambda s: rho, **forgets(lambda s: 0.2 * math.sqrt(s.lr / FULL)))
    _, found = ask("recipes", world, recipe_runs())
    check(found, retention=pytest.approx(1.0, rel=0.1))
    check(found, retention_equal=("REFUTED", pytest.approx(2.0, rel=0.1)))


B_BEHIND = 0.03
POWERS = {"rank": 0.0, "sqrt_rank": -0.5, "none": -1.0}
"""Of the rank, by the rule that scales an adapter: so the optimum changes."""
TWIN = {"alpha": 8.0, "init_scale": 2.0, "lr_b_ratio": 1.0}
"""The twin of alpha 32, init 1 and one LR by p = q = 2: both LRs are doubled."""


class Rules(World):
    """Under alpha / rank the optimum is free of the rank; B random is behind; twins agree."""

    def __init__(self, broken):
        def optimum(spec, step):
            return LORA * spec.method.rank ** POWERS[spec.method.scaling_by]

        super().__init__(lambda spec: 0.8, best=optimum)
        self.broken = broken

    def loss(self, spec, step):
        if spec.precision == "fp64":
            off = self.broken if spec.eps == 1e-8 and spec.method.init_scale != 1 else 1e-15
            return 3.0 - 0.1 * math.log2(1 + step) + off * spec.method.init_scale
        return super().loss(spec, step) + B_BEHIND * (spec.method.random_factor == "b")


def setting_runs():
    spec, found = base(dataset="dialect_smoke"), []
    for rule, power in POWERS.items():
        for rank in (1, 4, 16):
            method = LoRA(rank=rank, scaling_by=rule)
            found += runs(spec, method, around(LORA * rank**power), steps=64)
    found += runs(spec, LoRA(rank=4, random_factor="b"), around(LORA), steps=64)
    for eps in (1e-30, 1e-8):
        common = {"precision": "fp64", "eps": eps, "steps": 16}
        found += runs(spec, LoRA(rank=4), [1e-3], [0], **common)
        found += runs(spec, LoRA(rank=4, **TWIN), [2e-3], [0], **common)
    return found


def test_twins_are_compared_up_to_where_one_of_them_diverged_and_none_without_a_loss():
    table = planted_table(Rules(1e-3), setting_runs())
    proofs = table[table["precision"] == "fp64"].reset_index(drop=True)
    whole = invariance.Twins(proofs)

    def cut(last):
        """The first run, without its evaluations after a step."""
        result = json.loads(proofs.at[0, "result"])
        result["curve"] = [point for point in result["curve"] if point["step"] <= last]
        first = proofs.index == 0
        return proofs.assign(result=proofs["result"].where(~first, json.dumps(result)))

    fewer = invariance.Twins(cut(8))
    assert len(fewer.held) == len(whole.held) and fewer.broken == whole.broken
    assert len(invariance.Twins(cut(0)).held) < len(whole.held)


@pytest.mark.parametrize(("broken", "outcome"), [(1e-3, "SUPPORTED"), (1e-9, "REFUTED")])
def test_twins_rules_and_starts_come_back(broken, outcome, tmp_path):
    _, found = ask("invariance", Rules(broken), setting_runs(), tmp_path if broken > 1e-6 else None)
    check(found, twins="SUPPORTED", breakers=outcome, rank_free="SUPPORTED")
    check(found, rank_free_root=pytest.approx(-math.log(2) / 2, abs=0.05))
    check(found, start_b=("REFUTED", pytest.approx(B_BEHIND, abs=1e-3)))


# ---------------------------------------------------------------- readings of experts' rank

READINGS = {
    "active": LoRA(rank=8, layers="mlp"),
    "all": LoRA(rank=8, layers="mlp", expert_rank="all"),
    "divided_alpha": LoRA(rank=8, layers="mlp", expert_alpha=16.0),
}


class Readings(World):
    """`all` lies a tenth of the gain behind; a divided alpha has twice the optimal LR."""

    def __init__(self):
        def optimum(spec, step):
            twice = 1 + (spec.method == READINGS["divided_alpha"])
            return FULL if is_full(spec) else LORA * twice

        super().__init__(lambda spec: 1.0, optimum)

    def loss(self, spec, step):
        behind = 0.1 * GAIN * math.log2(1 + spec.steps) * (spec.method == READINGS["all"])
        return super().loss(spec, step) + behind


def test_variants_of_lora_are_compared_by_name(tmp_path):
    spec, one = base("tiny64-experts", "dialect_smoke"), {"steps": 64}
    specs = arms(spec, (), **one)
    specs += [s for method in READINGS.values() for s in runs(spec, method, around(LORA), **one)]
    _, found = ask("experts", Readings(), specs, tmp_path)
    gain = GAIN * math.log2(65)
    check(found, all_experts=("REFUTED", pytest.approx(0.05 * gain, abs=0.005 * gain)))
    two = pytest.approx(2, rel=0.15)
    check(found, same_scale=("REFUTED", two), ratio=("REFUTED", two), whole="no curve of whole")
    text = (tmp_path / "report.md").read_text()
    assert "| divided alpha |" in text
    twice = runs(spec, dataclasses.replace(READINGS["all"], rank=16), [LORA], **one)
    with pytest.raises(TableError, match="2 curves are 'all'"):
        ask("experts", Readings(), [*specs, *twice])


# ---------------------------------------------------------------- capacity and compute


@pytest.mark.parametrize(("bits", "outcome"), [(2.0, "SUPPORTED"), (0.5, "REFUTED")])
def test_capacity(bits, outcome, tmp_path):
    sweep, world, specs = facts(lambda updates: bits)
    _, found = ask(sweep, world, specs, tmp_path if bits == 2 else None)
    check(found, two_bits=(outcome, pytest.approx(bits, rel=0.05)), no_leak="SUPPORTED")
    other = runs(specs[0], LoRA(rank=4, layers="attention"), [1e-2], steps=400)
    with pytest.raises(TableError, match="LoRA has the ranks 1, 4, but bits a parameter need one"):
        ask(sweep, world, [*specs, *other])


def test_parameters_and_operations_are_those_of_the_methods():
    """Effective parameters: r (m + n) - r^2 of the four attention matrices, each counted once."""
    spec = dataclasses.replace(base(), method=LoRA(rank=1, layers="attention"))
    assert capacity.effective(spec.plain()) == 4 * (127 + 79 + 79 + 127)
    assert capacity.bits(0.0, 10) == pytest.approx(160) and capacity.bits(math.log(16), 10) == 0
    spec = base("smollm2-135m-instruct")
    for method in (LoRA(rank=1), LoRA(rank=16)):
        found = lengths.flops_ratio(spec.plain(), method.n_trainable(spec.model))
        lora, full = (m.step_flops(spec.model, 100) for m in (method, FullFT()))
        assert found == pytest.approx(lora / full)


@pytest.mark.parametrize(
    ("rho", "shift", "updates", "length", "expected"),
    [
        (1.0, 1.0, 1.0, 96, {"flops_to_loss": "SUPPORTED"}),
        (0.5, 1.0, 2.0, 192, {"flops_to_loss": "REFUTED"}),  # reached just after update 128
        (0.2, 1.0, 256 / 51, 384, {}),  # the last evaluation before the end: 256
        # At the optimum of whole runs, LoRA would need three quarters more updates.
        (1.0, 4.0, 1.0, 96, {}),
    ],
)
def test_compute(rho, shift, updates, length, expected, tmp_path):
    """LoRA reaches full fine-tuning's loss after 64 of 384 updates; up to 96, its optimum is shifted.

    An update of full fine-tuning takes 0.1 s and one of LoRA 0.07 s, or up to 2% longer."""

    def best(spec, step):
        return FULL if is_full(spec) else LORA * (shift if step <= 96 else 1.0)

    def seconds(spec):
        noise = np.random.default_rng(int(spec.id, 16)).uniform(1.0, 1.02)
        return {"step_s": (0.1 if is_full(spec) else 0.07) * noise}

    specs = arms(base(dataset="dialect_smoke"), (1,), steps=384)
    folder = tmp_path if rho == shift else None
    out, found = ask("compute", World(lambda s: rho, best, seconds), specs, folder)
    assert out["lengths"] == {"1": length}
    to_loss, per_step = (found[k]["estimate"]["value"] for k in ("flops_to_loss", "flops_a_step"))
    assert to_loss / per_step == pytest.approx(updates, rel=0.08)
    took = pytest.approx(0.7 * updates, rel=0.1)
    check(found, seconds_a_step="SUPPORTED", seconds_to_loss=took, **expected)
