"""The stacked LoRA module: N members' adapters around one frozen nn.Linear.

The base product is computed once for all members. Knows tensors; refuses to know the training loop.

Shapes: N members, B sequences per member, T tokens, r rank, I inputs, O outputs. Hidden states are
[N*B, T, I], sorted by member, so the rest of the model needs no change.
"""

from collections.abc import Sequence

import torch
from torch import nn

from lorasweep.methods.stacked.factors import Factors


class StackedLinear(Factors):
    """y = W x + scaling_n B_n A_n x for member n, with W (and bias) frozen."""

    def __init__(
        self,
        base: nn.Linear,
        ranks: list[slice],
        a_nrI: Sequence[torch.Tensor],
        b_nOr: Sequence[torch.Tensor],
        scaling_N: torch.Tensor,
    ) -> None:
        super().__init__(ranks, a_nrI, b_nOr, scaling_N)
        self.base = base

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        n = len(self.scaling_N)
        x_NXI, y_NXO = x.reshape(n, -1, x.shape[-1]), y.reshape(n, -1, y.shape[-1])
        parts = []
        for members, a, b in zip(self.ranks, self.A, self.B):
            low = torch.bmm(x_NXI[members], a.mT) * self.scaling_N[members].view(-1, 1, 1)
            parts.append(torch.baddbmm(y_NXO[members], low, b.mT))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(y.shape)
