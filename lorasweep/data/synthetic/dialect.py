"""`dialect`: a language of 32 symbols with known entropy, and a dialect of it to learn.

P(next | a, b, c) comes from low-rank features of the last two symbols and a Zipf prior. In 30% of
the 32^3 contexts, the exceptions, a memorised next symbol has probability mass 0.8. The base model
is pretrained on the language (rule_shift and new_exceptions 0). The dialect changes the feature
rows of some symbols (a shared shift of the rules) and replaces some of the exceptions (a tail of
facts).

With shift_rank 0 the feature rows are drawn again. With shift_rank k a matrix of rank k is added,
scaled to a distance of shift_nats: so the amount of new information varies at a fixed distance.

Shapes: V symbols; a table P_VVVV is P(next | a, b, c).
"""

import dataclasses
import math

import numpy as np

from lorasweep.data.examples import (
    Data,
    Example,
    Parameter,
    Truth,
    generated,
    parameters,
    with_fingerprint,
)
from lorasweep.errors import DataError
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.streams import stream

VOCAB = 32
FEATURES, SHARPNESS = 8, 2.0
"""Rank of the rule, and standard deviation of its logits."""
EXCEPTIONS, MASS = 0.3, 0.8
"""Fraction of contexts with a memorised next symbol, and probability of that symbol."""
PARAMETERS = {
    "rule_shift": Parameter(0.5, 0, 1),  # fraction of symbols with changed feature rows
    "shift_rank": Parameter(0, 0, FEATURES, whole=True),  # 0: the rows are drawn again
    # with shift_rank: KL from the dialect to the language, nats per symbol
    "shift_nats": Parameter(0.3, 1e-4),
    "new_exceptions": Parameter(0.3, 0, 1),  # fraction of the exceptions that are replaced
    # seed of the language; another value is another language with its dialect
    "language": Parameter(0, -math.inf, whole=True),
}
CONTEXT_STEPS = 30
"""Number of symbols after which the context frequencies are stationary, to about 1e-7."""
MAX_SCALE_STEPS = 100
SCALE_PRECISION = 1e-6
"""Largest relative error of shift_nats."""


def load(spec: DatasetSpec, draw: int | None = None) -> Data:
    """Make a dialect. Each number `draw` gives another dialect with the same parameters."""
    parts = parts_of(spec.generator_params, draw)
    table, unshifted = _table(parts), {"rule_shift": 0.0, "new_exceptions": 0.0}
    language = transition({**spec.generator_params, **unshifted})
    length = spec.max_length

    def sequences(rng: np.random.Generator, count: int, table: np.ndarray = table) -> list[Example]:
        tokens = sample(table, rng, count, length)
        loss = np.ones(length, dtype=bool)
        loss[:3] = False  # the first symbols have no full context
        return [Example(tokens=row, loss=loss) for row in tokens]

    retain = sequences(stream("data", spec.name, "retain"), spec.n_retain, language)
    test = sequences(stream("data", spec.name, spec.test_split), spec.n_test)
    rows = np.stack([e.tokens for e in test])
    contexts = (rows[:, :-3], rows[:, 1:-2], rows[:, 2:-1])
    floor = -np.log(table[(*contexts, rows[:, 3:])])
    if spec.exact_loss:
        true, before = table[contexts], language[contexts]
        floor = -(true * np.log(true)).sum(-1)
        changed = (true != before).any(-1)
        test = [
            dataclasses.replace(e, truth=Truth(p.astype(np.float32), c))
            for e, p, c in zip(test, true, changed)
        ]
    data = Data(
        train=generated(spec, sequences),
        test=test,
        n_train=spec.n_train,
        retain=retain,
        entropy_floor_nats=float(floor.mean()),
        bits=lambda n_tokens: bits(parts, n_tokens),
    )
    # rounded to 3 digits, because the last digits of products depend on the processor
    return with_fingerprint(data, table.astype("<f2"))


def transition(params: dict[str, float], draw: int | None = None) -> np.ndarray:
    """Return P(next | a, b, c) as float64 [V, V, V, V]; raise DataError as `parameters` does."""
    return _table(parts_of(params, draw))


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parameters and arrays of a table. Shapes: F features."""

    k: dict[str, float]
    feats_VF: list[np.ndarray]
    """Feature rows of b and of c."""
    out_FV: np.ndarray
    zipf_V: np.ndarray
    is_exception_VVV: np.ndarray
    replaced_VVV: np.ndarray
    memorised_VVV: np.ndarray


def parts_of(params: dict[str, float], draw: int | None = None) -> Parts:
    """Draw the parts of a dialect's table; raise DataError as `parameters` does."""
    k = parameters(params, PARAMETERS, "dialect")
    rank, v, number = FEATURES, VOCAB, int(k["language"])
    old = stream("dialect", number, "language")
    new = stream("dialect", number, "dialect", *(() if draw is None else ("draw", draw)))
    feats = [old.normal(size=(v, rank)), old.normal(size=(v, rank))]
    out = old.normal(size=(rank, v))
    shifted = new.permutation(v)[: round(k["rule_shift"] * v)]
    changes = []
    for table in feats:
        if k["shift_rank"]:
            low = int(k["shift_rank"])
            change = new.normal(size=(len(shifted), low)) @ new.normal(size=(low, rank))
            changes.append(change / np.sqrt(low))
        else:
            table[shifted] = new.normal(size=(len(shifted), rank))
    zipf = -np.log(np.arange(1, v + 1))[old.permutation(v)]
    is_exception = old.random((v, v, v)) < EXCEPTIONS
    memorised = old.integers(v, size=(v, v, v))
    replaced = new.random((v, v, v)) < k["new_exceptions"]
    memorised = np.where(replaced, new.integers(v, size=(v, v, v)), memorised)
    parts = Parts(k, feats, out, zipf, is_exception, is_exception & replaced, memorised)
    if not changes or not len(shifted):
        return parts
    # Add the changes to the shifted rows, scaled to a distance of shift_nats. The KL grows about
    # with the square of a small scale, so each step multiplies the scale by the root of the ratio.
    before = _table(parts)  # with the new exceptions, which do not count in shift_nats
    scale, wanted = 1.0, k["shift_nats"]
    for _ in range(MAX_SCALE_STEPS):
        feats = [table.copy() for table in parts.feats_VF]
        for features, change in zip(feats, changes):
            features[shifted] += scale * change
        moved = dataclasses.replace(parts, feats_VF=feats)
        got = distance(_table(moved), before)
        if abs(got / wanted - 1) < SCALE_PRECISION:
            return moved
        scale = float(f"{scale * math.sqrt(wanted / got):.9g}")
    raise DataError(
        f"generator_params.shift_nats={wanted}: no scale of the change gives this distance. "
        "Allowed: about 0.01 to 1."
    )


def _table(parts: Parts) -> np.ndarray:
    v = VOCAB
    logits = np.einsum("bk,ck,kv->bcv", *parts.feats_VF, parts.out_FV) / np.sqrt(FEATURES)
    logits = SHARPNESS * logits + parts.zipf_V
    rule = np.exp(logits - logits.max(-1, keepdims=True))
    rule /= rule.sum(-1, keepdims=True)
    p = np.broadcast_to(rule, (v, v, v, v)).copy()
    p[parts.is_exception_VVV] *= 1 - MASS
    a, b, c = np.nonzero(parts.is_exception_VVV)
    p[a, b, c, parts.memorised_VVV[a, b, c]] += MASS
    return p


def context_shares(table_VVVV: np.ndarray) -> np.ndarray:
    """Return how often each context (a, b, c) occurs in long sequences, [V, V, V], summing to 1."""
    share = np.full((VOCAB,) * 3, VOCAB**-3.0)
    for _ in range(CONTEXT_STEPS):
        share = np.einsum("abc,abcd->bcd", share, table_VVVV)
    return share


def distance(dialect_VVVV: np.ndarray, language_VVVV: np.ndarray) -> float:
    """Return the KL divergence from the dialect to the language, in nats per symbol."""
    kl = (dialect_VVVV * np.log(dialect_VVVV / language_VVVV)).sum(-1)
    return float((context_shares(dialect_VVVV) * kl).sum())


def bits(parts: Parts, n_tokens: int) -> dict[str, float]:
    """Return the new information in `n_tokens` symbols of the dialect, in bits.

    generator: log2(n_tokens) / 2 for each free parameter of the shift, the precision that n_tokens
    symbols resolve (Rissanen 1978). Each replaced exception adds log2(V), and the set of replaced
    exceptions adds log2 of the number of such sets.
    """
    k = parts.k
    m, low, rank = round(k["rule_shift"] * VOCAB), int(k["shift_rank"]), FEATURES
    # a matrix [m, rank] of rank low has low (m + rank - low) free parameters; there are two
    low = min(low, m) if low else min(rank, m)
    rule = low * (m + rank - low) * math.log2(max(2, n_tokens))
    every, count = int(parts.is_exception_VVV.sum()), int(parts.replaced_VVV.sum())
    which = math.lgamma(every + 1) - math.lgamma(count + 1) - math.lgamma(every - count + 1)
    return {"generator": rule + (count * math.log2(VOCAB) + which / math.log(2))}


def sample(table: np.ndarray, rng: np.random.Generator, count: int, length: int) -> np.ndarray:
    """Draw sequences, int32 [count, length]; their first three symbols are uniform."""
    cumulative = np.cumsum(table, axis=-1)
    cumulative[..., -1] = 1.0
    tokens = np.empty((count, length), dtype=np.int32)
    tokens[:, :3] = rng.integers(VOCAB, size=(count, 3))
    for t in range(3, length):
        rows = cumulative[tokens[:, t - 3], tokens[:, t - 2], tokens[:, t - 1]]
        tokens[:, t] = (rng.random(count)[:, None] > rows).sum(-1)
    return tokens
