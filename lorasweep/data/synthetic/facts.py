"""Random keys with random values: `facts` to be stored, and a `bandit` to be learned from rewards.

facts: keys of three symbols with values of four symbols out of 16. A value has exactly 16 bits, to
measure how much a method can store. The base model knows the format (facts=0), or also a fixed set
of facts (facts, set, fresh). The NLL of new values under the base is ln 16 per symbol; each bit
below that was stored. Held-out rows are the trained facts. Rows of `n_retain` hold facts that are
never trained.

bandit: keys with one hidden label out of 16, so 4 bits per context. The base model knows the
format, not the labels. The same rows teach labels by cross-entropy, or by the reward of a sampled
symbol. Held-out rows are the trained contexts. With draw_by_seed, each seed has its own contexts
and labels.
"""

import dataclasses
import math

import numpy as np

from lorasweep.data.examples import (
    Data,
    Example,
    Rewards,
    generated,
    parameters,
    same_tokens,
    shuffled,
    with_fingerprint,
)
from lorasweep.errors import DataError
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.streams import stream

VALUES, KEYS, SEPARATOR = 16, 31, 47
VOCAB = 48
KEY, VALUE = 3, 4
FACT = 1 + KEY + VALUE
"""Symbols per fact: a separator, the key, the value."""
FACTS = {
    "facts": 512.0,  # number of facts to store; 0: new facts in every row
    "set": 0.0,  # seed of the set of facts
    # share of training rows with facts that never repeat, to pretrain a base that knows some facts
    "fresh": 0.0,
}
BANDIT = {
    "contexts": 64.0,
    "set": 0.0,  # seed of the contexts and their labels
}
BANDIT_LENGTH = 1 + KEY + 1
"""Symbols of a row of `bandit`: a separator, the key, the label."""


def check_facts(spec: DatasetSpec) -> None:
    """Check the generator parameters and the row length."""
    where, params = f"dataset {spec.name!r}: ", parameters(spec, FACTS)
    count, fresh, row = params["facts"], params["fresh"], spec.max_length // FACT
    if spec.max_length % FACT:
        raise DataError(
            f"{where}max_length={spec.max_length}. Allowed: a multiple of {FACT} (symbols per "
            "fact)."
        )
    if not 0 <= fresh <= 1:
        raise DataError(f"{where}generator_params.fresh={fresh:g}. Allowed: 0 to 1.")
    if count < 0 or count % row or count > KEYS**KEY // 2:
        raise DataError(
            f"{where}generator_params.facts={count:g}. Allowed: 0, or a multiple of {row} (the "
            f"facts per row) up to {KEYS**KEY // 2}."
        )


def load_facts(spec: DatasetSpec) -> Data:
    """Make the facts. The loss covers the values, or with mask=all every symbol but the first."""
    check_facts(spec)
    params = parameters(spec, FACTS)
    count, row = int(params["facts"]), spec.max_length // FACT
    if not count:

        def draw(rng: np.random.Generator, rows: int) -> list[Example]:
            keys = rng.integers(VALUES, VALUES + KEYS, size=(rows * row, KEY))
            return _rows(keys, rng.integers(VALUES, size=(rows * row, VALUE)), spec)

        test = draw(stream("data", spec.name, spec.test_split), spec.n_test)
        data = Data(generated(spec, spec.train_split, draw), test, n_train=None)
        return with_fingerprint(data, "new facts in every row")
    rng = stream("facts", int(params["set"]))
    unseen = spec.n_retain * row
    if count + unseen > KEYS**KEY:
        raise DataError(
            f"dataset {spec.name!r}: n_retain={spec.n_retain} leaves too few keys for {count} "
            f"facts. There are {KEYS**KEY} keys, and each row needs {row}: lower n_retain or "
            "generator_params.facts."
        )
    number = rng.permutation(KEYS**KEY)[: count + unseen]
    keys = VALUES + np.stack([number // KEYS**k % KEYS for k in range(KEY)], 1)
    values = rng.integers(VALUES, size=(count + unseen, VALUE))

    def train(seed: int, start: int, rows: int) -> list[Example]:
        """Serve each fact once per epoch, in a new order; an epoch may end inside a row."""
        order = np.arange(start * row, (start + rows) * row)
        epochs = {
            int(e): stream("data", spec.name, spec.train_split, seed, int(e)).permutation(count)
            for e in np.unique(order // count)
        }
        picked = np.array([epochs[p // count][p % count] for p in order.tolist()])
        shown_keys, shown_values = keys[picked], values[picked]
        for k in range(rows if params["fresh"] else 0):
            # one stream per row, so that a row is the same in every batch
            rng = stream("data", spec.name, spec.train_split, "fresh", seed, start + k)
            if rng.random() < params["fresh"]:
                here = slice(k * row, (k + 1) * row)
                shown_keys[here] = rng.integers(VALUES, VALUES + KEYS, size=(row, KEY))
                shown_values[here] = rng.integers(VALUES, size=(row, VALUE))
        return _rows(shown_keys, shown_values, spec)

    def bits(n_tokens: int) -> dict[str, float]:
        """Return the bits in the values of the facts seen in `n_tokens` loss tokens."""
        return {"generator": min(count, n_tokens // VALUE) * VALUE * math.log2(VALUES)}

    shown = stream("data", spec.name, spec.test_split).permutation(count)[: spec.n_test * row]
    data = Data(
        train,
        _rows(keys[shown], values[shown], spec),
        n_train=count // row,
        retain=_rows(keys[count:], values[count:], spec),
        entropy_floor_nats=0.0,
        bits=None if params["fresh"] or spec.mask == "all" else bits,
    )
    distribution = (f"fresh {params['fresh']}", keys[:count], values[:count])
    return with_fingerprint(data, *distribution)


def _rows(keys: np.ndarray, values: np.ndarray, spec: DatasetSpec) -> list[Example]:
    facts = np.concatenate([np.full((len(keys), 1), SEPARATOR), keys, values], 1).astype(np.int32)
    row = spec.max_length // FACT
    loss = np.tile(np.arange(FACT) > KEY, row)
    if spec.mask == "all":
        loss = np.arange(spec.max_length) > 0
    return [Example(tokens=tokens, loss=loss) for tokens in facts.reshape(-1, spec.max_length)]


def check_bandit(spec: DatasetSpec) -> None:
    """Check the generator parameters and the row length."""
    where, contexts = f"dataset {spec.name!r}: ", parameters(spec, BANDIT)["contexts"]
    if not 1 <= contexts <= KEYS**KEY or contexts % 1:
        raise DataError(
            f"{where}generator_params.contexts={contexts:g}. Allowed: a whole number from 1 to "
            f"{KEYS**KEY}."
        )
    if spec.max_length < BANDIT_LENGTH:
        raise DataError(f"{where}max_length={spec.max_length}. Allowed: {BANDIT_LENGTH} or more.")


def load_bandit(spec: DatasetSpec, draw: int | None = None) -> Data:
    """Draw the contexts and their labels; the loss covers the label.

    Each number `draw` gives other contexts and labels, with the fingerprint of the data without a
    draw.
    """
    check_bandit(spec)
    params = parameters(spec, BANDIT)
    count = int(params["contexts"])
    rng = stream("bandit", int(params["set"]), *(() if draw is None else ("draw", draw)))
    # drawn in order from one stream: a smaller number of contexts has the first ones of a larger
    numbers = rng.permutation(KEYS**KEY)[:count]
    keys = VALUES + np.stack([numbers // KEYS**k % KEYS for k in range(KEY)], 1)
    labels = rng.integers(VALUES, size=KEYS**KEY)[:count]
    tokens = np.concatenate([np.full((count, 1), SEPARATOR), keys, labels[:, None]], 1)
    loss = np.arange(BANDIT_LENGTH) == BANDIT_LENGTH - 1
    rows = [Example(row, loss) for row in tokens.astype(np.int32)]
    data = Data(
        shuffled(spec, rows),
        rows[: spec.n_test],
        n_train=count,
        entropy_floor_nats=0.0,
        rewards=Rewards(same_tokens, (), exact=True, choices=VALUES),
    )
    if draw is None:
        return with_fingerprint(data, tokens)
    return dataclasses.replace(data, sha256=load_bandit(spec).sha256)
