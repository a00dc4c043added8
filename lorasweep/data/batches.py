"""Arrange examples in arrays: the rows of a run end to end, each padded to a multiple of PAD_TO.

Models get the rows `padded` to the longest row, or `joined` in one sequence per run. No real token
attends to padding or to another row, so results do not depend on padding and on other rows.

Shapes: N runs in the pack, X tokens per run, M positions per run at which a token in the loss is
predicted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lorasweep.data.examples import Example, Truth

PAD_TO = 16
"""Row lengths, X and M are multiples of PAD_TO. So on many processors, matrix products are rounded
in a pack as they are for a run alone (docs/log)."""


@dataclass(frozen=True)
class Batch:
    """Rows of token ids and their loss positions, as int64; the weights are float32."""

    tokens_NX: np.ndarray
    lengths: tuple[tuple[int, ...], ...]
    """Padded row lengths of each run. Those of a run sum to X; the last row may be filler."""
    loss_positions_NM: np.ndarray
    """Positions in X whose next token is predicted."""
    targets_NM: np.ndarray
    weight_NM: np.ndarray
    """1 for a real position, 0 for filler."""
    tokens_N: tuple[int, ...]
    """Tokens of each run, without padding."""
    truth: Truth | None = None
    """For held-out rows of one run, in order of the loss positions; None if runs are merged."""
    join_rows: bool = False
    """Whether models get the rows end to end instead of padded to the longest."""

    @property
    def padded_tokens(self) -> int:
        """Tokens of one run, with padding."""
        return self.tokens_NX.shape[1]

    @property
    def n_loss(self) -> int:
        """Number of tokens in the loss of all runs."""
        return int(self.weight_NM.sum())


def collate(examples: Sequence[Example], join_rows: bool = False) -> Batch:
    """Make the batch of the rows of one run."""
    lengths = [up(len(e.tokens)) for e in examples]
    starts = np.cumsum([0, *lengths])
    tokens = np.zeros(starts[-1], dtype=np.int64)
    loss = np.zeros(starts[-1], dtype=bool)
    for start, example in zip(starts, examples):
        row = slice(start, start + len(example.tokens))
        tokens[row], loss[row] = example.tokens, example.loss
    at = np.flatnonzero(loss)
    width = up(len(at))
    truth: Truth | None = None
    truths = [e.truth for e in examples if e.truth is not None]
    if truths and len(truths) == len(examples):
        p, changed = zip(*((t.probabilities, t.changed) for t in truths))
        truth = Truth(np.concatenate(p), np.concatenate(changed))
    return Batch(
        tokens_NX=tokens[None],
        lengths=(tuple(lengths),),
        loss_positions_NM=widen(at[None] - 1, width),  # the logits at t-1 predict token t
        targets_NM=widen(tokens[at][None], width),
        weight_NM=widen(np.ones((1, len(at)), dtype=np.float32), width),
        tokens_N=(sum(len(e.tokens) for e in examples),),
        truth=truth,
        join_rows=join_rows,
    )


def merge(parts: Sequence[Batch]) -> Batch:
    """Stack the batches of the runs in a pack, each filled up to the longest batch."""
    if len(parts) == 1:
        return parts[0]
    x = max(p.tokens_NX.shape[1] for p in parts)
    m = max(p.loss_positions_NM.shape[1] for p in parts)
    lengths = tuple(
        row if sum(row) == x else (*row, x - sum(row)) for part in parts for row in part.lengths
    )
    return Batch(
        np.concatenate([widen(p.tokens_NX, x) for p in parts]),
        lengths,
        np.concatenate([widen(p.loss_positions_NM, m) for p in parts]),
        np.concatenate([widen(p.targets_NM, m) for p in parts]),
        np.concatenate([widen(p.weight_NM, m) for p in parts]),
        tokens_N=sum((p.tokens_N for p in parts), ()),
        join_rows=parts[0].join_rows,
    )


def joined(batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return tokens [N, X], loss positions, targets, weights [N, M], and positions in rows [N, X].

    Positions start at 0 in each row, so transformers keeps attention inside the row.
    """
    rows = np.stack([np.concatenate([*map(np.arange, own)]) for own in batch.lengths])
    return batch.tokens_NX, batch.loss_positions_NM, batch.targets_NM, batch.weight_NM, rows


def padded(batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return tokens, loss positions, targets and weights by row, padded to the longest row.

    Rows are in the order of the runs. Filler is left out. Empty rows are added, so that all runs
    have equally many rows.
    """
    n, x = batch.tokens_NX.shape
    most = max(map(len, batch.lengths))
    lengths = np.array([(*rows, *[0] * (most - len(rows))) for rows in batch.lengths])
    starts = np.cumsum(lengths, axis=1) - lengths + np.arange(n)[:, None] * x
    real = batch.weight_NM.ravel() > 0
    at = (batch.loss_positions_NM + np.arange(n)[:, None] * x).ravel()[real]
    wanted = batch.targets_NM.ravel()[real]
    run, row = np.divmod(np.searchsorted(starts.ravel(), at, side="right") - 1, most)
    used = np.zeros(n, dtype=np.int64)  # rows of a run up to its last loss token: no filler
    np.maximum.at(used, run, row + 1)
    rows = max(1, used.max())
    lengths = np.where(np.arange(most) < used[:, None], lengths, 0)[:, :rows].ravel()
    starts, row_of = starts[:, :rows].ravel(), run * rows + row
    flat = batch.tokens_NX.ravel()
    tokens = np.zeros((n * rows, lengths.max()), dtype=np.int64)
    for k, (start, length) in enumerate(zip(starts, lengths)):
        tokens[k, :length] = flat[start : start + length]
    counts = np.bincount(row_of, minlength=len(lengths))
    shape = (len(lengths), max(1, counts.max()))
    positions, targets = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    weight = np.zeros(shape, dtype=np.float32)
    # positions are in the order of the rows
    column = np.arange(len(at)) - np.repeat(np.cumsum(counts) - counts, counts)
    positions[row_of, column] = at - starts[row_of]
    targets[row_of, column] = wanted
    weight[row_of, column] = 1.0
    return tokens, positions, targets, weight


def eval_batches(
    examples: Sequence[Example], n_tokens: int, join_rows: bool = False
) -> list[Batch]:
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
    return [collate(group, join_rows) for group in groups]


def by_length(examples: Sequence[Example]) -> list[int]:
    """Return the indices of examples in order of evaluation, shortest first."""
    return sorted(range(len(examples)), key=lambda i: (len(examples[i].tokens), i))


def up(count: int) -> int:
    """Round a length up to a multiple of PAD_TO."""
    return -(-count // PAD_TO) * PAD_TO


def widen(values_NX: np.ndarray, width: int) -> np.ndarray:
    """Fill rows up with zeros."""
    return np.pad(values_NX, ((0, 0), (0, width - values_NX.shape[1])))
