"""The NLL of a batch for every member of a pack, summed or token by token.

Shapes: N members, R rows, P positions, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
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
    arrays, members = inputs(batch, device), len(batch.lengths)
    parts = _by_chunks(model, arrays, precision, device, partial(_sums, members=members))
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def token_log_p(model: "nn.Module", batch: Batch, precision: str) -> torch.Tensor:
    """Return log p of each target in nats, [N, M], on the model's device; 0 at filler."""
    device = next(model.parameters()).device
    real_NM = torch.from_numpy(batch.weight_NM > 0).to(device)
    passes = cpu_llama_for(model)
    if passes is not None:
        return passes.token_log_p(batch, COMPUTE_DTYPES[precision]) * real_NM
    arrays = inputs(batch, device)
    log_p_RP = torch.cat(_by_chunks(model, arrays, precision, device, _log_p), 1)
    # rows are in the order of the members, and positions in the order of the rows
    found = torch.zeros(real_NM.shape, dtype=log_p_RP.dtype, device=device)
    return found.masked_scatter(real_NM, log_p_RP[arrays[3] > 0])


def _by_chunks(
    model: "nn.Module",
    arrays: tuple[Any, ...],
    precision: str,
    device: torch.device,
    measure: Callable[..., torch.Tensor],
) -> list[torch.Tensor]:
    """Return measure(logits [R, p, V], targets [R, p], weights [R, p]) of chunks of positions."""
    tokens, positions, targets, weight, at = arrays
    rows, width = positions.shape
    config: Any = model.config
    most = LOGITS if device.type == "cpu" else GPU_LOGITS
    step = max(1, most // (rows * config.get_text_config().vocab_size))
    if step >= width:
        with autocast(precision, device):
            logits = model(
                input_ids=tokens, position_ids=at, logits_to_keep=positions, use_cache=False
            ).logits
        return [measure(logits, targets, weight)]

    def part(hidden: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        with autocast(precision, device):
            # contiguous: of a slice, a product would take one copy of the weight per row
            return measure(logits_of(model, hidden.contiguous()), targets, weight)

    with autocast(precision, device):
        hidden = hidden_states(model, tokens, positions, at)
    # the backward pass computes a chunk's logits again: kept, they would be whole after all
    return [
        checkpoint(part, *chunk, use_reentrant=False, preserve_rng_state=False)
        for chunk in zip(*(x.split(step, 1) for x in (hidden, targets, weight)))
    ]


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
    nll_RP = -_log_p(logits_RPV, targets_RP, weight_RP)
    return (nll_RP.flatten() * weight_RP.flatten().to(nll_RP.dtype)).view(members, -1).sum(1)


def _log_p(
    logits_RPV: torch.Tensor, targets_RP: torch.Tensor, weight_RP: torch.Tensor
) -> torch.Tensor:
    """Return log p of each target, [R, P]."""
    if logits_RPV.dtype in (torch.bfloat16, torch.float16):
        logits_RPV = logits_RPV.float()
    nll = F.cross_entropy(logits_RPV.flatten(0, 1), targets_RP.flatten(), reduction="none")
    return -nll.view(targets_RP.shape)
