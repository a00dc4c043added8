"""Modules that hold the adapters of all runs of a pack around frozen weights.

The product with the frozen weights is computed once for all runs. Tokens for experts are sorted by
expert and run, and each product is one call over all experts.

Shapes: N runs of the pack, n runs of one rank, E matrices of a stack (1 for a single matrix), r
rank, I inputs, O outputs. Hidden states are [N * B, T, I], sorted by run, so the rest of the model
needs no change. In products of experts: X tokens of all runs, sorted by run; k active experts of a
token; S = X k pairs of a token and one of its experts; H hidden; G groups of pairs, K inputs.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from lorasweep.methods.trainables import whole

ALIGNED_BYTES = 16
"""The size of a row for torch's grouped_mm must be a multiple of this."""
GROUPED = (torch.float32, torch.bfloat16, torch.float16)
"""Types that torch's grouped_mm computes in."""


class Factors(nn.Module):
    """The factors of scaling_n B_ne A_ne, for run n and matrix e of a stack.

    For each rank there is one A [n, E r, I], one B [n, E O, r], and in `ranks` the slice of runs
    that they hold. For a factor that all matrices of a stack share, E is 1.
    """

    def __init__(
        self,
        ranks: list[slice],
        a: Sequence[torch.Tensor],
        b: Sequence[torch.Tensor],
        scaling_N: torch.Tensor,
        stacked_a: int = 1,
        stacked_b: int = 1,
        base: nn.Module | None = None,
    ) -> None:
        """Hold the tensors; `stacked_a`, `stacked_b`: E of A and B; `base`: the replaced module."""
        super().__init__()
        self.ranks = ranks
        self.scaling_N: torch.Tensor
        self.register_buffer("scaling_N", scaling_N, persistent=False)
        self.A, self.B = nn.ParameterList(a), nn.ParameterList(b)
        self.stacked_a, self.stacked_b = stacked_a, stacked_b
        self.base: Any = base

    def of_matrices(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Yield for each rank its runs, A as [n, E, r, I] and B as [n, E, O, r]."""
        for runs, a, b in zip(self.ranks, self.A, self.B):
            a_nErI = whole(a).unflatten(1, (self.stacked_a, -1))
            yield runs, a_nErI, whole(b).unflatten(1, (self.stacked_b, -1))

    def keep(self, runs: list[int]) -> dict[str, tuple[str, list[int]]]:
        """Drop runs as Trainables.keep does. A tensor's name is 'A' or 'B' with its first run."""
        renamed: dict[str, tuple[str, list[int]]] = {}
        ranks, a, b, start = [], [], [], 0
        for span, old_a, old_b in zip(self.ranks, self.A, self.B):
            rows = [k - span.start for k in runs if span.start <= k < span.stop]
            if not rows:
                continue
            ranks.append(slice(start, start + len(rows)))
            a.append(nn.Parameter(old_a.detach()[rows].clone()))
            b.append(nn.Parameter(old_b.detach()[rows].clone()))
            for which in "AB":
                renamed[f"{which}{start}"] = (f"{which}{span.start}", rows)
            start += len(rows)
        self.ranks, self.A, self.B = ranks, nn.ParameterList(a), nn.ParameterList(b)
        self.scaling_N = self.scaling_N[runs].clone()
        return renamed


class LowRank(torch.autograd.Function):
    """y + scaling_n B_n A_n x for the runs n of one rank.

    Autograd itself would multiply in an order in which one result has only r columns. On a CPU
    these products take up to seven times as long as their transposes here (docs/log).
    """

    @staticmethod
    def forward(
        ctx: Any,
        y_nXO: torch.Tensor,
        x_nXI: torch.Tensor,
        a_nrI: torch.Tensor,
        b_nOr: torch.Tensor,
        scaling_n: torch.Tensor,
    ) -> torch.Tensor:
        low_nXr = torch.bmm(x_nXI, a_nrI.mT)
        dtype = low_nXr.dtype  # under autocast not that of x
        low_nXr = (low_nXr * scaling_n).to(dtype)
        ctx.save_for_backward(x_nXI.to(dtype), a_nrI, b_nOr, low_nXr, scaling_n)
        return torch.baddbmm(y_nXO, low_nXr, b_nOr.mT)

    @staticmethod
    def backward(ctx: Any, grad_nXO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, a, b, low, scaling = (t.to(grad_nXO.dtype) for t in ctx.saved_tensors)
        low_grad_nrX = torch.bmm(b.mT, grad_nXO.mT) * scaling
        grad_x = torch.bmm(low_grad_nrX.mT, a) if ctx.needs_input_grad[1] else None
        grad_a, grad_b = torch.bmm(low_grad_nrX, x), torch.bmm(low.mT, grad_nXO).mT
        return grad_nXO, grad_x, grad_a, grad_b, None


class StackedLinear(Factors):
    """y = W x + scaling_n B_n A_n x for run n, with W (and bias) frozen."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        n = len(self.scaling_N)
        x_NXI, y_NXO = x.reshape(n, -1, x.shape[-1]), y.reshape(n, -1, y.shape[-1])
        parts = []
        for runs, a, b in zip(self.ranks, self.A, self.B):
            scaling = self.scaling_N[runs].view(-1, 1, 1)
            parts.append(LowRank.apply(y_NXO[runs], x_NXI[runs], a, b, scaling))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(y.shape)


class StackedRouter(Factors):
    """A router with an adapter per run. It computes every run's merged weight, which is small."""

    def forward(self, x: torch.Tensor) -> Any:
        deltas = [b @ a for many_a, many_b in zip(self.A, self.B) for a, b in zip(many_a, many_b)]
        rows = x.reshape(-1, x.shape[-1]).chunk(len(deltas))
        weight = self.base.weight
        parts = [
            functional_call(self.base, {"weight": weight + scaling * delta}, (own,))
            for own, scaling, delta in zip(rows, self.scaling_N, deltas)
        ]
        return tuple(torch.cat(found) for found in zip(*parts))


# ---------------------------------------------------------------- experts


class StackedExperts(nn.Module):
    """A layer's frozen experts with the adapters of a pack: separate ones for gate, up and down."""

    def __init__(self, base: Any, gate_proj: Factors, up_proj: Factors, down_proj: Factors) -> None:
        super().__init__()
        self.base = base
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj

    @property
    def n_runs(self) -> int:
        """Number of runs in the pack."""
        return len(self.gate_proj.scaling_N)

    def forward(
        self, x_XH: torch.Tensor, chosen_Xk: torch.Tensor, weight_Xk: torch.Tensor
    ) -> torch.Tensor:
        return experts_forward(self.base, x_XH, chosen_Xk, weight_Xk, self)


def _adapted(
    factors: Factors, n_experts: int, x_SK: torch.Tensor, run_S: torch.Tensor, ends_G: torch.Tensor
) -> torch.Tensor:
    """Return scaling B A x of a stack of matrices, [S, O]; pairs are sorted by expert and run."""
    # All ranks are padded to the largest one, and to aligned rows: zeros add nothing.
    step = max(1, ALIGNED_BYTES // x_SK.element_size())
    rank = -(-max(b.shape[-1] for b in factors.B) // step) * step
    parts = []
    for _, a, b in factors.of_matrices():
        more = rank - b.shape[-1]
        parts.append((F.pad(a, (0, 0, 0, more)), F.pad(b, (0, more))))
    a, b = (torch.cat(p).to(x_SK.dtype).transpose(0, 1) for p in zip(*parts))  # [E, N, ...]
    a_GrK, b_GOr = (t.expand(n_experts, *t.shape[1:]).reshape(-1, *t.shape[2:]) for t in (a, b))
    low = grouped_product(x_SK, a_GrK, ends_G) * factors.scaling_N[run_S][:, None]
    return grouped_product(low.to(x_SK.dtype), b_GOr, ends_G)


def grouped_product(x_SK: torch.Tensor, w_GOK: torch.Tensor, ends_G: torch.Tensor) -> torch.Tensor:
    """Multiply each group of rows by its matrix, [S, O]; group g ends before row `ends_G[g]`.

    Before torch 2.10, which has no F.grouped_mm, the groups are multiplied one after another.
    """
    sizes = {n * x_SK.element_size() % ALIGNED_BYTES for n in w_GOK.shape[1:]}
    if x_SK.dtype in GROUPED and sizes == {0} and hasattr(F, "grouped_mm"):
        return F.grouped_mm(x_SK, w_GOK.mT, offs=ends_G)
    counts = ends_G.diff(prepend=ends_G.new_zeros(1)).tolist()
    return torch.cat([x @ w.mT for x, w in zip(x_SK.split(counts), w_GOK)])


def experts_forward(
    experts: Any,
    x_XH: torch.Tensor,
    chosen_Xk: torch.Tensor,
    weight_Xk: torch.Tensor,
    adapters: StackedExperts | None = None,
) -> torch.Tensor:
    """Return the weighted sum of each token's experts, [X, H].

    Without `adapters`, transformers can use this function as its experts implementation. Under
    autocast the products are computed in the autocast type, as in an nn.Linear.
    """
    kind, n_experts = x_XH.device.type, experts.gate_up_proj.shape[0]
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_XH.dtype
    n_runs, (n_tokens, k) = 1 if adapters is None else adapters.n_runs, chosen_Xk.shape
    run_X = torch.arange(n_tokens, device=x_XH.device) // (n_tokens // n_runs)
    groups_S, order_S = (chosen_Xk * n_runs + run_X[:, None]).flatten().sort(stable=True)
    all_G = torch.arange(n_experts * n_runs, device=x_XH.device)
    ends_G = torch.searchsorted(groups_S, all_G, right=True).to(torch.int32)
    ends_E = ends_G[n_runs - 1 :: n_runs].contiguous()
    x_SH = x_XH.to(dtype)[order_S // k]
    with torch.autocast(kind, enabled=False):
        y = grouped_product(x_SH, experts.gate_up_proj.to(dtype), ends_E)
        sorted_by = groups_S % n_runs, ends_G
        if adapters is not None:
            pair = adapters.gate_proj, adapters.up_proj
            y = y + torch.cat([_adapted(f, n_experts, x_SH, *sorted_by) for f in pair], -1)
        inner = experts._apply_gate(y)  # the model's own activation
        out = grouped_product(inner, experts.down_proj.to(dtype), ends_E)
        if adapters is not None:
            out = out + _adapted(adapters.down_proj, n_experts, inner, *sorted_by)
        out = out * weight_Xk.flatten()[order_S][:, None]
        back = torch.empty_like(order_S).scatter_(
            0, order_S, torch.arange(len(order_S), device=order_S.device)
        )
        return out[back].view(n_tokens, k, -1).sum(1).to(x_XH.dtype)
