"""Small runs that are rewarded, in float64: a bandit, and new words for old skills."""

import dataclasses

from lorasweep.data import load as data
from lorasweep.methods.lora import LoRA
from lorasweep.models import load as models
from tests.world import compose_request

SIZES = {
    "bandit": (*("model=tiny64-knows", "batch_size=64", "group_size=8"), "max_new_tokens=1"),
    "words": (*("model=tiny64-skilled", "batch_size=64", "group_size=8"), "max_new_tokens=6"),
}


def rewarded_spec(name, **changes):
    """A run of six updates; fields by keyword."""
    common = ("objective=policy_gradient", "precision=fp64", "steps=6", "lr=2e-3")
    spec = compose_request([f"dataset={name}", *SIZES[name], *common]).points[0].spec
    short = dataclasses.replace(spec.dataset, n_test=32, n_test_curve=16)
    return dataclasses.replace(spec, **{"dataset": short, "method": LoRA(rank=4), **changes})


def world(name, **changes):
    """A run, its base and its data."""
    spec = rewarded_spec(name, **changes)
    return spec, models.load(spec.model, ["models"], spec.precision), data.load(spec.dataset, [])
