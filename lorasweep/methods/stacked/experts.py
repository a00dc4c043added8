"""Experts of a layer with the adapters of a whole pack, and the router with them.

The experts' weights are stacks, and tokens are sorted by expert: each product is one call over all
experts. With adapters they are sorted by expert and member, so that the product with the frozen
weights is computed once for all members. Knows transformers' modules of experts by their weights
(`lorasweep.methods.trainables.Experts`); refuses to know where they sit.

Shapes: N members, E experts, X tokens of all members, sorted by member; k active experts of a
token, S = X k pairs of a token and one of its experts; H hidden, I width of an expert, r rank of
an expert, G groups of pairs, K inputs and O outputs of a product.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from lorasweep.methods.stacked.factors import Factors

ALIGNED_BYTES = 16
"""torch's grouped_mm wants rows of a multiple of this size."""
GROUPED = (torch.float32, torch.bfloat16, torch.float16)
"""Types that torch's grouped_mm computes in."""


def grouped_product(x_SK: torch.Tensor, w_GOK: torch.Tensor, ends_G: torch.Tensor) -> torch.Tensor:
    """Multiply consecutive groups of rows by a matrix each, [S, O]; `ends_G`: where groups end."""
    sizes = {n * x_SK.element_size() % ALIGNED_BYTES for n in w_GOK.shape[1:]}
    if x_SK.dtype in GROUPED and sizes == {0}:
        return F.grouped_mm(x_SK, w_GOK.mT, offs=ends_G)
    counts = ends_G.diff(prepend=ends_G.new_zeros(1)).tolist()
    return torch.cat([x @ w.mT for x, w in zip(x_SK.split(counts), w_GOK)])


class _Added:
    """Adapters of one stack of matrices, laid out for pairs sorted by expert and member."""

    def __init__(
        self, factors: Factors, n_experts: int, member_S: torch.Tensor, dtype: torch.dtype
    ) -> None:
        """Pad all ranks to the largest, and to rows that are aligned: zeros add nothing."""
        step = max(1, ALIGNED_BYTES // dtype.itemsize)
        largest = max(b.shape[-1] for b in factors.B)
        rank = -(-largest // step) * step
        parts = []
        for _, a, b in factors.of_matrices():
            more = rank - b.shape[-1]
            parts.append((F.pad(a, (0, 0, 0, more)), F.pad(b, (0, more))))
        a, b = (torch.cat(p).to(dtype).transpose(0, 1) for p in zip(*parts))  # [E, N, ...]
        self.a_GrK, self.b_GOr = (
            t.expand(n_experts, *t.shape[1:]).reshape(-1, *t.shape[2:]) for t in (a, b)
        )
        self.scaling_S1 = factors.scaling_N[member_S][:, None]

    def __call__(self, x_SK: torch.Tensor, ends_G: torch.Tensor) -> torch.Tensor:
        low = grouped_product(x_SK, self.a_GrK, ends_G)
        return grouped_product((low * self.scaling_S1).to(low.dtype), self.b_GOr, ends_G)


def experts_forward(
    experts: Any,
    x_XH: torch.Tensor,
    chosen_Xk: torch.Tensor,
    weight_Xk: torch.Tensor,
    adapters: "StackedExperts | None" = None,
) -> torch.Tensor:
    """Return the weighted sum of each token's experts, [X, H].

    The signature, without `adapters`, is that of transformers' implementations of experts. Under
    autocast the products are in its type, as those of an nn.Linear are.
    """
    kind, n_experts = x_XH.device.type, experts.gate_up_proj.shape[0]
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_XH.dtype
    members, (n_tokens, k) = 1 if adapters is None else adapters.members, chosen_Xk.shape
    member_X = torch.arange(n_tokens, device=x_XH.device) // (n_tokens // members)
    groups_S = (chosen_Xk * members + member_X[:, None]).flatten()
    groups_S, order_S = groups_S.sort(stable=True)
    all_G = torch.arange(n_experts * members, device=x_XH.device)
    ends_G = torch.searchsorted(groups_S, all_G, right=True).to(torch.int32)
    ends_E = ends_G[members - 1 :: members].contiguous()
    x_SH = x_XH.to(dtype)[order_S // k]
    with torch.autocast(kind, enabled=False):
        y = grouped_product(x_SH, experts.gate_up_proj.to(dtype), ends_E)
        if adapters is not None:
            gate, up, down = adapters.added(groups_S % members, dtype)
            y = y + torch.cat([gate(x_SH, ends_G), up(x_SH, ends_G)], -1)
        inner = experts._apply_gate(y)  # the model's own activation
        out = grouped_product(inner, experts.down_proj.to(dtype), ends_E)
        if adapters is not None:
            out = out + down(inner, ends_G)
        out = out * weight_Xk.flatten()[order_S][:, None]
        back = torch.empty_like(order_S).scatter_(
            0, order_S, torch.arange(len(order_S), device=order_S.device)
        )
        return out[back].view(n_tokens, k, -1).sum(1).to(x_XH.dtype)


class StackedExperts(nn.Module):
    """A layer's frozen experts with the adapters of a pack: separate ones for gate, up and down."""

    def __init__(self, base: Any, gate_proj: Factors, up_proj: Factors, down_proj: Factors) -> None:
        super().__init__()
        self.base = base
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj

    @property
    def members(self) -> int:
        """Number of members of the pack."""
        return len(self.gate_proj.scaling_N)

    def added(self, member_S: torch.Tensor, dtype: torch.dtype) -> list[_Added]:
        """Lay out the adapters of gate, up and down for pairs of these members."""
        n_experts = len(self.base.down_proj)
        three = (self.gate_proj, self.up_proj, self.down_proj)
        return [_Added(factors, n_experts, member_S, dtype) for factors in three]

    def forward(
        self, x_XH: torch.Tensor, chosen_Xk: torch.Tensor, weight_Xk: torch.Tensor
    ) -> torch.Tensor:
        return experts_forward(self.base, x_XH, chosen_Xk, weight_Xk, self)


class StackedRouter(Factors):
    """A router with an adapter a member. Its weight is small, so each member's is made whole."""

    def __init__(
        self,
        base: nn.Module,
        ranks: list[slice],
        a_nrI: Sequence[torch.Tensor],
        b_nOr: Sequence[torch.Tensor],
        scaling_N: torch.Tensor,
    ) -> None:
        super().__init__(ranks, a_nrI, b_nOr, scaling_N)
        self.base = base

    def forward(self, x: torch.Tensor) -> Any:
        deltas = [b @ a for many_a, many_b in zip(self.A, self.B) for a, b in zip(many_a, many_b)]
        rows = x.reshape(-1, x.shape[-1]).chunk(len(deltas))
        weight = self.base.weight
        parts = [
            functional_call(self.base, {"weight": weight + scaling * delta}, (own,))
            for own, scaling, delta in zip(rows, self.scaling_N, deltas)
        ]
        return tuple(torch.cat(found) for found in zip(*parts))
