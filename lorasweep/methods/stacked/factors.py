"""The two factors of a matrix's adapters, or of a stack of matrices', for the members of a pack.

Knows tensors; refuses to know what their product is added to.

Shapes: n members of one rank, E matrices of a stack (1 for a single matrix), r rank, I inputs,
O outputs.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from lorasweep.methods.trainables import whole


class Factors(nn.Module):
    """scaling_n B_ne A_ne for member n and matrix e of a stack.

    Members of the same rank are stacked; nothing is padded to another rank. For each rank there is
    one A [n, E r, I], one B [n, E O, r], and in `ranks` the slice of members that they hold. A
    factor that all matrices of a stack share has no E.
    """

    def __init__(
        self,
        ranks: list[slice],
        a: Sequence[torch.Tensor],
        b: Sequence[torch.Tensor],
        scaling_N: torch.Tensor,
        stacked_a: int = 1,
        stacked_b: int = 1,
    ) -> None:
        """Set up; `stacked_a`, `stacked_b`: E of each factor, 1 for one that is shared."""
        super().__init__()
        self.ranks = ranks
        self.scaling_N: torch.Tensor
        self.register_buffer("scaling_N", scaling_N, persistent=False)
        self.A, self.B = nn.ParameterList(a), nn.ParameterList(b)
        self.stacked_a, self.stacked_b = stacked_a, stacked_b

    def of_matrices(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Yield for each rank its members, A as [n, E, r, I] and B as [n, E, O, r]."""
        for members, a, b in zip(self.ranks, self.A, self.B):
            shapes = (self.stacked_a, -1), (self.stacked_b, -1)
            yield members, whole(a).unflatten(1, shapes[0]), whole(b).unflatten(1, shapes[1])

    def keep(self, members: list[int]) -> dict[str, tuple[str, list[int]]]:
        """Drop all members but `members`.

        Returns for each new tensor ('A' or 'B' and its first member) the old one's name, and the
        rows of it that were kept.
        """
        renamed: dict[str, tuple[str, list[int]]] = {}
        ranks, a, b, start = [], [], [], 0
        for span, old_a, old_b in zip(self.ranks, self.A, self.B):
            rows = [m - span.start for m in members if span.start <= m < span.stop]
            if not rows:
                continue
            ranks.append(slice(start, start + len(rows)))
            a.append(nn.Parameter(old_a.detach()[rows].clone()))
            b.append(nn.Parameter(old_b.detach()[rows].clone()))
            for which in "AB":
                renamed[f"{which}{start}"] = (f"{which}{span.start}", rows)
            start += len(rows)
        self.ranks, self.A, self.B = ranks, nn.ParameterList(a), nn.ParameterList(b)
        self.scaling_N = self.scaling_N[members].clone()
        return renamed
