"""Unembedding and cross-entropy on a CPU: hidden states -> summed losses, and the gradient in the
same pass.

The whole of the logits never exists: at a vocabulary of 49,152 they are what a small batch spends
its time on.
Shapes: N members, M loss positions a member, H hidden, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F

from lorasweep.data.batches import PAD_TO
from lorasweep.models.cpu_llama.linears import Group

LOGITS = 1 << 24
"""Logits in one chunk of the unembedding: 64 MB, large enough for the products, small enough for
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
        need = grad and any(ctx.needs_input_grad)  # the latter is so under no_grad too
        h = h_NMH.to(group.dtype)
        sums = torch.zeros(n, dtype=h_NMH.dtype, device=h.device)
        dh = torch.empty_like(h_NMH) if need else None
        kept = (
            torch.empty(n, m, vocab, dtype=h.dtype, device=h.device)
            if need and group.trained
            else None
        )
        grads: list[torch.Tensor] = []
        # In fp32 a member's sums are cut at the same rows in every pack; in bf16 rounding is
        # coarser than that, and a chunk that fits the cache is faster.
        share = LOGITS // n if h.dtype == torch.bfloat16 else LOGITS
        rows = max(PAD_TO, share // vocab // PAD_TO * PAD_TO)
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
            if kept is not None:
                kept[:, c : c + rows] = dlogits
            dpart, more = group.backward(dlogits, part, low, weights=False)
            dh[:, c : c + rows] = dpart
            grads = more if not grads else [a.add_(b) for a, b in zip(grads, more)]
        if kept is not None:  # one product over all rows: sums of rounded chunks would lose digits
            grads = [
                torch.mm(kept.view(n * m, -1).T, h.view(n * m, -1)).to(group.trained[0].dtype),
                *grads,
            ]
        ctx.kept = (
            dh,
            grads,
            [slice(None)] * len(group.trained) + [r.members for r in group.ranks for _ in r.params],
        )
        return sums

    @staticmethod
    def backward(ctx: Any, dsums_N: torch.Tensor) -> tuple[Any, ...]:
        dh, grads, members = ctx.kept
        ctx.kept = None
        factor = dsums_N.view(-1, 1, 1)
        # a gradient without a member axis is a trained weight's: one member
        scaled = [g * (factor[at] if g.dim() == 3 else dsums_N[0]) for g, at in zip(grads, members)]
        return dh * factor, None, None, None, None, *scaled
