"""The trainables of a LoRA pack: which modules of the base are replaced, and how factors start.

Knows tensors; refuses to know the training loop and any field of LoRA but those of an adapter.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from lorasweep.methods.stacked.experts import StackedExperts, StackedRouter
from lorasweep.methods.stacked.factors import Factors
from lorasweep.methods.stacked.linear import StackedLinear
from lorasweep.methods.stacked.spectral import factor_norms
from lorasweep.methods.trainables import Experts, Router, Target
from lorasweep.spec.streams import stream

if TYPE_CHECKING:
    from lorasweep.methods.lora import LoRA


class StackedAdapters:
    """Trainables of a LoRA pack: each target is replaced by a module that holds the adapters."""

    stacked = True

    def __init__(
        self,
        base: nn.Module,
        targets: dict[str, Target],
        methods: Sequence["LoRA"],
        seeds: Sequence[int],
    ) -> None:
        """Wrap `targets` (name -> what holds the matrices in `base`); equal ranks are neighbours.

        A is uniform in +-1/sqrt(I) from the stream named 'init', the range of PEFT's
        kaiming_uniform with a = sqrt(5). B is zero.
        """
        self._base, self._methods, self._seeds = base, list(methods), list(seeds)
        self._originals = {
            n: t if isinstance(t, nn.Linear) else t.module for n, t in targets.items()
        }
        self._factors: dict[str, Factors] = {}
        for p in base.parameters():
            p.requires_grad_(False)
        for name, target in targets.items():
            if isinstance(target, Experts):
                factors = self._of_experts(name, target)
                _replace(base, name, StackedExperts(target.module, **factors))
                self._factors |= {f"{name}.{part}": f for part, f in factors.items()}
                continue
            wrapped = self._of_matrix(name, target)
            _replace(base, name, wrapped)
            self._factors[name] = wrapped
        self._named = self._names()

    def _of_matrix(self, name: str, target: nn.Linear | Router) -> StackedLinear | StackedRouter:
        weight = (target.module if isinstance(target, Router) else target).weight
        ranks = [m.rank for m in self._methods]
        scalings = [m.scaling for m in self._methods]
        made = self._made(name, weight, (weight.shape[1], weight.shape[0]), ranks, scalings)
        if isinstance(target, Router):
            return StackedRouter(target.module, *made)
        return StackedLinear(target, *made)

    def _of_experts(self, name: str, target: Experts) -> dict[str, Factors]:
        """Make the factors of a layer's experts. A shared factor is the one on the hidden side."""
        down = target.module.down_proj
        n_experts, hidden, width = down.shape
        ranks = [m.expert_rank_of(n_experts, target.n_active) for m in self._methods]
        scalings = [m.expert_scaling(r) for m, r in zip(self._methods, ranks)]
        shared = self._methods[0].expert_outer == "shared"
        outer, inner = 1 if shared else n_experts, n_experts
        found = {}
        for part, sides, stacks in (
            ("gate_proj", (hidden, width), (outer, inner)),
            ("up_proj", (hidden, width), (outer, inner)),
            ("down_proj", (width, hidden), (inner, outer)),
        ):
            made = self._made(f"{name}.{part}", down, sides, ranks, scalings, stacks)
            found[part] = Factors(*made, *stacks)
        return found

    def _made(
        self,
        name: str,
        weight: torch.Tensor,
        sides: tuple[int, int],
        ranks: Sequence[int],
        scalings: Sequence[float],
        stacks: tuple[int, int] = (1, 1),
    ) -> tuple[list[slice], list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
        """Make the arguments of Factors, on the device of `weight`, trained in fp32 at least.

        `sides`: inputs and outputs of each matrix. `stacks`: how many matrices each factor is for.
        """
        spans = _runs_of_equals(ranks)
        master = torch.promote_types(weight.dtype, torch.float32)
        like = torch.empty(0, device=weight.device, dtype=master)
        a: list[torch.Tensor] = []
        b: list[torch.Tensor] = []
        for s in spans:
            drawn = [
                _start(m, seed, name, ranks[s.start], sides, stacks, weight.device)
                for m, seed in zip(self._methods[s], self._seeds[s])
            ]
            a.append(nn.Parameter(torch.stack([x for x, _ in drawn]).to(like)))
            b.append(nn.Parameter(torch.stack([x for _, x in drawn]).to(like)))
        return spans, a, b, torch.tensor(scalings, dtype=torch.float64).to(like)

    def spread(self) -> None:
        self._named = self._names()

    def parameters(self) -> dict[str, torch.Tensor]:
        return {name: p for name, (p, _, _) in self._named.items()}

    def part_of(self, name: str) -> tuple[str, slice]:
        _, of_member, members = self._named[name]
        return of_member, members

    def lr_ratios(self, name: str) -> list[float]:
        _, of_member, members = self._named[name]
        if of_member.endswith(".B"):
            return [m.lr_b_ratio for m in self._methods[members]]
        return [1.0] * (members.stop - members.start)

    def _names(self) -> dict[str, tuple[nn.Parameter, str, slice]]:
        """Map each name to (tensor, its name in one member's state, the members that it holds)."""
        found = {}
        for name, module in self._factors.items():
            for members, a, b in zip(module.ranks, module.A, module.B):
                found[f"{name}.A{members.start}"] = (a, f"{name}.A", members)
                found[f"{name}.B{members.start}"] = (b, f"{name}.B", members)
        return found

    def keep(self, members: list[int]) -> dict[str, tuple[str, list[int]]]:
        renamed = {
            f"{name}.{new}": (f"{name}.{old}", rows)
            for name, module in self._factors.items()
            for new, (old, rows) in module.keep(members).items()
        }
        self._methods = [self._methods[m] for m in members]
        self._named = self._names()
        return renamed

    @contextmanager
    def only(self, members: list[int]) -> Iterator[None]:
        if len(members) == len(self._methods):
            yield
            return
        whole = {f: (f.ranks, f.A, f.B, f.scaling_N) for f in self._factors.values()}
        try:
            for factors in whole:
                factors.keep(members)
            yield
        finally:
            for f, held in whole.items():
                f.ranks, f.A, f.B, f.scaling_N = held

    @torch.no_grad()
    def norms(self) -> list[dict[str, float]]:
        """Return each member's Frobenius norms over all matrices: of A, of B, of scaling * B A.

        Computed on the device and copied to the host once.
        """
        some = next(iter(self._factors.values())).scaling_N
        sums = torch.zeros(3, len(some), dtype=torch.float64, device=some.device)
        for module in self._factors.values():
            scaling_N = module.scaling_N.double()
            for members, p, q in module.of_matrices():
                a, b = p.double(), q.double()
                sums[0, members] += a.square().sum((1, 2, 3))
                sums[1, members] += b.square().sum((1, 2, 3))
                # |BA|_F^2 = tr(B'B AA'): r x r products instead of an O x I matrix
                squared = ((b.mT @ b) * (a @ a.mT)).sum((1, 2, 3))
                sums[2, members] += scaling_N[members].square() * squared
        roots = sums.clamp_min(0).sqrt().T.tolist()
        return [dict(zip(("norm_a", "norm_b", "norm_delta"), root)) for root in roots]

    @torch.no_grad()
    def spectra(self) -> list[dict[str, dict[str, float]]]:
        """Return the spectral norms of A, of B and of scaling * B A, copied to the host once.

        Of a stack of experts the largest one.
        """
        rows = []
        for module in self._factors.values():
            parts = [factor_norms(a, b) for _, a, b in module.of_matrices()]
            a, b, delta = map(torch.cat, zip(*parts))
            rows.append(torch.stack([a, b, delta * module.scaling_N.double()]))
        of_member = torch.stack(rows).permute(2, 0, 1).tolist()
        return [
            {name: dict(zip(("a", "b", "delta"), row)) for name, row in zip(self._factors, found)}
            for found in of_member
        ]

    def detach(self) -> None:
        for name, module in self._originals.items():
            _replace(self._base, name, module)


def _runs_of_equals(values: Sequence[int]) -> list[slice]:
    """Split into runs of equal neighbours: [4, 4, 16] -> [0:2], [2:3]."""
    starts = [i for i, v in enumerate(values) if i == 0 or v != values[i - 1]]
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(values)])]


def _start(
    method: "LoRA",
    seed: int,
    name: str,
    rank: int,
    sides: tuple[int, int],
    stacks: tuple[int, int],
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one member's A [E r, I] and B [E O, r] in float64; E is in `stacks`, 1 for no stack.

    One of them is uniform in +-1/sqrt(its inputs), the other zero. A is drawn row by row, so the A
    of a smaller rank is the first rows of the A of a larger rank. Each matrix of a stack has a
    stream of its own. On the device 'meta' nothing is drawn: a process that gets its values from
    another one need not.
    """
    (n_in, n_out), (of_a, of_b) = sides, stacks
    drawn_on = device if device.type == "meta" else None
    a = torch.zeros(of_a, rank, n_in, dtype=torch.float64, device=drawn_on)
    b = torch.zeros(of_b, n_out, rank, dtype=torch.float64, device=drawn_on)
    if drawn_on:
        return a.flatten(0, 1), b.flatten(0, 1)
    random = a if method.random_factor == "a" else b
    bound = 1 / math.sqrt(random.shape[-1])
    for e, one in enumerate(random):
        names: list[str | int] = ["init", seed, name if len(random) == 1 else f"{name}.{e}"]
        rng = stream(*names, *([method.init_seed] if method.init_seed else []))
        one.copy_(torch.from_numpy(rng.uniform(-bound, bound, size=tuple(one.shape))))
    random.mul_(method.init_scale)
    return a.flatten(0, 1), b.flatten(0, 1)


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(root.get_submodule(parent) if parent else root, last, module)
