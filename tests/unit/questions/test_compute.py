"""`compute` on planted runs: operations and seconds to one loss."""

import numpy as np
import pytest

from analysis.questions import compute
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from tests.planted import FULL, GRIDS, LORA, World
from tests.world import compose_request

pytestmark = pytest.mark.slow  # sweeps of hundreds of planted runs


@pytest.mark.parametrize(("rho", "outcome"), [(1.0, "SUPPORTED"), (0.5, "REFUTED")])
def test_compute(ask, rho, outcome):
    seconds = {"fullft": 0.10, "lora": 0.07}

    def more(spec):
        noise = np.random.default_rng(int(spec.id, 16)).uniform(1.0, 1.02)
        return {"step_s": seconds[spec.method.name] * noise}

    _out, found = ask(
        "compute",
        World(lambda s: rho, more=more),
        *GRIDS,
        "sweep.arms.lora.rank=[1]",
        "sweep.axes.steps=384",
        report=outcome == "SUPPORTED",
    )
    assert found["seconds_a_step"]["outcome"] == "SUPPORTED"
    assert found["seconds_to_loss"]["estimate"]["value"] == pytest.approx(0.7 / rho, rel=0.1)
    assert found["flops_to_loss"]["outcome"] == outcome


def test_lora_has_the_best_rate_of_short_runs_as_well_where_both_count_to_one_loss(ask):
    """At a rate that is best for whole runs, LoRA would need three quarters as many updates again."""

    def best(spec, step):
        whole = FULL if spec.method.name == "fullft" else LORA
        return whole * (4.0 if spec.method.name == "lora" and step <= 96 else 1.0)

    _out, found = ask(
        "compute",
        World(lambda s: 1.0, best),
        *GRIDS,
        "sweep.arms.lora.rank=[1]",
        "sweep.axes.steps=384",
        "sweep.replicate.n_lrs=7",
    )
    steps = found["flops_to_loss"]["estimate"]["value"] / found["flops_a_step"]["estimate"]["value"]
    assert steps == pytest.approx(1.0, rel=0.08)


@pytest.mark.parametrize(("rho", "length"), [(0.5, 128), (0.28, 256), (0.2, 384)])
def test_the_length_at_which_lora_gets_to_the_loss(ask, rho, length):
    """Full fine-tuning's loss after 64 of 384 updates; the last evaluation before the end is at
    256."""
    out, found = ask(
        "compute",
        World(lambda s: rho),
        *GRIDS,
        "sweep.arms.lora.rank=[1]",
        "sweep.axes.steps=384",
    )
    assert out["lengths"] == {"1": length}
    steps = found["flops_to_loss"]["estimate"]["value"] / found["flops_a_step"]["estimate"]["value"]
    assert steps == pytest.approx(1 / rho if length < 384 else 256 / 51, rel=0.08)


def test_times_of_a_busy_machine_decide_nothing(ask):
    def more(spec):
        return {"step_s": 0.1 * np.random.default_rng(int(spec.id, 16)).uniform(1.0, 4.0)}

    _, found = ask(
        "compute",
        World(lambda s: 1.0, more=more),
        *GRIDS,
        "sweep.arms.lora.rank=[1]",
        "sweep.axes.steps=384",
    )
    assert (
        found["seconds_a_step"]["outcome"] == "UNDECIDED"
        and "quiet machine" in found["seconds_a_step"]["needed"]
    )
    assert found["flops_to_loss"]["outcome"] == "SUPPORTED"  # operations do not hang on the machine


def test_operations_are_those_of_the_methods():
    model = compose_request(["model=smollm2-135m-instruct", "method=lora"]).points[0].spec
    for r in (1, 16):
        method = LoRA(rank=r)
        plain = model.plain()
        told = compute.flops_ratio(plain, method.n_trainable(model.model))
        assert told == pytest.approx(
            method.step_flops(model.model, 100) / FullFT().step_flops(model.model, 100)
        )
