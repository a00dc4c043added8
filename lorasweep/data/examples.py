"""Loaded data: examples, their order, and the fingerprint of a data set.

Example i of (data set, split, seed) is the same for every method and learning rate.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np

from lorasweep.errors import DataError
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.streams import stream

CHUNK = 256
"""Generated sequences per random stream. So making example i does not need all earlier ones."""
Fit = tuple[int, int, int, int]
"""Numbers of rows that were read, cut and left out, and the max_length that leaves 99% whole."""


@dataclass(frozen=True)
class Truth:
    """The true distribution of each loss token, for data of a known generator."""

    probabilities: np.ndarray
    """float32 [loss tokens, symbols]."""
    changed: np.ndarray
    """bool [loss tokens]: whether the distribution differs from the one in pretraining."""


@dataclass(frozen=True)
class Example:
    """One sequence."""

    tokens: np.ndarray
    """int32 [T]."""
    loss: np.ndarray
    """bool [T]: whether the prediction of tokens[t] counts."""
    n_bytes: int | None = None
    """UTF-8 bytes of the text in the loss; None if the tokens are not text."""
    truth: Truth | None = None
    """Set for held-out rows with exact_loss."""


@dataclass(frozen=True)
class Rewards:
    """The function that rewards completions of a data set's prompts, and facts about it."""

    of: Callable[[Sequence[tuple[Example, np.ndarray]]], list[float | None]]
    """[(row, tokens of a completion with its end)] -> rewards from 0 to 1; None: unreadable."""
    ends: tuple[tuple[int, ...], ...]
    """Token sequences, each of which ends a completion."""
    exact: bool = False
    """Whether only the gold answer is rewarded, so that its probability is the expected reward."""
    choices: int = 0
    """Number of equally likely answers that the gold answer was drawn from; 0: not known."""
    of_gold: Callable[[Sequence[Example]], list[float | None]] | None = None
    """Rows -> rewards of their gold answers. For data sets whose gold answers may lack a form that
    completions need, such as a box. None: gold answers are rewarded like completions."""


@dataclass(frozen=True)
class Data:
    """A loaded data set."""

    train: "Serve"
    test: Sequence[Example]
    n_train: int | None
    """Rows in the training split; None: unlimited (generated)."""
    validation: Sequence[Example] = ()
    """Held-out examples that select learning rates, or the weights of a run (early stopping)."""
    retain: Sequence[Example] = ()
    """Held-out examples of the pretraining data, to measure what fine-tuning forgets."""
    entropy_floor_nats: float | None = None
    """Mean -log p of the test tokens under the true generator: the lowest possible NLL. With
    exact_loss: the mean entropy of the true distributions of these tokens."""
    sha256: str | None = None
    """Fingerprint of training and test data: equal for all seeds, and only for equal data."""
    commit: str | None = None
    """The hub's commit; None for other sources."""
    fits: Mapping[str, Fit] = field(default_factory=dict)
    """What max_length does to training and to held-out rows; empty for generated data."""
    rewards: Rewards | None = None
    """None: the data set has no verifier of completions."""
    bits: Callable[[int], dict[str, float]] | None = None
    """Number of training tokens -> way to count -> bits of new information; None: not known."""


class Parameter(NamedTuple):
    """A parameter of a generator, and its allowed values."""

    default: float
    low: float = 0.0
    high: float = math.inf
    whole: bool = False


def parameters(
    given: Mapping[str, float], declared: Mapping[str, Parameter], where: str
) -> dict[str, float]:
    """Return a generator's parameters, given or default; DataError: unknown, or out of range."""
    for key in given.keys() - declared.keys():
        allowed = ", ".join(declared) or "none"
        raise DataError(f"{where}: generator_params.{key} is unknown. Allowed: {allowed}.")
    found = {name: float(p.default) for name, p in declared.items()} | dict(given)
    for name, (_, low, high, whole) in declared.items():
        if not low <= found[name] <= high or (whole and found[name] % 1):
            kind = "a whole number from " if whole else ""
            allowed = f"{kind}{low:g} to {high:g}"
            raise DataError(
                f"{where}: generator_params.{name}={found[name]:g}. Allowed: {allowed}."
            )
    return found


def prompt_of(row: Example) -> np.ndarray:
    """Return the tokens before the first one in the loss."""
    return row.tokens[: int(row.loss.argmax())]


def answer_of(row: Example) -> np.ndarray:
    """Return the tokens in the loss: the gold answer, with its end."""
    return row.tokens[row.loss]


def same_tokens(pairs: Sequence[tuple[Example, np.ndarray]]) -> list[float | None]:
    """Reward exactly the gold answers of rows, including their end tokens."""
    return [float(answer.tolist() == answer_of(row).tolist()) for row, answer in pairs]


def prompts_of(rows: Sequence[Example]) -> list[int]:
    """Return the number of each row's prompt, counting distinct prompts in order."""
    numbers: dict[bytes, int] = {}
    return [numbers.setdefault(prompt_of(e).tobytes(), len(numbers)) for e in rows]


Serve = Callable[[int, int, int], list[Example]]
"""(seed, start, count) -> training examples start .. start + count - 1 in the seed's order."""


def shuffled(spec: DatasetSpec, rows: Sequence[Example]) -> Serve:
    """Serve rows in a new order each epoch. The order depends only on data set, split and seed."""

    @cache
    def order(seed: int, epoch: int) -> np.ndarray:
        return stream("data", spec.name, spec.train_split, seed, epoch).permutation(len(rows))

    def train(seed: int, start: int, count: int) -> list[Example]:
        indices = (divmod(i, len(rows)) for i in range(start, start + count))
        return [rows[order(seed, epoch)[k]] for epoch, k in indices]

    return train


def generated(
    spec: DatasetSpec, draw: Callable[[np.random.Generator, int], list[Example]]
) -> Serve:
    """Serve generated examples by index; with `n_train`, that many rows, as `shuffled` does."""
    here = ("data", spec.name, spec.train_split)
    if spec.n_train is not None:
        return shuffled(spec, draw(stream(*here, "rows"), spec.n_train))

    @lru_cache(64)
    def rows_of(seed: int, chunk: int) -> list[Example]:
        return draw(stream(*here, seed, chunk), CHUNK)

    def train(seed: int, start: int, count: int) -> list[Example]:
        indices = (divmod(i, CHUNK) for i in range(start, start + count))
        return [rows_of(seed, chunk)[k] for chunk, k in indices]

    return train


def fingerprint(*parts: str | np.ndarray | Sequence[Example]) -> str:
    """Return the SHA-256 of texts, of arrays, and of examples' token ids and loss masks."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            arrays = [np.frombuffer(part.encode(), dtype=np.uint8)]
        elif isinstance(part, np.ndarray):
            arrays = [part]
        else:
            arrays = [np.array([len(e.tokens) for e in part], dtype="<i8")]
            for name, dtype in (("tokens", "<i4"), ("loss", "?")) if len(part) else ():
                arrays.append(np.concatenate([getattr(e, name) for e in part]).astype(dtype))
        for array in arrays:
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def with_fingerprint(data: Data, *distribution: str | np.ndarray) -> Data:
    """Return generated data with a fingerprint of distribution, held-out and first training rows.

    `distribution`: parameters and tables of the generator; probabilities as `rounded` returns them.
    """
    drawn = data.train(0, 0, min(CHUNK, data.n_train or CHUNK))
    return replace(data, sha256=fingerprint(*distribution, data.test, data.retain, drawn))


def rounded(probabilities: np.ndarray) -> np.ndarray:
    """Round to 3 digits (float16), because the last digits of products depend on the processor."""
    return probabilities.astype("<f2")
