"""Shipped data sets, each composed once."""

import dataclasses
from functools import cache

from tests.world import compose_request

MODELS = {
    "bandit": "tiny64-knows",
    "facts": "tiny64-facts",
    "skills": "tiny64-skills",
    "words": "tiny64-skills",
}


@cache
def composed(name):
    """Return a run on a shipped data set, with a model that has its symbols."""
    model = [f"model={MODELS[name]}"] if name in MODELS else []
    return compose_request([*model, f"dataset={name}"]).points[0].spec


def shipped(name, /, **changes):
    """Return the spec of a shipped data set with changes."""
    return dataclasses.replace(composed(name).dataset, **changes)
