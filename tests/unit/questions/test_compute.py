"""`compute` on planted runs: operations and seconds to one loss."""

import numpy as np
import pytest

from analysis.questions import compute
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from tests.planted import FULL, LORA, World, arms, ask, base, check

pytestmark = pytest.mark.slow  # fits dozens of curves


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
