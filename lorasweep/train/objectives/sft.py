"""The one loss of every arm: nats per loss-bearing token, a token-weighted mean over a member's
whole batch.

Sums are kept apart from counts and divided once, so micro-batches change nothing but rounding.
Shapes: N members, X tokens a member, M places a member where the loss looks, H hidden, V
vocabulary.
"""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F

from lorasweep.data.batches import PAD_TO, Batch, merge, padded
from lorasweep.models.cpu_llama.decoder import lean_for
from lorasweep.models.cpu_llama.linears import Group

DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}
"""Type of the master weights by precision: bf16 is autocast over fp32 weights, in every arm."""
LOGITS = 1 << 24
"""Logits in one chunk of the unembedding: 64 MB, large enough for the products, small enough for
the cache."""


def autocast(precision: str, device: torch.device) -> Any:
    """Return the context in which transformers' forward passes run."""
    if precision != "bf16":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def nll_sums(model: Any, batch: Batch, precision: str) -> torch.Tensor:
    """Return the summed NLL in nats of each member, [N], on the model's device.

    Logits are computed only where the loss looks.
    """
    lean = lean_for(model)
    if lean is None:
        return _nll_sums_of_any_model(model, batch, precision)
    dtype = torch.bfloat16 if precision == "bf16" else DTYPES[precision]
    n, x = batch.tokens_NX.shape
    hidden_NXH = lean.hidden(batch, dtype)
    at = torch.from_numpy(batch.places_NM) + torch.arange(n)[:, None] * x
    h_NMH = lean.normed(hidden_NXH.flatten(0, 1).index_select(0, at.flatten())).view(
        n, at.shape[1], -1
    )
    group = lean.head_group(dtype)
    weight = torch.from_numpy(batch.weight_NM).to(h_NMH.dtype)
    return _HeadNll.apply(
        h_NMH,
        group,
        torch.from_numpy(batch.targets_NM),
        weight,
        torch.is_grad_enabled(),
        *group.params,
    )


def _nll_sums_of_any_model(model: Any, batch: Batch, precision: str) -> torch.Tensor:
    device = next(model.parameters()).device
    tokens, places, targets, weight = (torch.from_numpy(a).to(device) for a in padded(batch))
    with autocast(precision, device):
        logits = model(input_ids=tokens, logits_to_keep=places, use_cache=False).logits
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (nll * weight.flatten().to(nll.dtype)).view(len(batch.lengths), -1).sum(1)


class _HeadNll(torch.autograd.Function):
    """Unembedding and cross-entropy in chunks: h [N, M, H] -> summed NLL [N], and its gradient in
    the same pass.

    The whole of the logits never exists: at a vocabulary of 49,152 they are what a small batch
    spends its time on.
    """

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
        if (
            kept is not None
        ):  # one product over all places: sums of rounded chunks would lose digits
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


@torch.no_grad()
def evaluate(model: Any, batches: list[Batch], n_members: int, precision: str) -> list[float]:
    """Return the NLL in nats per loss-bearing token of each member over held-out batches (sum over
    sum)."""
    total = torch.zeros(n_members, dtype=torch.float64)
    for batch in batches:
        total += nll_sums(model, merge([batch] * n_members), precision).double().cpu()
    return (total / sum(b.n_loss for b in batches)).tolist()
