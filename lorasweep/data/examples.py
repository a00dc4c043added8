"""Examples, and the order in which they are seen.

Refuses to know methods and learning rates: example i of (data set, split, seed) is the same in
every arm.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.streams import stream

CHUNK = 256
"""Sequences per chunk. Each chunk is generated independently, so example i needs no earlier one."""


@dataclass(frozen=True)
class Truth:
    """The true distribution of each loss token, where the generator is known."""

    probabilities: np.ndarray
    """float32 [loss tokens, symbols]."""
    changed: np.ndarray
    """bool [loss tokens]: whether it differs from that of the pretraining language."""


@dataclass(frozen=True)
class Example:
    """One sequence.

    tokens: int32 [T]. loss: bool [T]; loss[t] is True if the prediction of tokens[t] counts.
    """

    tokens: np.ndarray
    loss: np.ndarray
    n_bytes: int | None = None
    """UTF-8 bytes of the text that counts in the loss; None if the tokens are not text."""
    truth: Truth | None = None
    """For held-out rows with exact_loss."""


@dataclass(frozen=True)
class Rewards:
    """How the answers to the prompts of a data set are rewarded."""

    of: Callable[[Sequence[tuple[Example, np.ndarray]]], list[float | None]]
    """(row, tokens of an answer with its end) of many -> rewards from 0 to 1; None: unreadable."""
    ends: tuple[tuple[int, ...], ...]
    """Sequences of tokens, each of which ends an answer."""
    exact: bool = False
    """Whether only the row's own answer is rewarded, with 1. Its probability is then the expected
    reward."""
    choices: int = 0
    """Of how many equally likely answers the row's was drawn; 0: not known."""
    of_gold: Callable[[Sequence[Example]], list[float | None]] | None = None
    """Rows -> the rewards of their own answers, where those lack what a sampled one must have, such
    as a box. None: they are rewarded as sampled ones are."""


@dataclass(frozen=True)
class Data:
    """A loaded data set: training examples by index and seed, and the held-out examples."""

    train: Callable[[int, int, int], list[Example]]
    """(seed, start, count) -> the training examples start .. start+count-1 of that seed's order."""
    test: Sequence[Example]
    n_train: int | None
    """Rows in the training split; None: unlimited (generated)."""
    validation: Sequence[Example] = ()
    """Held-out examples that choose between runs; those of `test` then choose nothing."""
    retain: Sequence[Example] = ()
    """Held-out examples of the pretraining data, to measure what fine-tuning forgets."""
    entropy_floor_nats: float | None = None
    """Mean -log p of the test tokens under the true generator, in nats: the lowest possible NLL.
    With exact_loss the mean entropy of their true distributions."""
    sha256: str | None = None
    """Fingerprint of what is trained and tested on: equal for all seeds, and only for equal data.
    """
    commit: str | None = None
    """Commit of the hub that the rows are from; None for other sources."""
    rewards: Rewards | None = None
    """How sampled answers are rewarded; None: nothing verifies them."""
    bits: Callable[[int], dict[str, float]] | None = None
    """Number of training tokens -> bits of what is new in them, by measure; None: not known."""


def prompts_of(rows: Sequence[Example]) -> list[int]:
    """Return the number of each row's prompt, the tokens before the first one in the loss."""
    numbers: dict[bytes, int] = {}
    found = []
    for e in rows:
        prompt = e.tokens[: int(e.loss.argmax())].tobytes()
        found.append(numbers.setdefault(prompt, len(numbers)))
    return found


def shuffled(
    spec: DatasetSpec, rows: Sequence[Example]
) -> Callable[[int, int, int], list[Example]]:
    """Serve rows in a new order each epoch. The order depends only on data set, split and seed."""
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
    """Serve generated examples by index: each chunk of a seed has its own random stream.

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
