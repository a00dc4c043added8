"""Data sets as token sequences with a loss mask: loading a split, and the order in which it is
seen.

Knows sources and order. Refuses to know methods and learning rates: every arm asks for example i of
(data set, split, seed) and gets the same one. Needs numpy, and a tokenizer for text; no torch.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorasweep.errors import DataError, unknown
from lorasweep.spec.run import DatasetSpec


@dataclass(frozen=True)
class Example:
    """One sequence. tokens: int32 [T]. loss: bool [T]; loss[t] says that predicting tokens[t]
    counts."""

    tokens: np.ndarray
    loss: np.ndarray
    n_bytes: int | None = None
    """UTF-8 bytes of the text that bears loss; None where tokens are no text."""


@dataclass(frozen=True)
class Data:
    """A loaded data set: training examples by index and seed, and the held-out examples."""

    train: Callable[[int, int, int], list[Example]]
    """(seed, start, count) -> the training examples start .. start+count-1 of that seed's order."""
    test: Sequence[Example]
    n_train: int | None
    """Rows in the training split; None: unlimited (generated)."""
    retain: Sequence[Example] = ()
    """Held-out examples of what the base was pretrained on: what fine-tuning may make it forget."""
    floor_nats: float | None = None
    """Mean -log p of the test tokens under the generator itself: the lowest NLL there is, in nats.
    """


def stream(*names: object) -> np.random.Generator:
    """Make the random stream of this name: the same names give the same numbers, on any machine."""
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def load(spec: DatasetSpec, data_dirs: Sequence[str], tokenizer: Any = None) -> Data:
    """Load a data set. `tokenizer` is needed for text, and not looked at for synthetic tokens."""
    if spec.source == "synthetic":
        return _generator(spec.location).load(spec)
    from lorasweep.data import text

    if tokenizer is None:
        raise DataError(
            f"dataset {spec.name!r} is text, but the model has no tokenizer. Use a model with one "
            "(source hub, folder or gguf), or a synthetic data set (dialect, skills)."
        )
    train = text.examples(spec, spec.train_split, data_dirs, tokenizer, spec.n_train)
    test = text.examples(spec, spec.test_split, data_dirs, tokenizer, spec.n_test)
    return Data(train=_shuffled(spec, train), test=test, n_train=len(train))


def check_available(spec: DatasetSpec, data_dirs: Sequence[str]) -> None:
    """Raise DataError if a data set of local files is not there (saying how to get it) or a row is
    unreadable.

    Needs no tokenizer: whether a row has a token that bears loss is seen when the split is loaded.
    """
    if spec.source == "synthetic":
        _generator(spec.location).check(spec)
    elif spec.source == "jsonl":
        from lorasweep.data import text

        for split in (spec.train_split, spec.test_split):
            text.check_jsonl(spec, split, data_dirs)


def generator_vocab(spec: DatasetSpec) -> int | None:
    """Return the number of symbols of a synthetic data set; None for text."""
    return _generator(spec.location).VOCAB if spec.source == "synthetic" else None


def _generator(name: str) -> Any:
    from lorasweep.data.synthetic import dialect, facts, skills

    known = {"dialect": dialect, "facts": facts, "skills": skills}
    if name not in known:
        raise DataError(unknown("synthetic data set", name, known))
    return known[name]


def _shuffled(
    spec: DatasetSpec, rows: Sequence[Example]
) -> Callable[[int, int, int], list[Example]]:
    """Give rows in a new order each epoch; the order depends on (data set, split, seed) alone."""
    orders: dict[tuple[int, int], np.ndarray] = {}

    def train(seed: int, start: int, count: int) -> list[Example]:
        picked = []
        for i in range(start, start + count):
            epoch, k = divmod(i, len(rows))
            if (seed, epoch) not in orders:
                rng = stream("data", spec.name, spec.train_split, seed, epoch)
                orders[seed, epoch] = rng.permutation(len(rows))
            picked.append(rows[orders[seed, epoch][k]])
        return picked

    return train


CHUNK = 256
"""Generated sequences are drawn in chunks of this many, so that example i needs no earlier example.
"""


def generated(
    spec: DatasetSpec, split: str, draw: Callable[[np.random.Generator, int], list[Example]]
) -> Callable[[int, int, int], list[Example]]:
    """Give generated examples by index: chunk k of a seed is drawn from its own named stream.

    With `n_train` there are that many rows, the same for every seed, in a new order each epoch.
    """
    if spec.n_train is not None:
        return _shuffled(spec, draw(stream("data", spec.name, split, "rows"), spec.n_train))
    kept: dict[tuple[int, int], list[Example]] = {}

    def train(seed: int, start: int, count: int) -> list[Example]:
        picked = []
        for i in range(start, start + count):
            chunk, k = divmod(i, CHUNK)
            if (seed, chunk) not in kept:
                while len(kept) >= 64:
                    kept.pop(next(iter(kept)))
                kept[seed, chunk] = draw(stream("data", spec.name, split, seed, chunk), CHUNK)
            picked.append(kept[seed, chunk][k])
        return picked

    return train
