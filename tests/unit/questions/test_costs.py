"""`capacity` and `compute` on planted runs: bits a parameter, operations and seconds to one loss."""

import math

import numpy as np
import pytest

from analysis.questions import capacity, compute
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from tests.planted import FULL, LORA, World, arms, around, ask, base, check, runs

pytestmark = pytest.mark.slow  # fits dozens of curves

# ---------------------------------------------------------------- capacity

ONE = LoRA(rank=1, layers="attention")
PARAMETERS = 4 * (127 + 79 + 79 + 127)  # r (m + n) - r^2 of the four attention matrices


@pytest.mark.parametrize(("bits", "outcome"), [(2.0, "SUPPORTED"), (0.5, "REFUTED")])
def test_capacity(bits, outcome, tmp_path):
    class Facts(World):
        def loss(self, spec, step):
            facts = spec.plain()["dataset"]["knobs"]["facts"]
            full = spec.method.name == "fullft"
            stored = 16 * facts if full else min(16 * facts, bits * PARAMETERS)
            noise = np.random.default_rng(int(spec.id, 16)).normal(0, 1e-3)
            off = 0.05 * math.log(spec.lr / (3e-3 if full else 1e-2)) ** 2
            return math.log(16) - stored / facts / 4 * math.log(2) + off + noise

    spec = base("tiny64-facts", "facts", facts=512.0)
    specs = [
        s
        for steps in (200, 400)
        for method, best in ((FullFT(), 3e-3), (ONE, 1e-2))
        for s in runs(spec, method, around(best, 3), steps=steps)
    ]
    world = Facts(more=lambda s: {"retain_nll": 3.0, "retain_start": math.log(16)})
    _, found = ask("capacity", world, specs, tmp_path if bits == 2 else None)
    check(found, two_bits=(outcome, pytest.approx(bits, rel=0.05)), no_leak="SUPPORTED")


def test_effective_parameters_count_each_matrix_once():
    spec = runs(base(), ONE, [1e-3], [0])[0]
    assert capacity.effective(spec.plain()) == PARAMETERS == 1648
    assert capacity.bits(0.0, 10) == pytest.approx(160) and capacity.bits(math.log(16), 10) == 0


# ---------------------------------------------------------------- compute


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


def test_times_of_a_busy_machine_decide_nothing():
    _, found = ask_compute(World(lambda s: 1.0, more=seconds(0.1, 4.0)))
    assert [g["code"] for g in found["seconds_a_step"]["gates"]] == ["BUSY"]
    check(found, flops_to_loss="SUPPORTED")  # counted, not timed


@pytest.mark.parametrize("rank", [1, 16])
def test_operations_are_those_of_the_methods(rank):
    spec, method = base("smollm2-135m-instruct"), LoRA(rank=rank)
    found = compute.flops_ratio(spec.plain(), method.n_trainable(spec.model))
    counted = (m.step_flops(spec.model, 100) for m in (method, FullFT()))
    assert found == pytest.approx(next(counted) / next(counted))
