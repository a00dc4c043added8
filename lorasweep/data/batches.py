"""Examples -> arrays. Rows lie one after another, each padded on its own, so little is padded.

Attention is causal and looks at its own row only, so no real token sees a pad or another row:
results do not depend on the padding, nor on what else is in the batch.
Shapes: N members, X tokens a member (its rows laid end to end), M positions a member where a
loss-bearing token is predicted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lorasweep.data.examples import Example

PAD_TO = 16
"""Row lengths, X and M are multiples of this. Matrix products of few widths then round alike in a
pack and alone on many processors, but not on all: no equality of bits is promised (LOG.md)."""


@dataclass(frozen=True)
class Batch:
    """Rows of token ids and where the loss looks; int64, weights float32."""

    tokens_NX: np.ndarray
    lengths: tuple[tuple[int, ...], ...]
    """Padded length of each row of each member, in order; they sum to X. A last row may be filler.
    """
    loss_positions_NM: np.ndarray
    """Positions in X whose next token is predicted."""
    targets_NM: np.ndarray
    weight_NM: np.ndarray
    """1, or 0 where M is filled up."""
    tokens_N: tuple[int, ...]
    """Real tokens of each member, pads left out."""

    @property
    def laid_out(self) -> int:
        """Tokens of one member, pads included."""
        return self.tokens_NX.shape[1]

    @property
    def n_loss(self) -> int:
        """Loss-bearing tokens of all members."""
        return int(self.weight_NM.sum())


def collate(examples: Sequence[Example]) -> Batch:
    """Lay out the rows of one member."""
    lengths = [_up(len(e.tokens)) for e in examples]
    starts = np.cumsum([0, *lengths])
    tokens = np.zeros(starts[-1], dtype=np.int64)
    positions, targets = [], []
    for start, example in zip(starts, examples):
        tokens[start : start + len(example.tokens)] = example.tokens
        at = np.flatnonzero(example.loss)
        positions.append(start + at - 1)  # the logits at t-1 predict token t
        targets.append(example.tokens[at])
    count = sum(map(len, positions))
    arrays = []
    for values in (
        np.concatenate(positions),
        np.concatenate(targets),
        np.ones(count, dtype=np.float32),
    ):
        arrays.append(
            _widen(
                values.astype(np.float32 if values.dtype == np.float32 else np.int64)[None],
                _up(count),
            )
        )
    n_tokens = sum(len(e.tokens) for e in examples)
    loss_at, following, weight = arrays
    return Batch(tokens[None], (tuple(lengths),), loss_at, following, weight, (n_tokens,))


def merge(parts: Sequence[Batch]) -> Batch:
    """Lay the batches of members under one another, filled up to the longest."""
    if len(parts) == 1:
        return parts[0]
    x, m = (
        max(p.tokens_NX.shape[1] for p in parts),
        max(p.loss_positions_NM.shape[1] for p in parts),
    )
    lengths = tuple(
        row if sum(row) == x else (*row, x - sum(row)) for part in parts for row in part.lengths
    )
    return Batch(
        np.concatenate([_widen(p.tokens_NX, x) for p in parts]),
        lengths,
        np.concatenate([_widen(p.loss_positions_NM, m) for p in parts]),
        np.concatenate([_widen(p.targets_NM, m) for p in parts]),
        np.concatenate([_widen(p.weight_NM, m) for p in parts]),
        tokens_N=sum((p.tokens_N for p in parts), ()),
    )


def padded(batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the batch as models of any class take it: tokens [N*B, T]; positions, targets, weight
    [N*B, P] by row.

    Member by member, B rows each. Filler rows are left out; a member with fewer rows than another
    gets empty ones.
    """
    n, x = batch.tokens_NX.shape
    most = max(map(len, batch.lengths))
    lengths = np.array([(*member, *[0] * (most - len(member))) for member in batch.lengths])
    starts = np.cumsum(lengths, axis=1) - lengths + np.arange(n)[:, None] * x
    bears = batch.weight_NM.ravel() > 0
    at = (batch.loss_positions_NM + np.arange(n)[:, None] * x).ravel()[bears]
    wanted = batch.targets_NM.ravel()[bears]
    member, row = np.divmod(np.searchsorted(starts.ravel(), at, side="right") - 1, most)
    used = np.zeros(n, dtype=np.int64)  # rows of a member up to its last that bears loss: no filler
    np.maximum.at(used, member, row + 1)
    rows = max(1, used.max())
    lengths = np.where(np.arange(most) < used[:, None], lengths, 0)[:, :rows].ravel()
    starts, row_of = starts[:, :rows].ravel(), member * rows + row
    flat = batch.tokens_NX.ravel()
    tokens = np.zeros((n * rows, lengths.max()), dtype=np.int64)
    for k, (start, length) in enumerate(zip(starts, lengths)):
        tokens[k, :length] = flat[start : start + length]
    counts = np.bincount(row_of, minlength=len(lengths))
    shape = (len(lengths), max(1, counts.max()))
    positions, targets = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    weight = np.zeros(shape, dtype=np.float32)
    column = np.arange(len(at)) - np.repeat(
        np.cumsum(counts) - counts, counts
    )  # positions are in the order of the rows
    positions[row_of, column], targets[row_of, column], weight[row_of, column] = (
        at - starts[row_of],
        wanted,
        1.0,
    )
    return tokens, positions, targets, weight


def eval_batches(examples: Sequence[Example], n_tokens: int) -> list[Batch]:
    """Group examples of like length into batches of at most about `n_tokens` padded tokens; the
    order is fixed."""
    order = sorted(range(len(examples)), key=lambda i: (len(examples[i].tokens), i))
    batches: list[Batch] = []
    group: list[int] = []
    total = 0
    for i in order:
        length = _up(len(examples[i].tokens))
        if group and total + length > n_tokens:
            batches.append(collate([examples[j] for j in group]))
            group, total = [], 0
        group.append(i)
        total += length
    batches.append(collate([examples[j] for j in group]))
    return batches


def _up(count: int) -> int:
    return -(-count // PAD_TO) * PAD_TO


def _widen(values_NX: np.ndarray, width: int) -> np.ndarray:
    return np.pad(values_NX, ((0, 0), (0, width - values_NX.shape[1])))
