"""`capacity`, `compute` and `experts` on planted runs: bits, operations, readings of the rank."""

import dataclasses
import math

import numpy as np
import pytest

from analysis.questions import capacity, compute
from analysis.runs.table import TableError
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.methods.lora import LoRA as Lora
from tests import planted
from tests.planted import (
    FULL,
    GAIN,
    LORA,
    World,
    arms,
    ask,
    base,
    check,
    facts,
    runs,
)

pytestmark = pytest.mark.slow  # fits dozens of curves

ONE = LoRA(rank=1, layers="attention")
PARAMETERS = 4 * (127 + 79 + 79 + 127)  # r (m + n) - r^2 of the four attention matrices


@pytest.mark.parametrize(("bits", "outcome"), [(2.0, "SUPPORTED"), (0.5, "REFUTED")])
def test_capacity(bits, outcome, tmp_path):
    sweep, world, specs = facts(lambda updates: bits)
    _, found = ask(sweep, world, specs, tmp_path if bits == 2 else None)
    check(found, two_bits=(outcome, pytest.approx(bits, rel=0.05)), no_leak="SUPPORTED")
    other = runs(specs[0], dataclasses.replace(ONE, rank=4), [1e-2], steps=400)
    with pytest.raises(TableError, match="LoRA has the ranks 1, 4, but bits a parameter need one"):
        ask(sweep, world, [*specs, *other])


def test_effective_parameters_count_each_matrix_once():
    spec = runs(base(), ONE, [1e-3], [0])[0]
    assert capacity.effective(spec.plain()) == PARAMETERS == 1648
    assert capacity.bits(0.0, 10) == pytest.approx(160) and capacity.bits(math.log(16), 10) == 0


def ask_compute(world, folder=None):
    return ask("compute", world, arms(base(dataset="dialect_smoke"), (1,), steps=384), folder)


def seconds(lora, spread):
    """Seconds per update: 0.1 of full fine-tuning, with noise up to a factor `spread`."""

    def more(spec):
        noise = np.random.default_rng(int(spec.id, 16)).uniform(1.0, spread)
        return {"step_s": (0.1 if spec.method.name == "fullft" else lora) * noise}

    return more


def updates(found):
    to_loss, per_step = (found[k]["estimate"]["value"] for k in ("flops_to_loss", "flops_a_step"))
    return to_loss / per_step


@pytest.mark.parametrize(("rho", "outcome"), [(1.0, "SUPPORTED"), (0.5, "REFUTED")])
def test_compute(rho, outcome, tmp_path):
    world = World(lambda s: rho, more=seconds(0.07, 1.02))
    _, found = ask_compute(world, tmp_path if rho == 1 else None)
    seconds_to_loss = pytest.approx(0.7 / rho, rel=0.1)
    check(found, seconds_a_step="SUPPORTED", seconds_to_loss=seconds_to_loss, flops_to_loss=outcome)


def test_lora_has_the_optimum_of_short_runs_as_well_where_both_count_to_one_loss():
    """At the optimum of whole runs, LoRA would need three quarters more updates."""

    def best(spec, step):
        return FULL if spec.method.name == "fullft" else LORA * (4.0 if step <= 96 else 1.0)

    _, found = ask_compute(World(lambda s: 1.0, best))
    assert updates(found) == pytest.approx(1.0, rel=0.08)


@pytest.mark.parametrize(("rho", "length"), [(0.6, 128), (0.28, 256), (0.2, 384)])
def test_the_length_at_which_lora_reaches_the_loss(rho, length):
    """Full fine-tuning's loss after 64 of 384 updates; the last evaluation before the end: 256."""
    out, found = ask_compute(World(lambda s: rho))
    assert out["lengths"] == {"1": length}
    assert updates(found) == pytest.approx(1 / rho if length < 384 else 256 / 51, rel=0.08)


@pytest.mark.parametrize("rank", [1, 16])
def test_operations_are_those_of_the_methods(rank):
    spec, method = base("smollm2-135m-instruct"), LoRA(rank=rank)
    found = compute.flops_ratio(spec.plain(), method.n_trainable(spec.model))
    counted = (m.step_flops(spec.model, 100) for m in (method, FullFT()))
    assert found == pytest.approx(next(counted) / next(counted))


TOKENS = [[10, 20, 30, 40], [25, 25, 25, 25]]
METHODS = {
    "active": Lora(rank=8, layers="mlp"),
    "all": Lora(rank=8, layers="mlp", expert_rank="all"),
    "whole": Lora(rank=8, layers="mlp", expert_rank="whole"),
    "shared": Lora(rank=8, layers="mlp", expert_rank="whole", expert_outer="shared"),
    "divided_alpha": Lora(rank=8, layers="mlp", expert_alpha=16.0),
}


def reading_runs():
    spec = base("tiny64-experts", "dialect_smoke")
    found = planted.arms(spec, (), seeds=range(4), steps=64)
    for method in METHODS.values():
        found += planted.runs(spec, method, planted.around(LORA), steps=64)
    return found


class Readings(World):
    """LoRA lies `behind[reading]` of the gain behind full fine-tuning, at `best[reading]` times LORA."""

    def __init__(self, behind, best):
        super().__init__(
            lambda spec: 1.0,
            best=lambda s, step: FULL if s.method.name == "fullft" else LORA * of(best, s, 1.0),
            more=lambda spec: {"expert_tokens": TOKENS, "n_trainable": 1000},
        )
        self.behind = behind

    def loss(self, spec, step):
        gap = of(self.behind, spec, 0.0)
        return super().loss(spec, step) + gap * GAIN * math.log2(1 + spec.steps)


def of(values, spec, default):
    name = next((r for r, method in METHODS.items() if method == spec.method), "")
    return values.get(name, default)


def test_planted_gaps_and_optima_come_back(tmp_path):
    world = Readings({"all": 0.1, "shared": -0.02}, {"divided_alpha": 2.0})
    _, verdicts = ask("experts", world, reading_runs(), tmp_path)
    refuted = {"all_experts", "ratio", "same_scale"}  # planted ratio: 2
    outcomes = {name: v["outcome"] for name, v in verdicts.items()}
    assert outcomes == {k: "REFUTED" if k in refuted else "SUPPORTED" for k in outcomes}
    ratios = {"ratio": 2, "one_rate": 1, "same_scale": 2}
    check(verdicts, **{name: pytest.approx(v, rel=0.15) for name, v in ratios.items()})
    gain = GAIN * math.log2(65)
    check(verdicts, all_experts=pytest.approx(0.05 * gain, abs=0.005 * gain))
    text = (tmp_path / "report.md").read_text()
    assert (
        "| divided alpha |" in text and "| full fine-tuning | 0 | 10.0% | 40.0% | 25.0% |" in text
    )


def test_two_curves_of_one_variant_are_refused_and_a_missing_one_is_named():
    some = [s for s in reading_runs() if s.method != METHODS["whole"]]
    _, verdicts = ask("experts", Readings({}, {}), some)
    assert verdicts["whole"]["why"] == "no curve of whole"
    twice = planted.runs(some[0], dataclasses.replace(METHODS["all"], rank=16), [LORA], steps=64)
    with pytest.raises(TableError, match="2 curves are 'all'"):
        ask("experts", Readings({}, {}), [*some, *twice])
