"""Unembedding and cross-entropy on a CPU, in chunks, with the gradient in the same pass.

The full logits are never in memory: with a vocabulary of 49,152, they would take most of the time
of a small batch.

Shapes: N members, M loss positions per member, H hidden, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from lorasweep.data.batches import PAD_TO
from lorasweep.models.cpu_llama.linears import Group

LOGITS = 1 << 24
"""Logits per chunk of the unembedding: 64 MB, large enough for fast products and small enough for
the cache."""


class HeadNll(torch.autograd.Function):
    """Unembedding and cross-entropy in chunks of rows: h [N, M, H] -> summed NLL in nats [N]."""

    @staticmethod
    def forward(
        ctx: Any,
        h_NMH: torch.Tensor,
        group: Group,
        targets_NM: torch.Tensor,
        weight_NM: torch.Tensor,
        grad: bool,
        *params: torch.Tensor,
    ) -> torch.Tensor:
        n, m, _ = h_NMH.shape
        vocab = group.w_OH.shape[0]
        need = grad and any(ctx.needs_input_grad)  # needs_input_grad is set under no_grad as well
        h = h_NMH.to(group.dtype)
        sums = torch.zeros(n, dtype=h_NMH.dtype, device=h.device)
        dh = torch.empty_like(h_NMH) if need else None
        whole = None
        grads: list[torch.Tensor] = []
        rows = _chunk_rows(h, vocab)
        for c in range(0, m, rows):
            part = h[:, c : c + rows].contiguous()
            logits, low = group.forward(part)
            log_p = F.log_softmax(logits, -1, dtype=h_NMH.dtype)
            target, weight = targets_NM[:, c : c + rows, None], weight_NM[:, c : c + rows, None]
            sums -= (log_p.gather(2, target) * weight).sum((1, 2))
            if dh is None:
                continue
            p = log_p.exp_()
            p.scatter_add_(2, target, -torch.ones_like(weight))
            dlogits = p if logits.dtype == p.dtype else logits.copy_(p)
            if not bool(weight.all()):
                dlogits.mul_(weight)
            if group.trained:  # products are rounded to the compute type, their sum is not
                product = torch.mm(dlogits.flatten(0, 1).T, part.flatten(0, 1))
                product = product.to(group.trained[0].dtype)
                whole = product if whole is None else whole.add_(product)
            dpart, more = group.backward(dlogits, part, low, weights=False)
            dh[:, c : c + rows] = dpart
            grads = more if not grads else [a.add_(b) for a, b in zip(grads, more)]
        if whole is not None:
            grads = [whole, *grads]
        of_adapters = [r.members for r in group.ranks for _ in r.params]
        ctx.kept = (dh, grads, [slice(None)] * len(group.trained) + of_adapters)
        return sums

    @staticmethod
    def backward(ctx: Any, dsums_N: torch.Tensor) -> tuple[Any, ...]:
        dh, grads, members = ctx.kept
        ctx.kept = None
        factor = dsums_N.view(-1, 1, 1)
        # a gradient without a member axis belongs to a trained weight, so there is one member
        scaled = [g * (factor[at] if g.dim() == 3 else dsums_N[0]) for g, at in zip(grads, members)]
        return dh * factor, None, None, None, None, *scaled


class HeadLogP(torch.autograd.Function):
    """Unembedding and log-softmax in chunks of rows: h [N, M, H] -> log p of the targets [N, M].

    For losses whose weights depend on log p; the backward pass computes the logits again.
    """

    @staticmethod
    def forward(
        ctx: Any, h_NMH: torch.Tensor, group: Group, targets_NM: torch.Tensor, *params: torch.Tensor
    ) -> torch.Tensor:
        ctx.kept = (h_NMH, group, targets_NM)
        ctx.save_for_backward(*params)  # autograd then raises if one changes before the backward
        found = [
            F.log_softmax(group.forward(part)[0], -1, dtype=h_NMH.dtype).gather(2, target)[..., 0]
            for part, target in _chunks(h_NMH, group, targets_NM)
        ]
        return torch.cat(found, 1)

    @staticmethod
    def backward(ctx: Any, dlog_p_NM: torch.Tensor) -> tuple[Any, ...]:
        _ = ctx.saved_tensors
        h_NMH, group, targets_NM = ctx.kept
        ctx.kept = None
        parts: list[torch.Tensor] = []
        grads: list[torch.Tensor] = []
        at = 0
        for part, target in _chunks(h_NMH, group, targets_NM):
            dlog_p = dlog_p_NM[:, at : at + part.shape[1], None]
            at += part.shape[1]
            logits, low = group.forward(part)
            # d log p_t / d logits = [target] - p
            dlogits = F.softmax(logits, -1, dtype=h_NMH.dtype).mul_(-dlog_p)
            dlogits.scatter_add_(2, target, dlog_p)
            dpart, more = group.backward(dlogits.to(group.dtype), part, low)
            parts.append(dpart.to(h_NMH.dtype))
            grads = more if not grads else [a.add_(b) for a, b in zip(grads, more)]
        return torch.cat(parts, 1), None, None, *grads


def _chunks(
    h_NMH: torch.Tensor, group: Group, targets_NM: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the hidden states in the compute type, and their targets [N, m, 1], by chunks of M."""
    h = h_NMH.to(group.dtype)
    rows = _chunk_rows(h, group.w_OH.shape[0])
    for c in range(0, h.shape[1], rows):
        yield h[:, c : c + rows].contiguous(), targets_NM[:, c : c + rows, None]


def _chunk_rows(h_NMH: torch.Tensor, vocab: int) -> int:
    """Return the positions of a member whose logits are computed at once.

    In fp32 it does not depend on the pack, so that a member's sums round in the same way in every
    pack. In bf16 rounding is coarser than that, and a chunk that fits the cache is faster.
    """
    share = LOGITS // h_NMH.shape[0] if h_NMH.dtype == torch.bfloat16 else LOGITS
    return max(PAD_TO, share // vocab // PAD_TO * PAD_TO)
