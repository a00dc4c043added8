"""`dialect`: a language of 32 symbols with known entropy, and a dialect of it to learn.

P(next | a, b, c) comes from low-rank features of the last two symbols and a Zipf prior. In 30% of
the 32^3 contexts a memorised next symbol has probability mass 0.8. The base model is pretrained on
the language (rule_shift and new_exceptions 0). The dialect draws new feature rows for some symbols
(a shared shift of the rules) and replaces some of the exceptions (a tail of facts).
"""

import dataclasses

import numpy as np

from lorasweep.data.examples import Data, Example, generated
from lorasweep.data.fingerprint import of_generator, rounded
from lorasweep.errors import DataError
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.streams import stream

VOCAB = 32
DEFAULTS = {
    "rule_shift": 0.5,  # fraction of symbols with new feature rows
    "new_exceptions": 0.3,  # fraction of the exceptions that are replaced
    "exceptions": 0.3,  # fraction of contexts with a memorised next symbol
    "mass": 0.8,  # probability of a memorised symbol
    "sharpness": 2.0,  # standard deviation of the rule's logits
    "features": 8.0,  # rank of the rule
    "language": 0.0,  # seed of the language; another value is another language with its dialect
}


def load(spec: DatasetSpec) -> Data:
    """Make the language of `spec.generator_params`, its held-out sequences and their entropy."""
    table = transition(spec.generator_params, where=f"dataset {spec.name!r}")
    length = spec.max_length

    def draw(rng: np.random.Generator, count: int, table: np.ndarray = table) -> list[Example]:
        tokens = sample(table, rng, count, length)
        loss = np.ones(length, dtype=bool)
        loss[:3] = False  # the first symbols have no full context
        return [Example(tokens=row, loss=loss) for row in tokens]

    retain: list[Example] = []
    if spec.n_retain:
        language = transition({**spec.generator_params, "rule_shift": 0.0, "new_exceptions": 0.0})
        retain = draw(stream("data", spec.name, "retain"), spec.n_retain, language)

    test = draw(stream("data", spec.name, spec.test_split), spec.n_test)
    rows = np.stack([e.tokens for e in test])
    p = table[rows[:, :-3], rows[:, 1:-2], rows[:, 2:-1], rows[:, 3:]]
    data = Data(
        train=generated(spec, spec.train_split, draw),
        test=test,
        n_train=spec.n_train,
        retain=retain,
        entropy_floor_nats=float(-np.log(p).mean()),
    )
    return dataclasses.replace(data, sha256=of_generator(data, rounded(table)))


def check(spec: DatasetSpec) -> None:
    """Check the generator parameters.

    Raises:
        DataError: one is unknown or out of range.
    """
    _checked(spec.generator_params, f"dataset {spec.name!r}")


def transition(params: dict[str, float], where: str = "dialect") -> np.ndarray:
    """Return P(next | a, b, c) as float64 [32, 32, 32, 32], rows summing to 1."""
    k = _checked(params, where)
    rank, v, number = int(k["features"]), VOCAB, int(k["language"])
    old, new = stream("dialect", number, "language"), stream("dialect", number, "dialect")

    feats = [old.normal(size=(v, rank)), old.normal(size=(v, rank))]  # of b and of c
    out = old.normal(size=(rank, v))
    shifted = new.permutation(v)[: round(k["rule_shift"] * v)]
    for table in feats:
        table[shifted] = new.normal(size=(len(shifted), rank))
    logits = np.einsum("bk,ck,kv->bcv", feats[0], feats[1], out) / np.sqrt(rank)
    zipf = -np.log(np.arange(1, v + 1))[old.permutation(v)]
    logits = k["sharpness"] * logits + zipf
    rule = np.exp(logits - logits.max(-1, keepdims=True))
    rule /= rule.sum(-1, keepdims=True)

    is_exception = old.random((v, v, v)) < k["exceptions"]
    memorised = old.integers(v, size=(v, v, v))
    replaced = new.random((v, v, v)) < k["new_exceptions"]
    memorised = np.where(replaced, new.integers(v, size=(v, v, v)), memorised)
    p = np.broadcast_to(rule, (v, v, v, v)).copy()
    p[is_exception] *= 1 - k["mass"]
    a, b, c = np.nonzero(is_exception)
    p[a, b, c, memorised[a, b, c]] += k["mass"]
    return p


def _checked(params: dict[str, float], where: str) -> dict[str, float]:
    for key in params:
        if key not in DEFAULTS:
            raise DataError(f"{where}: knobs.{key} is unknown. Allowed: {', '.join(DEFAULTS)}.")
    k = {**DEFAULTS, **params}
    for key in ("rule_shift", "new_exceptions", "exceptions", "mass"):
        if not 0 <= k[key] <= 1:
            raise DataError(f"{where}: knobs.{key}={k[key]}. Allowed: 0 to 1.")
    if k["features"] < 1:
        raise DataError(f"{where}: knobs.features={k['features']}. Allowed: 1 or more.")
    return k


def sample(table: np.ndarray, rng: np.random.Generator, count: int, length: int) -> np.ndarray:
    """Draw sequences, int32 [count, length]; the first three symbols are uniform."""
    cumulative = np.cumsum(table, axis=-1)
    cumulative[..., -1] = 1.0
    tokens = np.empty((count, length), dtype=np.int32)
    tokens[:, :3] = rng.integers(VOCAB, size=(count, 3))
    for t in range(3, length):
        rows = cumulative[tokens[:, t - 3], tokens[:, t - 2], tokens[:, t - 1]]
        tokens[:, t] = (rng.random(count)[:, None] > rows).sum(-1)
    return tokens
