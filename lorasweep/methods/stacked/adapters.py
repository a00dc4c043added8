"""The trainables of a LoRA pack: modules around those of the base, initial factors, norms."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lorasweep.methods.stacked.modules import Factors, StackedExperts, StackedLinear, StackedRouter
from lorasweep.methods.trainables import Experts, Router, Target, Trainables
from lorasweep.spec.streams import stream

if TYPE_CHECKING:
    from lorasweep.methods.lora import LoRA


BLOCK = 8192
"""Rows that `spectral_norm` holds in float64 at once."""


class StackedAdapters(Trainables):
    """Trainables of a LoRA pack: each target is replaced by a module that holds the adapters."""

    stacked = True

    def __init__(
        self,
        base: nn.Module,
        targets: dict[str, Target],
        methods: Sequence["LoRA"],
        seeds: Sequence[int],
    ) -> None:
        """Wrap `targets` (name in `base` -> module with the matrices).

        Runs of equal rank must be neighbours. The random factor is drawn from the stream 'init',
        uniform in +-1/sqrt(number of inputs): the range of PEFT's kaiming_uniform with a = sqrt(5).
        """
        self._base, self._methods, self._seeds = base, list(methods), list(seeds)
        self._originals: dict[str, Any] = {
            n: t if isinstance(t, nn.Linear) else t.module for n, t in targets.items()
        }
        self._factors: dict[str, Factors] = {}
        self._named: dict[str, tuple[nn.Parameter, str, slice]]
        """Name -> tensor, name in the state of one run, and the runs that the tensor holds."""
        for p in base.parameters():
            p.requires_grad_(False)
        for name, target in targets.items():
            module = self._originals[name]
            if not isinstance(target, Experts):
                ranks, scalings = zip(*((m.rank, m.scaling) for m in methods))
                made = self._made(name, module.weight, module.weight.shape[::-1], ranks, scalings)
                stacked = StackedRouter if isinstance(target, Router) else StackedLinear
                self._factors[name] = stacked(*made, base=module)
                _replace(base, name, self._factors[name])
                continue
            n_experts, hidden, width = module.down_proj.shape
            ranks = tuple(m.expert_rank_of(n_experts, target.n_active) for m in methods)
            scalings = tuple(m.expert_scaling(r) for m, r in zip(methods, ranks))
            # `shared` means the factor on the hidden side
            inner, outer = n_experts, 1 if methods[0].expert_outer == "shared" else n_experts
            parts: dict[str, Factors] = {}
            for part in ("gate_proj", "up_proj", "down_proj"):
                sides, stacks = (hidden, width), (outer, inner)
                if part == "down_proj":
                    sides, stacks = sides[::-1], stacks[::-1]
                in_state = f"{name}.{part}"
                made = self._made(in_state, module.down_proj, sides, ranks, scalings, stacks)
                parts[part] = self._factors[in_state] = Factors(*made, *stacks)
            _replace(base, name, StackedExperts(module, **parts))
        self.refresh()

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

        `sides`: inputs and outputs of each matrix. `stacks`: number of matrices in A and in B, each
        drawn from a separate stream. One factor is drawn in float64, the other is zero. A is drawn
        row by row, so at a smaller rank it has the first rows of A at a larger rank. On the device
        'meta' nothing is drawn: process 0 sends the values.
        """
        (n_in, n_out), (of_a, of_b) = sides, stacks
        on_meta = weight.device.type == "meta"
        spans: list[slice] = []
        factors: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        like = weight.new_empty(0, dtype=torch.promote_types(weight.dtype, torch.float32))
        for rank, neighbours in groupby(range(len(ranks)), key=ranks.__getitem__):
            runs = list(neighbours)
            spans.append(slice(runs[0], runs[-1] + 1))
            shapes = (len(runs), of_a, rank, n_in), (len(runs), of_b, n_out, rank)
            a, b = (
                torch.zeros(s, dtype=torch.float64, device="meta" if on_meta else None)
                for s in shapes
            )
            for k, run in enumerate(runs if not on_meta else ()):
                method = self._methods[run]
                random = (a if method.random_factor == "a" else b)[k]
                bound = 1 / math.sqrt(random.shape[-1])
                for e, one in enumerate(random):
                    own = name if len(random) == 1 else f"{name}.{e}"
                    more = [method.init_seed] if method.init_seed else []
                    rng = stream("init", self._seeds[run], own, *more)
                    one.copy_(torch.from_numpy(rng.uniform(-bound, bound, size=tuple(one.shape))))
                random.mul_(method.init_scale)
            for found, factor in zip(factors, (a, b)):
                found.append(nn.Parameter(factor.flatten(1, 2).to(like)))
        return spans, *factors, torch.tensor(scalings, dtype=torch.float64).to(like)

    def refresh(self) -> None:
        self._named = {}
        for name, module in self._factors.items():
            for runs, a, b in zip(module.ranks, module.A, module.B):
                self._named[f"{name}.A{runs.start}"] = (a, f"{name}.A", runs)
                self._named[f"{name}.B{runs.start}"] = (b, f"{name}.B", runs)

    def parameters(self) -> dict[str, torch.Tensor]:
        return {name: p for name, (p, _, _) in self._named.items()}

    def part_of(self, name: str) -> tuple[str, slice]:
        return self._named[name][1:]

    def lr_ratios(self, name: str) -> list[float]:
        _, in_state, runs = self._named[name]
        return [m.lr_b_ratio if in_state.endswith(".B") else 1.0 for m in self._methods[runs]]

    def keep(self, runs: list[int]) -> dict[str, tuple[str, list[int]]]:
        renamed = {
            f"{name}.{new}": (f"{name}.{old}", rows)
            for name, module in self._factors.items()
            for new, (old, rows) in module.keep(runs).items()
        }
        self._methods = [self._methods[n] for n in runs]
        self.refresh()
        return renamed

    @contextmanager
    def only(self, runs: list[int]) -> Iterator[None]:
        if len(runs) == len(self._methods):
            yield
            return
        all_runs = {f: (f.ranks, f.A, f.B, f.scaling_N) for f in self._factors.values()}
        try:
            for factors in all_runs:
                factors.keep(runs)
            yield
        finally:
            for f, held in all_runs.items():
                f.ranks, f.A, f.B, f.scaling_N = held

    @contextmanager
    def grouped(self, groups: list[int]) -> Iterator[None]:
        firsts = [groups.index(group) for group in range(max(groups) + 1)]
        held = {f: (f.ranks, f.A, f.B) for f in self._factors.values()}
        with self.only(firsts):
            yield
            for f, (spans, *both) in held.items() if len(firsts) < len(groups) else ():
                for tensors, few in zip(both, (f.A, f.B)):
                    grads = [grad for p in few for grad in p.grad]
                    for span, tensor in zip(spans, tensors):
                        tensor.grad = torch.stack([grads[group] for group in groups[span]])

    @torch.no_grad()
    def norms(self) -> list[dict[str, float]]:
        """Return each run's Frobenius norms over all matrices: of A, of B, of scaling * B A."""
        some = next(iter(self._factors.values())).scaling_N
        sums = torch.zeros(3, len(some), dtype=torch.float64, device=some.device)
        for module in self._factors.values():
            scaling_N = module.scaling_N.double()
            for runs, p, q in module.of_matrices():
                a, b = p.double(), q.double()
                # |BA|_F^2 = tr(B'B AA'): r x r products instead of an O x I matrix
                squared = ((b.mT @ b) * (a @ a.mT)).sum((1, 2, 3))
                own = (x.square().sum((1, 2, 3)) for x in (a, b))
                for k, sum_n in enumerate((*own, scaling_N[runs].square() * squared)):
                    sums[k, runs] += sum_n
        roots = sums.clamp_min(0).sqrt().T.tolist()
        return [dict(zip(("norm_a", "norm_b", "norm_delta"), root)) for root in roots]

    @torch.no_grad()
    def spectra(self) -> list[dict[str, dict[str, float]]]:
        """Return the spectral norms of A, B and scaling * B A; for stacked experts, the largest."""
        rows = []
        for module in self._factors.values():
            parts = [factor_norms(a, b) for _, a, b in module.of_matrices()]
            a, b, delta = map(torch.cat, zip(*parts))
            rows.append(torch.stack([a, b, delta * module.scaling_N.double()]))
        by_run = torch.stack(rows).permute(2, 0, 1).tolist()
        return [
            {name: dict(zip(("a", "b", "delta"), row)) for name, row in zip(self._factors, found)}
            for found in by_run
        ]

    def detach(self) -> None:
        for name, module in self._originals.items():
            _replace(self._base, name, module)


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(root.get_submodule(parent) if parent else root, last, module)


# ---------------------------------------------------------------- spectral norms
# |M|^2 is the largest eigenvalue of the smaller of M M' and M' M, in float64. Squaring halves the
# digits of small singular values, but the relative error of the largest one is only about k * 1e-16
# for a Gram matrix [k, k]. These functions copy nothing to the host.


def largest_singular(gram_kk: torch.Tensor) -> torch.Tensor:
    """Return the square root of the largest eigenvalue of each Gram matrix [..., k, k].

    NaN for a matrix that is not finite, because one run of a pack may have diverged.
    """
    finite = gram_kk.isfinite().all(-1).all(-1)
    safe = torch.where(finite[..., None, None], gram_kk, 0.0)
    roots = torch.linalg.eigvalsh(safe)[..., -1].clamp_min(0).sqrt()
    return torch.where(finite, roots, torch.nan)


@torch.no_grad()
def spectral_norm(matrix: torch.Tensor) -> torch.Tensor:
    """Return the largest singular value, float64 [], of a matrix or E diagonal blocks [E, ...]."""
    if matrix.dim() == 3:
        return torch.stack([spectral_norm(m) for m in matrix]).amax()
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
    blocks = (rows.double() for rows in tall.split(BLOCK))
    return largest_singular(torch.stack([rows.mT @ rows for rows in blocks]).sum(0))


@torch.no_grad()
def factor_norms(
    a_nErI: torch.Tensor, b_nEOr: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the spectral norms |A|, |B| and |B A| of each run, [n] each, from r x r products.

    The E pairs of a run count as one block-diagonal matrix. A factor with E = 1 is shared by all
    pairs. |B A|^2 is the largest eigenvalue of S (B'B) S' with A A' = S' S. Its relative error is
    about r * 1e-16 * (|A| |B| / |B A|)^2.
    """
    a, b = a_nErI.double(), b_nEOr.double()
    gram_a, gram_b = a @ a.mT, b.mT @ b
    finite = gram_a.isfinite().all(-1).all(-1)[..., None, None]
    values, vectors = torch.linalg.eigh(torch.where(finite, gram_a, 0.0))
    s = values.clamp_min(0).sqrt()[..., None] * vectors.mT
    both = torch.where(finite, s @ gram_b @ s.mT, torch.nan)
    norm_a, norm_b, norm_delta = (
        largest_singular(gram).amax(1) for gram in (gram_a, gram_b, (both + both.mT) / 2)
    )
    return norm_a, norm_b, norm_delta
