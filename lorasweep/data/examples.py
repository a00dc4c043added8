"""Examples, and the order in which they are seen.

Refuses to know methods and learning rates: every arm asks for example i of (data set, split, seed)
and gets the same one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.streams import stream

CHUNK = 256
"""Generated sequences are drawn in chunks of this many, so that example i needs no earlier example.
"""


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
    entropy_floor_nats: float | None = None
    """Mean -log p of the test tokens under the generator itself: the lowest NLL there is, in nats.
    """


def shuffled(
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


def generated(
    spec: DatasetSpec, split: str, draw: Callable[[np.random.Generator, int], list[Example]]
) -> Callable[[int, int, int], list[Example]]:
    """Give generated examples by index: chunk k of a seed is drawn from its own named stream.

    With `n_train` there are that many rows, the same for every seed, in a new order each epoch.
    """
    if spec.n_train is not None:
        return shuffled(spec, draw(stream("data", spec.name, split, "rows"), spec.n_train))
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
