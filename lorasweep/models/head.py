"""The two halves of a causal language model: hidden states, and logits from them.

The second half is the model's own forward pass over states that are already there, so softcaps,
scalings and adapters of any family stay as they are. Refuses to know losses.

Shapes: R rows, T tokens, P positions, H hidden, V vocabulary.
"""

from typing import Any

import torch
from torch import nn

from lorasweep.errors import ModelError


def hidden_states(model: Any, tokens_RT: torch.Tensor, positions_RP: torch.Tensor) -> torch.Tensor:
    """Return the decoder's output at `positions_RP`, [R, P, H]."""
    states_RTH = model.base_model(input_ids=tokens_RT, use_cache=False).last_hidden_state
    at = positions_RP[..., None].expand(-1, -1, states_RTH.shape[-1])
    return states_RTH.gather(1, at)


def logits_of(model: Any, hidden_RPH: torch.Tensor) -> torch.Tensor:
    """Return the model's logits [R, P, V] for its decoder's output [R, P, H].

    Raises:
        ModelError: the model's forward pass does not call its decoder.
    """
    name = model.base_model_prefix
    decoder, computed = getattr(model, name), _Computed(hidden_RPH)
    setattr(model, name, computed)
    try:
        logits = model(inputs_embeds=hidden_RPH, use_cache=False).logits
    finally:
        setattr(model, name, decoder)
    if not computed.called:
        raise ModelError(
            f"{type(model).__name__} does not compute logits from the output of its module "
            f"{name!r}, so they cannot be computed in parts. Choose another model, or a smaller "
            "exec.micro_batch_size."
        )
    return logits


class _Computed(nn.Module):
    """Takes a decoder's place and returns its output, computed before."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden, self.called = hidden, False

    def forward(self, **_: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPast

        self.called = True
        return BaseModelOutputWithPast(last_hidden_state=self.hidden)
