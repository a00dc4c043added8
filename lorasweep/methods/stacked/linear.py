"""The stacked LoRA module: N members' adapters around one frozen nn.Linear.

The base product is computed once for all members. Knows tensors; refuses to know the training loop
and any configuration but rank, scaling, learning rate ratio and seed.

Shapes: N members, B sequences per member, T tokens, r rank, I inputs, O outputs. Hidden states are
[N*B, T, I], sorted by member, so the rest of the model needs no change.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from lorasweep.methods.stacked.spectral import factor_norms
from lorasweep.spec.streams import stream

if TYPE_CHECKING:
    from lorasweep.methods.lora import LoRA


class StackedLinear(nn.Module):
    """y = W x + scaling_n B_n A_n x for member n, with W (and bias) frozen.

    Members of the same rank are stacked; nothing is padded to another rank. For each rank there is
    one A [n, r, I], one B [n, O, r], and in `ranks` the slice of members that they hold.
    """

    def __init__(
        self,
        base: nn.Linear,
        ranks: list[slice],
        a_nrI: Sequence[torch.Tensor],
        b_nOr: Sequence[torch.Tensor],
        scaling_N: torch.Tensor,
    ) -> None:
        super().__init__()
        self.base, self.ranks, self.scaling_N = base, ranks, scaling_N
        self.A, self.B = nn.ParameterList(a_nrI), nn.ParameterList(b_nOr)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        n = len(self.scaling_N)
        x_NXI, y_NXO = x.reshape(n, -1, x.shape[-1]), y.reshape(n, -1, y.shape[-1])
        parts = []
        for members, a, b in zip(self.ranks, self.A, self.B):
            low = torch.bmm(x_NXI[members], a.mT) * self.scaling_N[members].view(-1, 1, 1)
            parts.append(torch.baddbmm(y_NXO[members], low, b.mT))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(y.shape)


class StackedAdapters:
    """Trainables of a LoRA pack: each chosen module of the base is replaced by a StackedLinear."""

    stacked = True

    def __init__(
        self,
        base: nn.Module,
        targets: dict[str, nn.Linear],
        methods: Sequence["LoRA"],
        seeds: Sequence[int],
    ) -> None:
        """Wrap `targets` (name -> module of `base`); members of one rank must be neighbours.

        A is uniform in +-1/sqrt(I) from the stream named 'init', the range of PEFT's
        kaiming_uniform with a = sqrt(5). B is zero.
        """
        self._base, self._originals = base, targets
        self._wrapped: dict[str, StackedLinear] = {}
        spans = _runs_of_equals([m.rank for m in methods])
        scaling_N = torch.tensor([m.scaling for m in methods], dtype=torch.float64)
        self._lr_b = [m.lr_b_ratio for m in methods]
        for p in base.parameters():
            p.requires_grad_(False)
        for name, linear in targets.items():
            # trained in fp32 at least, also where the frozen weight is bf16
            master = torch.promote_types(linear.weight.dtype, torch.float32)
            like = torch.empty(0, device=linear.weight.device, dtype=master)
            a: list[torch.Tensor] = []
            b: list[torch.Tensor] = []
            for s in spans:
                drawn = [_start(m, seed, name, linear) for m, seed in zip(methods[s], seeds[s])]
                a.append(nn.Parameter(torch.stack([x for x, _ in drawn]).to(like)))
                b.append(nn.Parameter(torch.stack([x for _, x in drawn]).to(like)))
            wrapped = StackedLinear(linear, spans, a, b, scaling_N.to(like))
            _replace(base, name, wrapped)
            self._wrapped[name] = wrapped
        self._named = self._names()

    def parameters(self) -> dict[str, torch.Tensor]:
        return {name: p for name, (p, _, _) in self._named.items()}

    def part_of(self, name: str) -> tuple[str, slice]:
        _, of_member, members = self._named[name]
        return of_member, members

    def lr_ratios(self, name: str) -> list[float]:
        _, of_member, members = self._named[name]
        if of_member.endswith(".B"):
            return self._lr_b[members]
        return [1.0] * (members.stop - members.start)

    def _names(self) -> dict[str, tuple[nn.Parameter, str, slice]]:
        """Map each name to (tensor, its name in one member's state, the members that it holds)."""
        found = {}
        for name, module in self._wrapped.items():
            for members, a, b in zip(module.ranks, module.A, module.B):
                found[f"{name}.A{members.start}"] = (a, f"{name}.A", members)
                found[f"{name}.B{members.start}"] = (b, f"{name}.B", members)
        return found

    def keep(self, members: list[int]) -> dict[str, tuple[str, list[int]]]:
        renamed: dict[str, tuple[str, list[int]]] = {}
        for name, module in self._wrapped.items():
            ranks, a, b, start = [], [], [], 0
            for span, old_a, old_b in zip(module.ranks, module.A, module.B):
                rows = [m - span.start for m in members if span.start <= m < span.stop]
                if not rows:
                    continue
                ranks.append(slice(start, start + len(rows)))
                a.append(nn.Parameter(old_a.detach()[rows].clone()))
                b.append(nn.Parameter(old_b.detach()[rows].clone()))
                for which in "AB":
                    renamed[f"{name}.{which}{start}"] = (f"{name}.{which}{span.start}", rows)
                start += len(rows)
            module.ranks, module.A, module.B = ranks, nn.ParameterList(a), nn.ParameterList(b)
            module.scaling_N = module.scaling_N[members].clone()
        self._lr_b = [self._lr_b[m] for m in members]
        self._named = self._names()
        return renamed

    @torch.no_grad()
    def norms(self) -> list[dict[str, float]]:
        """Return each member's Frobenius norms over all matrices: of A, of B, of scaling * B A.

        Computed on the device and copied to the host once.
        """
        scaling_N = next(iter(self._wrapped.values())).scaling_N.double()
        sums = torch.zeros(3, len(scaling_N), dtype=torch.float64, device=scaling_N.device)
        for module in self._wrapped.values():
            for members, p, q in zip(module.ranks, module.A, module.B):
                a, b = p.double(), q.double()
                sums[0, members] += a.square().sum((1, 2))
                sums[1, members] += b.square().sum((1, 2))
                # |BA|_F^2 = tr(B'B AA'): r x r products instead of an O x I matrix
                squared = (torch.bmm(b.mT, b) * torch.bmm(a, a.mT)).sum((1, 2))
                sums[2, members] += scaling_N[members].square() * squared
        roots = sums.clamp_min(0).sqrt().T.tolist()
        return [dict(zip(("norm_a", "norm_b", "norm_delta"), root)) for root in roots]

    @torch.no_grad()
    def spectra(self) -> list[dict[str, dict[str, float]]]:
        """Return the spectral norms of A, of B and of scaling * B A, copied to the host once."""
        rows = []
        for module in self._wrapped.values():
            parts = [factor_norms(a, b) for a, b in zip(module.A, module.B)]
            a, b, delta = map(torch.cat, zip(*parts))
            rows.append(torch.stack([a, b, delta * module.scaling_N.double()]))
        of_member = torch.stack(rows).permute(2, 0, 1).tolist()
        return [
            {name: dict(zip(("a", "b", "delta"), row)) for name, row in zip(self._wrapped, found)}
            for found in of_member
        ]

    def detach(self) -> None:
        for name, linear in self._originals.items():
            _replace(self._base, name, linear)


def _runs_of_equals(values: Sequence[int]) -> list[slice]:
    """Split into runs of equal neighbours: [4, 4, 16] -> [0:2], [2:3]."""
    starts = [i for i, v in enumerate(values) if i == 0 or v != values[i - 1]]
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(values)])]


def _start(
    method: "LoRA", seed: int, name: str, linear: nn.Linear
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one member's A [r, I] and B [O, r] in float64.

    One of them is uniform in +-1/sqrt(its inputs), the other zero. A is drawn row by row, so the A
    of a smaller rank is the first rows of the A of a larger rank.
    """
    a = torch.zeros(method.rank, linear.in_features, dtype=torch.float64)
    b = torch.zeros(linear.out_features, method.rank, dtype=torch.float64)
    random = a if method.random_factor == "a" else b
    names = ("init", seed, name, method.init_seed) if method.init_seed else ("init", seed, name)
    bound = 1 / math.sqrt(random.shape[1])
    drawn = stream(*names).uniform(-bound, bound, size=tuple(random.shape))
    random.copy_(torch.from_numpy(drawn)).mul_(method.init_scale)
    return a, b


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(root.get_submodule(parent) if parent else root, last, module)
