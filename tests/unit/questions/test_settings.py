"""`layers`, `recipes` and `invariance` on planted runs: layer sets, popular settings, twins."""

import json
import math
from types import SimpleNamespace

import pytest

from analysis.inference.decide import judge
from analysis.questions import invariance
from lorasweep.methods.lora import LoRA as Lora
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
    allowed = 0.05 * math.log2(1 + 64)
    gap = pytest.approx((lost - allowed) * GAIN, abs=0.03 * GAIN)
    check(found, attention_loses=(outcome, gap))


def test_a_claim_about_all_tasks_is_supported_only_if_it_holds_on_each():
    of_base = {"tiny64": speeds(0.4), "tiny64-s1": speeds(0.9)}
    out, found = ask(*layers(lambda s: of_base[s.model.name], of_base))
    worse = [v for v in out["verdicts"] if v["claim"] == "attention_worse"]
    outcomes = {v["group"].split()[0]: v["outcome"] for v in worse}
    assert outcomes == {"tiny64": "SUPPORTED", "tiny64-s1": "REFUTED"}
    check(found, attention_everywhere="REFUTED")
    assert found["attention_everywhere"]["why"].startswith("by task: REFUTED on 1, SUPPORTED on 1")


LENGTH, RANK = 96, 8


def recipe_runs():
    spec, common = base(dataset="dialect_smoke"), {"steps": LENGTH}
    found = arms(spec, (RANK,), **common)
    found += runs(spec, Lora(rank=RANK, alpha=2.0 * RANK), around(LORA), **common)
    for of in ("attention", "attention+mlp"):
        found += runs(spec, Lora(rank=RANK, layers=of), around(2e-4), **common)
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
    lost = CURVATURE * math.log(2e-4 / LORA) ** 2 / (GAIN * math.log2(LENGTH + 1))
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


B_BEHIND = 0.03
TWIN = {"alpha": 8.0, "init_scale": 2.0, "lr_b_ratio": 1.0}
"""The twin of alpha 32, init 1 and one LR by p = q = 2: both LRs are doubled."""


class Rules(World):
    """Under alpha / rank the optimum is free of the rank; B random is behind; twins agree."""

    def __init__(self, broken):
        super().__init__(lambda spec: 0.8, best=self.optimum)
        self.broken = broken

    def optimum(self, spec, step):
        power = {"rank": 0.0, "sqrt_rank": -0.5, "none": -1.0}[spec.method.scaling_by]
        return LORA * spec.method.rank**power

    def loss(self, spec, step):
        if spec.precision == "fp64":
            off = self.broken if spec.eps == 1e-8 and spec.method.init_scale != 1 else 1e-15
            return 3.0 - 0.1 * math.log2(1 + step) + off * spec.method.init_scale
        behind = B_BEHIND if spec.method.random_factor == "b" else 0.0
        return super().loss(spec, step) + behind


def setting_runs():
    spec, found = base(dataset="dialect_smoke"), []
    for rule, power in (("rank", 0), ("sqrt_rank", -0.5), ("none", -1)):
        for rank in (1, 4, 16):
            method = Lora(rank=rank, scaling_by=rule)
            found += runs(spec, method, around(LORA * rank**power), steps=64)
    found += runs(spec, Lora(rank=4, random_factor="b"), around(LORA), steps=64)
    for eps in (1e-30, 1e-8):
        common = {"precision": "fp64", "eps": eps, "steps": 16}
        found += runs(spec, Lora(rank=4), [1e-3], [0], **common)
        found += runs(spec, Lora(rank=4, **TWIN), [2e-3], [0], **common)
    return found


def test_a_pair_of_twins_without_a_loss_is_no_equal_pair():
    (twins,) = [e for e in invariance.ESTIMANDS if e.name == "twin_difference"]
    found = twins.measure(SimpleNamespace(twins=SimpleNamespace(held=[1e-16, math.nan])))
    judged = judge("twins", {"margin": [-1e-6, 1e-6], "expected": 0}, "g", found, [], 0, False)
    assert judged.outcome == "UNDECIDED"


def test_twins_are_compared_up_to_where_one_of_them_diverged():
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
