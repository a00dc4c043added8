"""`bandit`: contexts with one hidden label each, out of 16: 4 bits a context, and nothing else.

A context is a key in the format of `facts`; the label is its first value symbol. The base model
knows the format, not the labels. The same rows teach the labels by cross-entropy, or by the reward
of a sampled symbol. Held-out rows are the contexts themselves: what is measured is what was learned
of them.
"""

import dataclasses

import numpy as np

from lorasweep.data.examples import Data, Example, Rewards, shuffled
from lorasweep.data.fingerprint import of_generator
from lorasweep.data.rewards import same_tokens
from lorasweep.data.synthetic.facts import KEY, KEYS, SEPARATOR, VALUES, VOCAB
from lorasweep.errors import DataError
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.streams import stream

__all__ = ["VOCAB", "check", "load"]

LENGTH = 1 + KEY + 1
"""Symbols of a row: a separator, the key, the label."""
DEFAULTS = {
    "contexts": 64.0,
    "set": 0.0,  # seed of the contexts and their labels
}


def check(spec: DatasetSpec) -> None:
    """Check the generator parameters and the row length.

    Raises:
        DataError: one is unknown or out of range.
    """
    where = f"dataset {spec.name!r}"
    for key in spec.generator_params:
        if key not in DEFAULTS:
            raise DataError(f"{where}: knobs.{key} is unknown. Allowed: {', '.join(DEFAULTS)}.")
    contexts = {**DEFAULTS, **spec.generator_params}["contexts"]
    if not 1 <= contexts <= KEYS**KEY or contexts % 1:
        raise DataError(
            f"{where}: knobs.contexts={contexts:g}. Allowed: a whole number from 1 to {KEYS**KEY}."
        )
    if spec.max_length < LENGTH:
        raise DataError(f"{where}: max_length={spec.max_length}. Allowed: {LENGTH} or more.")


def load(spec: DatasetSpec) -> Data:
    """Draw the contexts and their labels. The loss covers the label."""
    check(spec)
    params = {**DEFAULTS, **spec.generator_params}
    count, rng = int(params["contexts"]), stream("bandit", int(params["set"]))
    # one after the other from one stream: fewer contexts are the first of more
    numbers = rng.permutation(KEYS**KEY)[:count]
    keys = VALUES + np.stack([numbers // KEYS**k % KEYS for k in range(KEY)], 1)
    labels = rng.integers(VALUES, size=KEYS**KEY)[:count]
    tokens = np.concatenate([np.full((count, 1), SEPARATOR), keys, labels[:, None]], 1)
    loss = np.arange(LENGTH) == LENGTH - 1
    rows = [Example(row, loss) for row in tokens.astype(np.int32)]
    data = Data(
        shuffled(spec, rows),
        rows[: spec.n_test],
        n_train=count,
        entropy_floor_nats=0.0,
        rewards=Rewards(same_tokens, (), exact=True, choices=VALUES),
    )
    return dataclasses.replace(data, sha256=of_generator(data, tokens))
