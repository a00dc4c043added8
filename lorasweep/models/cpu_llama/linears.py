"""The linears of a layer that share an input, as one product with a hand-written backward pass.

Knows nn.Linear and StackedLinear modules: frozen, trained or adapted. Refuses to know what a layer
does with them.

Shapes: N members (n of one rank), X tokens per member, H inputs, O outputs of all linears of the
group, r rank.
"""

from collections.abc import Callable

import torch
from torch import nn

from lorasweep.methods.stacked.linear import StackedLinear

Cast = Callable[[list[torch.Tensor]], tuple[torch.Tensor, torch.Tensor]]
"""Concatenates weights in the compute type; returns them as [O, H] and transposed as [H, O]."""


class Group:
    """The linears of one layer that share an input, as one product: y_i = W_i h + s B_i A_i h."""

    def __init__(
        self,
        modules: list[nn.Linear | StackedLinear],
        cast: Cast,
        dtype: torch.dtype,
    ) -> None:
        self.weights: list[torch.Tensor] = []
        adapted: list[tuple[slice, StackedLinear]] = []
        start = 0
        for module in modules:
            linear = module.base if isinstance(module, StackedLinear) else module
            self.weights.append(linear.weight)
            if isinstance(module, StackedLinear):
                adapted.append((slice(start, start + linear.out_features), module))
            start += linear.out_features
        (self.w_OH, self.w_HO), self.dtype = cast(self.weights), dtype
        self.trained = [w for w in self.weights if w.requires_grad]
        self.outputs = [where for where, _ in adapted]
        self.ranks = (
            [_Rank(adapted, k, dtype) for k in range(len(adapted[0][1].ranks))] if adapted else []
        )
        self.params = [*self.trained, *(p for rank in self.ranks for p in rank.params)]
        """Parameters with gradients, in the order in which `backward` returns these."""

    def forward(self, h_NXH: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return y [N, X, O], and for backward each rank's scaled A h [n, X, r of all modules]."""
        n, x, _ = h_NXH.shape
        y = torch.mm(h_NXH.view(n * x, -1), self.w_HO).view(n, x, -1)
        lows = []
        for rank in self.ranks:
            low = torch.bmm(h_NXH[rank.members], rank.a_nrH.mT).mul_(rank.scaling)
            for k, where in enumerate(self.outputs):
                y[rank.members, :, where].baddbmm_(low[..., rank.columns(k)], rank.b[k].mT)
            lows.append(low)
        return y, lows

    def backward(
        self,
        dy_NXO: torch.Tensor,
        h_NXH: torch.Tensor,
        lows: list[torch.Tensor],
        need_input: bool = True,
        into: torch.Tensor | None = None,
        weights: bool = True,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the gradients of h and of `params`.

        The gradient of h is added to `into` if that is given, and empty without `need_input`. Those
        of the trained weights are left out if `weights` is False.
        """
        n, x, _ = dy_NXO.shape
        dy_2d = dy_NXO.view(n * x, -1)
        if into is not None:
            dh = into
            dh.view(n * x, -1).addmm_(dy_2d, self.w_OH)
        elif need_input:
            dh = torch.mm(dy_2d, self.w_OH).view(n, x, -1)
        else:
            dh = dy_NXO.new_empty(0)
        grads: list[torch.Tensor] = []
        if self.trained and weights:
            whole = torch.mm(dy_2d.T, h_NXH.view(n * x, -1))
            parts = whole.split([w.shape[0] for w in self.weights])
            grads += [part.to(w.dtype) for w, part in zip(self.weights, parts) if w.requires_grad]
        for rank, low in zip(self.ranks, lows):
            dlow, db = torch.empty_like(low), []
            for k, where in enumerate(self.outputs):
                dy = dy_NXO[rank.members, :, where]
                dlow[..., rank.columns(k)] = torch.bmm(dy, rank.b[k]).mul_(rank.scaling)
                # transpose the narrow factor: a transposed dy would be copied as a whole
                turned = torch.bmm(low[..., rank.columns(k)].mT, dy).mT
                db.append(turned.to(rank.master, memory_format=torch.contiguous_format))
            da = torch.bmm(dlow.mT, h_NXH[rank.members]).to(rank.master)
            if into is not None or need_input:
                dh[rank.members].baddbmm_(dlow, rank.a_nrH)
            grads += [*da.split(rank.r, 1), *db]
        return dh, grads


class _Rank:
    """The adapters of one rank in a group: those of `members`, for each module."""

    def __init__(
        self, adapted: list[tuple[slice, StackedLinear]], k: int, dtype: torch.dtype
    ) -> None:
        a, b = [m.A[k] for _, m in adapted], [m.B[k] for _, m in adapted]
        self.params = [*a, *b]
        self.members, self.r, self.master = adapted[0][1].ranks[k], a[0].shape[1], a[0].dtype
        # in the master type, so that it is exact
        self.scaling = adapted[0][1].scaling_N[self.members].view(-1, 1, 1)
        self.a_nrH = torch.cat([p.detach() for p in a], 1).to(dtype)
        self.b = [p.detach().to(dtype) for p in b]

    def columns(self, k: int) -> slice:
        """Return the columns of the stacked low-rank activations that belong to module k."""
        return slice(k * self.r, (k + 1) * self.r)
