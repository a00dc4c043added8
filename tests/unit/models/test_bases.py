"""The shipped bases."""

import dataclasses
import math

import pytest

from lorasweep.data import load as data
from lorasweep.data.batches import eval_batches
from lorasweep.methods.lora import LoRA
from lorasweep.models import load as models
from lorasweep.train.objectives.held_out import evaluate
from tests.world import tiny_spec


@pytest.fixture(scope="module")
def world():
    spec = tiny_spec(precision="fp64", method=LoRA(rank=4), lr=5e-3, steps=6)
    return spec, models.load(spec.model, ["/nonexistent"], "fp64"), data.load(spec.dataset, [])


pytestmark = pytest.mark.usefixtures("norms_in_float64")


def test_shipped_base_is_near_its_floor_and_far_from_the_dialects(world):
    """The base knows its language; the dialect is a task: its NLL starts at least 0.3 above the
    floor."""
    spec, base, dataset = world
    start = evaluate(base.model, [eval_batches(dataset.test, 4096)], "fp64")[0]
    language = data.load(
        dataclasses.replace(
            spec.dataset, generator_params={"rule_shift": 0.0, "new_exceptions": 0.0}
        ),
        [],
    )
    known = evaluate(base.model, [eval_batches(language.test, 4096)], "fp64")[0]
    assert known - language.entropy_floor_nats < 0.25
    assert start - dataset.entropy_floor_nats > 0.3
    assert math.isfinite(start)
