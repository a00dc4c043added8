"""The summed NLL of a batch, for every member of a pack.

Shapes: N members, R rows, P positions, V vocabulary.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lorasweep.data.batches import Batch, joined, padded
from lorasweep.models.cpu_llama.model import cpu_llama_for
from lorasweep.models.head import hidden_states, logits_of
from lorasweep.models.precision import COMPUTE_DTYPES, autocast

if TYPE_CHECKING:
    from torch import nn

LOGITS, GPU_LOGITS = 1 << 24, 1 << 26
"""Logits that transformers' passes compute at once. On a GPU that is half a thousand positions of a
vocabulary of 128,256 and about 1.3 GB with what the loss needs. Assumption: not measured on a GPU.
"""


def nll_sums(model: "nn.Module", batch: Batch, precision: str) -> torch.Tensor:
    """Return the summed NLL in nats of each member, [N], on the model's device.

    Logits are computed at the loss positions only, and never more than a chunk of them at once.
    """
    passes = cpu_llama_for(model)
    if passes is not None:
        return passes.nll_sums(batch, COMPUTE_DTYPES[precision])
    device = next(model.parameters()).device
    tokens, positions, targets, weight, at = inputs(batch, device)
    members, (rows, width) = len(batch.lengths), positions.shape
    config: Any = model.config
    most = LOGITS if device.type == "cpu" else GPU_LOGITS
    step = max(1, most // (rows * config.get_text_config().vocab_size))
    if step >= width:
        with autocast(precision, device):
            logits = model(
                input_ids=tokens, position_ids=at, logits_to_keep=positions, use_cache=False
            ).logits
        return _sums(logits, targets, weight, members)

    def part(hidden: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        with autocast(precision, device):
            # contiguous: of a slice, a product would take one copy of the weight per row
            return _sums(logits_of(model, hidden.contiguous()), targets, weight, members)

    with autocast(precision, device):
        hidden = hidden_states(model, tokens, positions, at)
    sums = []
    for chunk in zip(*(x.split(step, 1) for x in (hidden, targets, weight))):
        # the backward pass computes a chunk's logits again: kept, they would be whole after all
        sums.append(checkpoint(part, *chunk, use_reentrant=False, preserve_rng_state=False))
    return torch.stack(sums).sum(0)


def inputs(batch: Batch, device: torch.device) -> tuple[Any, ...]:
    """Return tokens [R, T], and loss positions, targets and weights [R, P], on the device.

    The fifth is each token's position in its row, [R, T]; None for padded rows.
    """
    if batch.join_rows:
        return tuple(torch.from_numpy(a).to(device) for a in joined(batch))
    return *(torch.from_numpy(a).to(device) for a in padded(batch)), None


def _sums(
    logits_RPV: torch.Tensor, targets_RP: torch.Tensor, weight_RP: torch.Tensor, members: int
) -> torch.Tensor:
    """Return each member's summed cross-entropy, [N]; its rows are neighbours."""
    if logits_RPV.dtype in (torch.bfloat16, torch.float16):
        logits_RPV = logits_RPV.float()
    nll = F.cross_entropy(logits_RPV.flatten(0, 1), targets_RP.flatten(), reduction="none")
    return (nll * weight_RP.flatten().to(nll.dtype)).view(members, -1).sum(1)
