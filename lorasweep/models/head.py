"""The two halves of a causal language model: hidden states, and logits from them.

The second half is the model's own forward pass over states that are already there, so softcaps,
scalings and adapters of any family stay as they are. Refuses to know losses.

Shapes: R rows, T tokens, P positions, H hidden, V vocabulary.
"""

from typing import Any

import torch
from torch import nn

from lorasweep.errors import ModelError

ROUNDING = 0.03
"""Of the largest output: more than bf16 rounds, far less than another row's tokens change."""


def hidden_states(
    model: Any,
    tokens_RT: torch.Tensor,
    positions_RP: torch.Tensor,
    position_ids_RT: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the decoder's output at `positions_RP`, [R, P, H].

    `position_ids_RT`: of several sequences in a row, see `lorasweep.data.batches.joined`.
    """
    states_RTH = model.base_model(
        input_ids=tokens_RT, position_ids=position_ids_RT, use_cache=False
    ).last_hidden_state
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


@torch.no_grad()
def check_rows_stay_apart(model: Any) -> None:
    """Check that in joined rows a token's output does not depend on another row's tokens.

    Raises:
        ModelError: it does: the model's attention does not read where rows start.
    """
    tokens_RT = torch.tensor([[1, 2, 3, 4, 5, 6], [4, 3, 2, 4, 5, 6]])  # the second row is the same
    device = next(model.parameters()).device
    position_ids_RT = torch.arange(3).repeat(2, 2).to(device)
    second_RP = torch.tensor([[3, 4, 5]] * 2, device=device)
    one, other = hidden_states(model, tokens_RT.to(device), second_RP, position_ids_RT).float()
    if not torch.allclose(one, other, rtol=0.0, atol=ROUNDING * float(one.abs().max())):
        raise ModelError(
            f"{type(model).__name__} lets joined rows attend to each other with "
            f"attn_implementation={model.config._attn_implementation!r}. Set exec.join_rows=false."
        )


class _Computed(nn.Module):
    """Takes a decoder's place and returns its output, computed before."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden, self.called = hidden, False

    def forward(self, **_: Any) -> Any:
        from transformers.modeling_outputs import MoeModelOutputWithPast

        self.called = True
        return MoeModelOutputWithPast(last_hidden_state=self.hidden)  # dense ones ask for less
