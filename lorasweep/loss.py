"""The one loss of every arm: nats per loss-bearing token, a token-weighted mean over a member's whole batch.

Sums are kept apart from counts and divided once, so micro-batches change nothing but rounding.
Shapes: N members, B sequences a member, T tokens, P predicted places, V vocabulary.
"""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F

from lorasweep.data.batches import Batch

DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}
"""Type of the master weights by precision: bf16 is autocast over fp32 weights, in every arm."""


def autocast(precision: str, device: torch.device) -> Any:
    """Return the context in which forward passes run."""
    if precision != "bf16":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def to_device(batch: Batch, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Return (tokens_BT, places_BP, targets_BP, weight_BP) as tensors."""
    arrays = (batch.tokens_BT, batch.places_BP, batch.targets_BP, batch.weight_BP)
    return tuple(torch.from_numpy(a).to(device) for a in arrays)


def nll_sums(model: Any, tensors: tuple[torch.Tensor, ...], n_members: int, precision: str) -> torch.Tensor:
    """Return the summed NLL in nats of each member, [N], over rows laid out member by member, [N*B, ...].

    Logits are computed only at the places where the loss looks.
    """
    tokens, places, targets, weight = tensors
    with autocast(precision, tokens.device):
        logits = model(input_ids=tokens, logits_to_keep=places, use_cache=False).logits
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (nll * weight.flatten().to(nll.dtype)).view(n_members, -1).sum(1)


@torch.no_grad()
def evaluate(model: Any, batches: list[Batch], n_members: int, precision: str, device: torch.device) -> list[float]:
    """Return the NLL in nats per loss-bearing token of each member over held-out batches (sum over sum)."""
    total = torch.zeros(n_members, dtype=torch.float64)
    for batch in batches:
        tensors = to_device(batch, device)
        if n_members > 1:
            tensors = tuple(t.repeat(n_members, 1) for t in tensors)
        total += nll_sums(model, tensors, n_members, precision).double().cpu()
    return (total / sum(b.n_loss for b in batches)).tolist()
