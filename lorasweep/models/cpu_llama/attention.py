"""Causal attention with rotary positions over rows of different lengths, with its backward pass.

Rows are grouped into length classes, and each class is one batched product. Most of the scores that
the causal mask would hide are never computed. Without gradients, torch's
scaled_dot_product_attention is used, which is faster.

Shapes: N members, X tokens per member, R rows of a class of length T, P tokens of all classes, S =
R x kv heads, G query heads per kv head, d head size, C = (heads + 2 kv heads) x d.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from lorasweep.data.batches import Batch

ATTENTION_BLOCK = 256
"""Queries per block. In longer rows up to half of the scores are skipped (LOG.md)."""


class Heads(NamedTuple):
    """Number and size of the heads in the q/k/v outputs."""

    n: int
    """Query heads."""
    kv: int
    d: int
    """Head size."""


def row_class(length: int) -> int:
    """Return the length class of a row, to which it is filled up for attention.

    There are few classes, and at most a third is filler. The class depends only on the row, not on
    its batch.
    """
    step = 16
    while length > 4 * step:
        step *= 2
    return -(-length // step) * step


class Rows:
    """The rows of a batch sorted by length class, and the rotations of positions."""

    def __init__(self, batch: Batch, rotations: torch.Tensor) -> None:
        """Sort the rows of `batch`; `rotations`: [at least the longest class, d, d]."""
        self.rotations = rotations
        lengths = np.array([length for member in batch.lengths for length in member])
        classes = np.array([row_class(length) for length in lengths])
        starts, size = np.cumsum(lengths) - lengths, lengths.sum()
        self.spans: list[tuple[int, int, int]] = []
        """(start of the first row, rows R, length T) of each class."""
        take, put, at = [], np.empty(size, dtype=np.int64), 0
        for length in np.unique(classes):
            here = np.flatnonzero(classes == length)
            self.spans.append((at, len(here), int(length)))
            offset = np.arange(length)
            # Filler repeats the row's last token. No token of the row attends to it, and its own
            # output is dropped.
            take.append((starts[here, None] + np.minimum(offset, lengths[here, None] - 1)).ravel())
            for k, row in enumerate(here):
                put[starts[row] : starts[row] + lengths[row]] = (
                    at + k * length + offset[: lengths[row]]
                )
            at += len(here) * int(length)
        same = at == size and len(self.spans) == 1
        self.take = None if same else torch.from_numpy(np.concatenate(take))
        """[P], the token at each sorted position; None: the order does not change."""
        self.put = None if same else torch.from_numpy(put)
        """[N*X], the sorted position of each token."""
        self.n_filled = at
        """P, with filler."""


def attention(
    y_NXC: torch.Tensor, heads: Heads, rows: Rows, keep: bool
) -> tuple[torch.Tensor, list[Any]]:
    """Return the heads' output [N, X, heads * d] from the q/k/v products [N, X, C].

    With `keep`, also return what the backward pass needs.
    """
    n, kv, d = heads
    flat = y_NXC.view(-1, (n + 2 * kv) * d)
    y_PC = flat if rows.take is None else flat.index_select(0, rows.take)
    out_PO, kept = torch.empty(rows.n_filled, n * d, dtype=flat.dtype), []
    for at, r, t in rows.spans:
        part = y_PC[at : at + r * t].view(r, t, n + 2 * kv, d)
        q, k = _turned(part, heads, rows)
        v = part[:, :, n + kv :].transpose(1, 2).reshape(-1, t, d)
        if keep:
            out, blocks = attend(q, k, v)
            kept.append((k, v, blocks))
        else:
            out = F.scaled_dot_product_attention(
                q, k[:, None], v[:, None], is_causal=True, scale=1.0, enable_gqa=True
            )
        out_PO[at : at + r * t].view(r, t, n, d).copy_(out.view(r, n, t, d).transpose(1, 2))
    out_XO = out_PO if rows.put is None else out_PO.index_select(0, rows.put)
    return out_XO.view(*y_NXC.shape[:2], -1), kept


def attention_backward(
    dout: torch.Tensor, kept: list[Any], heads: Heads, rows: Rows
) -> torch.Tensor:
    """Return the gradient of the q/k/v products, [N, X, C]."""
    n, kv, d = heads
    flat = dout.view(-1, n * d)
    if rows.put is not None:  # filler gets no gradient
        flat = torch.zeros(rows.n_filled, n * d, dtype=flat.dtype).index_copy_(0, rows.put, flat)
    dy_PC = torch.empty(rows.n_filled, (n + 2 * kv) * d, dtype=flat.dtype)
    for (at, r, t), (k, v, blocks) in zip(rows.spans, kept):
        do = flat[at : at + r * t].view(r, t, n, d).transpose(1, 2).reshape(r * kv, n // kv, t, d)
        dq, dk, dv = attend_backward(do, k, v, blocks)
        view = dy_PC[at : at + r * t].view(r, t, n + 2 * kv, d)
        view[:, :, : n + kv] = _turned_back(dq, dk, heads, rows)
        view[:, :, n + kv :] = dv.view(r, kv, t, d).transpose(1, 2)
    dy_XC = dy_PC if rows.put is None else dy_PC.index_select(0, rows.put)
    return dy_XC.view(*dout.shape[:2], -1)


def rotations(cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the rotary positions (Su et al., arXiv 2104.09864) as matrices [T, d, d].

    x R_t = (x cos + rotate_half(x) sin) d^(-1/4), from cos and sin [T, d], in the compute type. One
    product per position replaces five passes over memory, accumulates in fp32 and rounds once. The
    factor d^(-1/4) on both q and k gives the 1/sqrt(d) of the scores without an extra pass.
    """
    d = cos.shape[-1]
    half, eye = d // 2, torch.eye(d // 2, dtype=cos.dtype)
    turn = torch.zeros(d, d, dtype=cos.dtype)  # rotate_half: (x1, x2) -> (-x2, x1)
    turn[half:, :half], turn[:half, half:] = -eye, eye
    return ((torch.diag_embed(cos) + turn * sin[:, None]) * d**-0.25).to(dtype)


def _turned(part_RTHD: torch.Tensor, heads: Heads, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Return q [S, G, T, d] and k [S, T, d], rotated by their positions."""
    n, kv, d = heads
    r, t = part_RTHD.shape[:2]
    both = part_RTHD[:, :, : n + kv].transpose(0, 1).reshape(t, -1, d)
    both = torch.bmm(both, rows.rotations[:t]).view(t, r, n + kv, d).permute(1, 2, 0, 3)
    return both[:, :n].reshape(r * kv, n // kv, t, d), both[:, n:].reshape(r * kv, t, d)


def _turned_back(dq: torch.Tensor, dk: torch.Tensor, heads: Heads, rows: Rows) -> torch.Tensor:
    """Return the gradient of q and k before rotation, [R, T, heads + kv heads, d]."""
    n, kv, d = heads
    t = dk.shape[1]
    both = torch.cat([dq.view(-1, n, t, d), dk.view(-1, kv, t, d)], 1).permute(2, 0, 1, 3)
    back = torch.bmm(both.reshape(t, -1, d), rows.rotations[:t].mT)
    return back.view(t, -1, n + kv, d).transpose(0, 1)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, list[Any]]:
    """Compute causal attention of q [S, G, T, d] to k and v [S, T, d].

    Returns the output [S, G, T, d], and for the backward pass each block's (start, end, queries,
    probabilities).
    """
    s_, g, t, d = q.shape
    parts, kept = [], []
    for t0 in range(0, t, ATTENTION_BLOCK):
        t1 = min(t, t0 + ATTENTION_BLOCK)
        block = q[:, :, t0:t1].reshape(s_, -1, d)
        scores = torch.bmm(block, k[:, :t1].mT).view(s_, g, t1 - t0, t1)
        scores[..., t0:].add_(torch.full((t1 - t0, t1 - t0), -torch.inf, dtype=q.dtype).triu_(1))
        p = torch.softmax(scores, -1).view(s_, -1, t1)
        parts.append(torch.bmm(p, v[:, :t1]).view(s_, g, t1 - t0, d))
        kept.append((t0, t1, block, p))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2), kept


def attend_backward(dout: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: list[Any]):
    """Return the gradients of q [S, G, T, d], k and v [S, T, d]."""
    s_, g, _, d = dout.shape
    parts: list[torch.Tensor] = []
    dk = dv = None
    for t0, t1, block, p in reversed(kept):  # the last block saw all keys
        do = dout[:, :, t0:t1].reshape(s_, -1, d)
        ds = torch.ops.aten._softmax_backward_data(torch.bmm(do, v[:, :t1].mT), p, -1, p.dtype)
        parts.insert(0, torch.bmm(ds, k[:, :t1]).view(s_, g, t1 - t0, d))
        if dk is None:
            dk, dv = torch.bmm(ds.mT, block), torch.bmm(p.mT, do)
        else:
            dk[:, :t1] += torch.bmm(ds.mT, block)
            dv[:, :t1] += torch.bmm(p.mT, do)
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2), dk, dv
