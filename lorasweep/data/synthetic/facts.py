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

import math

import numpy as np

from lorasweep.data.examples import (
    Data,
    Example,
    Parameter,
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
    # number of facts to store; 0: new facts in every row
    "facts": Parameter(512, 0, KEYS**KEY // 2, whole=True),
    "set": Parameter(0),  # seed of the set of facts
    # share of training rows with facts that never repeat, to pretrain a base that knows some facts
    "fresh": Parameter(0, 0, 1),
}
BANDIT = {
    "contexts": Parameter(64, 1, KEYS**KEY, whole=True),
    "set": Parameter(0),  # seed of the contexts and their labels
}
BANDIT_LENGTH = 1 + KEY + 1
"""Symbols of a row of `bandit`: a separator, the key, the label."""


def check_facts(spec: DatasetSpec) -> dict[str, float]:
    """Return the generator parameters; raise DataError if facts do not fill the rows."""
    where = f"dataset {spec.name!r}"
    params, row = parameters(spec.generator_params, FACTS, where), spec.max_length // FACT
    if spec.max_length % FACT:
        raise DataError(f"{where}: max_length={spec.max_length}. Allowed: a multiple of {FACT}.")
    if params["facts"] % row:
        raise DataError(
            f"{where}: generator_params.facts={params['facts']:g}. Allowed: 0, or a multiple of "
            f"{row}, the facts of a row."
        )
    return params


def load_facts(spec: DatasetSpec) -> Data:
    """Make the facts. The loss covers the values, or with mask=all every symbol but the first."""
    params = check_facts(spec)
    count, row = int(params["facts"]), spec.max_length // FACT
    if not count:

        def draw(rng: np.random.Generator, rows: int) -> list[Example]:
            keys = rng.integers(VALUES, VALUES + KEYS, size=(rows * row, KEY))
            return _rows(keys, rng.integers(VALUES, size=(rows * row, VALUE)), spec)

        test = draw(stream("data", spec.name, spec.test_split), spec.n_test)
        data = Data(generated(spec, draw), test, n_train=None)
        return with_fingerprint(data, "new facts in every row")
    rng = stream("facts", int(params["set"]))
    unseen = spec.n_retain * row
    if count + unseen > KEYS**KEY:
        raise DataError(
            f"dataset {spec.name!r}: n_retain={spec.n_retain}, and there are {KEYS**KEY} keys: "
            f"{count} for facts, {row} a row. Lower n_retain or generator_params.facts."
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


def load_bandit(spec: DatasetSpec, draw: int | None = None) -> Data:
    """Draw the contexts and their labels; the loss covers the label.

    Each number `draw` gives other contexts and labels.
    """
    params = parameters(spec.generator_params, BANDIT, f"dataset {spec.name!r}")
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
    return with_fingerprint(data, tokens)
