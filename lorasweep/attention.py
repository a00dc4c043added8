"""Causal attention with rotary positions over rows of several lengths, and its way back by hand.

Rows of one length are one batch of products; the causal half of the scores is never computed. Where no gradient is
wanted, torch's scaled_dot_product_attention is faster and used.
Shapes: N members, X tokens a member, R rows of one length T, S = R x kv heads, G query heads a kv head, d head size,
O = (heads + 2 kv heads) x d.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from lorasweep.data.batches import Batch, rows_of_a_length

ATTENTION_BLOCK = 128
"""Queries at a time: half of the scores is skipped, and a block stays in the cache (LOG.md)."""


class Heads(NamedTuple):
    """How the outputs of q/k/v are cut."""

    n: int
    """Query heads."""
    kv: int
    d: int
    """Head size."""


class Rows:
    """Where the rows of each length are in the flattened tokens, and the rotary positions."""

    def __init__(self, batch: Batch, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """cos, sin: [1, longest row, d], in the master type."""
        self.cos, self.sin, self.turn = cos, sin, _half_turn(cos.shape[-1], cos)
        self.spans: list[tuple[int, torch.Tensor | None]] = []
        """(length, where its rows' tokens are; None: all rows have this length)."""
        for length, at in rows_of_a_length(batch).items():
            self.spans.append((length, None if len(at) == batch.tokens_NX.size else torch.from_numpy(at)))


def attention(y_NXO: torch.Tensor, heads: Heads, rows: Rows, keep: bool) -> tuple[torch.Tensor, list[Any]]:
    """Return the heads' output [N, X, heads * d] from the q/k/v products [N, X, O], and, with `keep`, what the way
    back needs."""
    n, kv, d = heads
    flat = y_NXO.view(-1, (n + 2 * kv) * d)
    whole, kept = torch.empty(len(flat), n * d, dtype=flat.dtype, device=flat.device), []
    for length, where in rows.spans:
        part = flat if where is None else flat.index_select(0, where)
        part = part.view(-1, length, n + 2 * kv, d).transpose(1, 2)  # [R, heads + 2 kv, T, d]
        q = _turned(part[:, : n], rows).view(-1, n // kv, length, d)
        k = _turned(part[:, n : n + kv], rows).view(-1, length, d)
        v = part[:, n + kv :].reshape(-1, length, d)
        if keep:
            out, blocks = attend(q, k, v, d**-0.5)
            kept.append((k, v, blocks))
        else:
            out = F.scaled_dot_product_attention(q, k[:, None], v[:, None], is_causal=True, enable_gqa=True)
        out = out.view(-1, n, length, d).transpose(1, 2).reshape(-1, n * d)
        if where is None:
            whole = out
        else:
            whole.index_copy_(0, where, out)
    return whole.view(*y_NXO.shape[:2], -1), kept


def attention_backward(dout: torch.Tensor, kept: list[Any], heads: Heads, rows: Rows) -> torch.Tensor:
    """Gradient of the q/k/v products, [N, X, O]."""
    n, kv, d = heads
    flat = dout.view(-1, n * d)
    whole = torch.empty(len(flat), (n + 2 * kv) * d, dtype=flat.dtype, device=flat.device)
    for (length, where), (k, v, blocks) in zip(rows.spans, kept):
        part = flat if where is None else flat.index_select(0, where)
        part = part.view(-1, length, n, d).transpose(1, 2).reshape(len(k), -1, length, d)
        dq, dk, dv = attend_backward(part, k, v, blocks, d**-0.5)
        dy = whole if where is None else torch.empty(len(where), whole.shape[1], dtype=flat.dtype, device=flat.device)
        view = dy.view(-1, length, n + 2 * kv, d).transpose(1, 2)
        view[:, : n] = _turned_back(dq.view(-1, n, length, d), rows)
        view[:, n : n + kv] = _turned_back(dk.view(-1, kv, length, d), rows)
        view[:, n + kv :] = dv.view(-1, kv, length, d)
        if where is not None:
            whole.index_copy_(0, where, dy)
    return whole.view(*dout.shape[:2], -1)


def _turned(y: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Rotary positions (Su et al., arXiv 2104.09864) on [R, heads, T, d], contiguous in the compute type."""
    cos, sin = rows.cos[:, : y.shape[2]], rows.sin[:, : y.shape[2]]
    dtype = y.dtype
    y = y.to(cos.dtype, memory_format=torch.contiguous_format, copy=True)
    turned = torch.matmul(y, rows.turn)
    return y.mul_(cos).addcmul_(turned, sin).to(dtype)


def _turned_back(dy: torch.Tensor, rows: Rows) -> torch.Tensor:
    cos, sin = rows.cos[:, : dy.shape[2]], rows.sin[:, : dy.shape[2]]
    dy = dy.to(cos.dtype)
    return torch.matmul(dy * sin, rows.turn.T).addcmul_(dy, cos)


def _half_turn(d: int, like: torch.Tensor) -> torch.Tensor:
    """The [d, d] matrix P with x P = rotate_half(x) = (-x2, x1): exact, as it only moves and negates."""
    half, eye = d // 2, torch.eye(d // 2, dtype=like.dtype, device=like.device)
    turn = torch.zeros(d, d, dtype=like.dtype, device=like.device)
    turn[half:, :half], turn[:half, half:] = -eye, eye
    return turn


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, list[Any]]:
    """Causal attention. q [S, G, T, d], k and v [S, T, d]; the softmax works in the master type.

    Returns the output [S, G, T, d] and each block's (range, queries, probabilities) for the way back.
    """
    s_, g, t, d = q.shape
    out, kept = torch.empty_like(q), []
    for t0 in range(0, t, ATTENTION_BLOCK):
        t1 = min(t, t0 + ATTENTION_BLOCK)
        block = q[:, :, t0:t1].reshape(s_, -1, d) * scale
        scores = torch.bmm(block, k[:, :t1].mT).view(s_, g, t1 - t0, t1)
        scores[..., t0:].add_(torch.full((t1 - t0, t1 - t0), -torch.inf, dtype=q.dtype, device=q.device).triu_(1))
        p = torch.softmax(scores, -1).view(s_, -1, t1)
        out[:, :, t0:t1] = torch.bmm(p, v[:, :t1]).view(s_, g, t1 - t0, d)
        kept.append((t0, t1, block, p))
    return out, kept


def attend_backward(dout: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: list[Any], scale: float):
    """Gradients of q [S, G, T, d], k and v [S, T, d]."""
    s_, g, _, d = dout.shape
    dq, dk, dv = torch.empty_like(dout), torch.zeros_like(k), torch.zeros_like(v)
    for t0, t1, block, p in kept:
        do = dout[:, :, t0:t1].reshape(s_, -1, d)
        dv[:, :t1] += torch.bmm(p.mT, do)
        dp = torch.bmm(do, v[:, :t1].mT)
        ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
        torch.mul(torch.bmm(ds, k[:, :t1]).view(s_, g, t1 - t0, d), scale, out=dq[:, :, t0:t1])
        dk[:, :t1] += torch.bmm(ds.mT, block)  # the block holds the scale
    return dq, dk, dv
