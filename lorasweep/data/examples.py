"""Loaded data: examples, their order, the fingerprint of a data set, and batches.

Example i of (data set, split, seed) is the same for every method and learning rate.

Shapes: N runs in the pack, R rows of a run, T tokens of a row, M loss tokens of a run, P loss
tokens of a row. No real token attends to padding, so results do not depend on it.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from typing import Any, NamedTuple, TypeVar

import numpy as np

from lorasweep.errors import DataError
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.streams import stream

CHUNK = 256
"""Generated sequences per random stream. So making example i does not need all earlier ones."""
PAD_TO = 16
"""T and M are multiples of PAD_TO. So on many processors, matrix products are rounded
in a pack as they are for a run alone (docs/log/2026-11-26.md)."""
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
    found = {name: float(p.default) for name, p in declared.items()} | dict(given)
    for name, value in found.items():
        if name not in declared:
            allowed = ", ".join(declared) or "none"
            raise DataError(f"{where}: generator_params.{name} is unknown. Allowed: {allowed}.")
        _, low, high, whole = declared[name]
        if not low <= value <= high or (whole and value % 1):
            allowed = f"{'a whole number from ' * whole}{low:g} to {high:g}"
            raise DataError(f"{where}: generator_params.{name}={value:g}. Allowed: {allowed}.")
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

    `distribution`: parameters and tables of the generator.
    """
    drawn = data.train(0, 0, min(CHUNK, data.n_train or CHUNK))
    return replace(data, sha256=fingerprint(*distribution, data.test, data.retain, drawn))


# ---------------------------------------------------------------- batches


@dataclass(frozen=True)
class Batch:
    """Rows of token ids of each run, and its loss tokens in the order of the rows.

    Filled up with zeros to one shape for all runs. int64, but the weights are float32.
    """

    tokens_NRT: np.ndarray
    rows_NM: np.ndarray
    """Number of the row of a loss token, within its run."""
    positions_NM: np.ndarray
    """Position in the row whose next token is predicted."""
    targets_NM: np.ndarray
    weight_NM: np.ndarray
    """1 for a loss token, 0 for filler."""
    tokens_N: tuple[int, ...]
    """Tokens of each run, without padding."""
    truth: Truth | None = None
    """For held-out rows of one run, in order of the loss tokens; None if runs are merged."""

    @property
    def n_loss(self) -> int:
        """Number of tokens in the loss of all runs."""
        return int(self.weight_NM.sum())


AnyBatch = TypeVar("AnyBatch", bound=Batch)


def filled(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Join arrays, filled up with zeros to the largest sides; the last side to one of `up`."""
    sides = np.max([a.shape[1:] for a in arrays], 0)
    sides[-1] = up(sides[-1])
    joined, start = np.zeros((sum(map(len, arrays)), *sides), arrays[0].dtype), 0
    for a in arrays:
        joined[(slice(start, start + len(a)), *map(slice, a.shape[1:]))] = a
        start += len(a)
    return joined


def collate(examples: Sequence[Example]) -> Batch:
    """Make the batch of the rows of one run."""
    tokens = filled([e.tokens[None] for e in examples]).astype(np.int64)
    rows, at = np.nonzero(filled([e.loss[None] for e in examples]))
    truth: Truth | None = None
    truths = [e.truth for e in examples if e.truth is not None]
    if truths and len(truths) == len(examples):
        p, changed = zip(*((t.probabilities, t.changed) for t in truths))
        truth = Truth(np.concatenate(p), np.concatenate(changed))
    of_loss = (rows, at - 1, tokens[rows, at], np.ones(len(at), dtype=np.float32))
    rows_NM, positions_NM, targets_NM, weight_NM = (filled([x[None]]) for x in of_loss)
    n = sum(len(e.tokens) for e in examples)
    return Batch(tokens[None], rows_NM, positions_NM, targets_NM, weight_NM, (n,), truth)


def merge(parts: Sequence[AnyBatch]) -> AnyBatch:
    """Stack the batches of the runs in a pack."""
    if len(parts) == 1:
        return parts[0]
    arrays = {name: v for name, v in vars(parts[0]).items() if isinstance(v, np.ndarray)}
    more: dict[str, Any] = {name: filled([getattr(p, name) for p in parts]) for name in arrays}
    return replace(parts[0], **more, tokens_N=sum((p.tokens_N for p in parts), ()), truth=None)


def padded(batch: Batch) -> list[np.ndarray]:
    """Return tokens [N R, T]; loss positions, targets and weights by row, [N R, P]."""
    n, rows, length = batch.tokens_NRT.shape
    real_NM, found = batch.weight_NM > 0, [batch.tokens_NRT.reshape(-1, length)]
    row = (batch.rows_NM + rows * np.arange(n)[:, None])[real_NM]
    counts = np.bincount(row, minlength=n * rows)
    column = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    for values_NM in (batch.positions_NM, batch.targets_NM, batch.weight_NM):
        found.append(np.zeros((n * rows, max(1, counts.max())), dtype=values_NM.dtype))
        found[-1][row, column] = values_NM[real_NM]
    return found


def eval_batches(examples: Sequence[Example], n_tokens: int) -> list[Batch]:
    """Batch examples in the order `by_length`, up to `n_tokens` padded tokens (or one row) each."""
    groups: list[list[Example]] = [[]]
    total = 0
    for example in (examples[i] for i in by_length(examples)):
        length = up(len(example.tokens))
        if groups[-1] and total + length > n_tokens:
            groups.append([])
            total = 0
        groups[-1].append(example)
        total += length
    return [collate(group) for group in groups]


def by_length(examples: Sequence[Example]) -> list[int]:
    """Return the indices of examples in order of evaluation, shortest first."""
    return sorted(range(len(examples)), key=lambda i: (len(examples[i].tokens), i))


def up(count: int) -> int:
    """Round a length up to a multiple of PAD_TO."""
    return -(-count // PAD_TO) * PAD_TO
