"""The adapters of a LoRA pack: modules around frozen weights, their trainables, PEFT's format.

The product with the frozen weights is computed once for all runs. Tokens for experts are sorted by
expert and run, and each product is one call over all experts.

Shapes: N runs of the pack, n runs of one rank, E matrices of a stack (1 for a single matrix), r
rank, I inputs, O outputs. Hidden states are [N * B, T, I], sorted by run, so the rest of the model
needs no change. In products of experts: X tokens of all runs, sorted by run; k active experts of a
token; S = X k pairs of a token and one of its experts; H hidden; G groups of pairs, K inputs.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from lorasweep.methods.trainables import Experts, Target, Trainables, whole
from lorasweep.spec.streams import stream

if TYPE_CHECKING:
    from lorasweep.methods.lora import LoRA

ALIGNED_BYTES = 16
"""The size of a row for torch's grouped_mm must be a multiple of this."""
GROUPED = (torch.float32, torch.bfloat16, torch.float16)
"""Types that torch's grouped_mm computes in."""
BLOCK = 8192
"""Rows that `spectral_norm` holds in float64 at once."""


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
        stacked: Sequence[int] = (1, 1),
        base: nn.Module | None = None,
    ) -> None:
        """Hold the tensors; `stacked`: E of A and of B; `base`: the replaced module."""
        super().__init__()
        self.ranks, self.stacked = ranks, stacked
        self.base: Any = base
        self.scaling_N: torch.Tensor
        self.register_buffer("scaling_N", scaling_N, persistent=False)
        self.A, self.B = nn.ParameterList(a), nn.ParameterList(b)

    def of_matrices(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Yield for each rank its runs, A as [n, E, r, I] and B as [n, E, O, r]."""
        for runs, *both in zip(self.ranks, self.A, self.B):
            a, b = (whole(t).unflatten(1, (n, -1)) for t, n in zip(both, self.stacked))
            yield runs, a, b

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
            renamed |= {f"{which}{start}": (f"{which}{span.start}", rows) for which in "AB"}
            start += len(rows)
        self.ranks, self.A, self.B = ranks, nn.ParameterList(a), nn.ParameterList(b)
        self.scaling_N = self.scaling_N[runs].clone()
        return renamed


class LowRank(torch.autograd.Function):
    """y + scaling_n B_n A_n x for the runs n of one rank.

    Autograd itself would multiply in an order in which one result has only r columns. On a CPU
    these products take up to seven times as long as their transposes here (docs/log/2026-11-28.md).
    """

    @staticmethod
    def forward(ctx: Any, *given: torch.Tensor) -> torch.Tensor:
        y_nXO, x_nXI, a_nrI, b_nOr, scaling_n = given
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
        y, n, parts = self.base(x), len(self.scaling_N), []
        x_NXI, y_NXO = x.reshape(n, -1, x.shape[-1]), y.reshape(n, -1, y.shape[-1])
        for runs, a, b in zip(self.ranks, self.A, self.B):
            scaling = self.scaling_N[runs].view(-1, 1, 1)
            parts.append(LowRank.apply(y_NXO[runs], x_NXI[runs], a, b, scaling))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(y.shape)


class StackedExperts(nn.Module):
    """A layer's frozen experts with the adapters of a pack: separate ones for gate, up and down."""

    def __init__(self, base: Any, gate_proj: Factors, up_proj: Factors, down_proj: Factors) -> None:
        super().__init__()
        self.base = base
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return experts_forward(self.base, x, chosen, weight, self)


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
    n_runs, (n_tokens, k) = len(adapters.gate_proj.scaling_N) if adapters else 1, chosen_Xk.shape
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
        numbers = torch.arange(len(order_S), device=order_S.device)
        back = torch.empty_like(order_S).scatter_(0, order_S, numbers)
        return out[back].view(n_tokens, k, -1).sum(1).to(x_XH.dtype)


# ---------------------------------------------------------------- the trainables of a pack


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
        self._originals: dict[str, Any] = {n: getattr(t, "module", t) for n, t in targets.items()}
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
                self._factors[name] = StackedLinear(*made, base=module)
                base.set_submodule(name, self._factors[name])
                continue
            n_experts, hidden, width = module.down_proj.shape
            ranks = tuple(m.expert_rank_of(n_experts, target.n_active) for m in methods)
            scalings = tuple(m.expert_scaling(r) for m, r in zip(methods, ranks))
            # `shared` means the factor on the hidden side
            outer, three = 1 if methods[0].expert_outer == "shared" else n_experts, []
            for part, back in (("gate_proj", 1), ("up_proj", 1), ("down_proj", -1)):
                sides, stacks = (hidden, width)[::back], (outer, n_experts)[::back]
                own = f"{name}.{part}"
                made = self._made(own, module.down_proj, sides, ranks, scalings, stacks)
                three.append(self._factors.setdefault(own, Factors(*made, stacks)))
            base.set_submodule(name, StackedExperts(module, *three))
        self.refresh()

    def _made(
        self,
        name: str,
        weight: torch.Tensor,
        sides: Sequence[int],
        ranks: Sequence[int],
        scalings: Sequence[float],
        stacks: Sequence[int] = (1, 1),
    ) -> tuple[list[slice], list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
        """Make the arguments of Factors, on the device of `weight`, trained in fp32 at least.

        `sides`: inputs and outputs of each matrix. `stacks`: number of matrices in A and in B, each
        drawn from a separate stream. One factor is drawn in float64, the other is zero. A is drawn
        row by row, so at a smaller rank it has the first rows of A at a larger rank. On the device
        'meta' nothing is drawn: process 0 sends the values.
        """
        (n_in, n_out), (of_a, of_b) = sides, stacks
        device = "meta" if weight.device.type == "meta" else None
        like = weight.new_empty(0, dtype=torch.promote_types(weight.dtype, torch.float32))
        spans: list[slice] = []
        factors: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for rank, neighbours in groupby(range(len(ranks)), key=ranks.__getitem__):
            runs = list(neighbours)
            spans.append(slice(runs[0], runs[-1] + 1))
            shapes = (len(runs), of_a, rank, n_in), (len(runs), of_b, n_out, rank)
            a, b = (torch.zeros(s, dtype=torch.float64, device=device) for s in shapes)
            for k, run in enumerate(() if device else runs):
                method = self._methods[run]
                random = (a if method.random_factor == "a" else b)[k]
                bound = 1 / math.sqrt(random.shape[-1])
                more = [method.init_seed] if method.init_seed else []
                for e, one in enumerate(random):
                    own = name if len(random) == 1 else f"{name}.{e}"
                    rng = stream("init", self._seeds[run], own, *more)
                    one.copy_(torch.from_numpy(rng.uniform(-bound, bound, size=tuple(one.shape))))
                random.mul_(method.init_scale)
            for found, factor in zip(factors, (a, b)):
                found.append(nn.Parameter(factor.flatten(1, 2).to(like)))
        return spans, *factors, torch.tensor(scalings, dtype=torch.float64).to(like)

    def refresh(self) -> None:
        self._named = {
            f"{name}.{which}{runs.start}": (p, f"{name}.{which}", runs)
            for name, module in self._factors.items()
            for runs, *both in zip(module.ranks, module.A, module.B)
            for which, p in zip("AB", both)
        }

    def parameters(self) -> dict[str, torch.Tensor]:
        return {name: p for name, (p, _, _) in self._named.items()}

    def part_of(self, name: str) -> tuple[str, slice]:
        return self._named[name][1:]

    def lr_ratios(self, name: str) -> list[float]:
        in_state, runs = self.part_of(name)
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
        # Frobenius norms over all matrices: of A, of B, of scaling * B A
        some = next(iter(self._factors.values())).scaling_N
        sums = some.new_zeros(3, len(some), dtype=torch.float64)
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
        found, keys = torch.stack(rows).permute(2, 0, 1).tolist(), ("a", "b", "delta")
        return [{n: dict(zip(keys, row)) for n, row in zip(self._factors, own)} for own in found]

    def detach(self) -> None:
        for name, module in self._originals.items():
            self._base.set_submodule(name, module)


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
def factor_norms(a_nErI: torch.Tensor, b_nEOr: torch.Tensor) -> tuple[torch.Tensor, ...]:
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
    return tuple(largest_singular(g).amax(1) for g in (gram_a, gram_b, (both + both.mT) / 2))


# ---------------------------------------------------------------- PEFT's format


def save_peft(
    folder: Path,
    state: Mapping[str, torch.Tensor],
    method: "LoRA",
    base_name: str,
    revision: str | None,
    n_experts: int = 0,
) -> None:
    """Write one run's adapter as a folder that PeftModel loads.

    Never merge an adapter of an unembedding that is tied to the embedding: merging changes both.
    PEFT divides lora_alpha by the rank, so lora_alpha is the factor on B A x times the rank.

    Args:
        state: '<module>.A' [rank, inputs] and '<module>.B' [outputs, rank]; for experts
            '<experts>.gate_proj.A' and so on, as in Factors.
        base_name, revision: where PEFT finds the base.
    """
    from safetensors.torch import save_file

    of_experts = {n: t for n, t in state.items() if n.split(".")[-3:-2] == ["experts"]}
    tensors, ranks = in_peft_layout(of_experts, n_experts)
    modules, r = set(), method.rank
    for name in state.keys() - of_experts.keys():
        module, _, which = name.rpartition(".")
        tensors[f"{module}.lora_{which}"] = state[name]
        modules.add(module.rpartition(".")[2])
    config: dict[str, Any] = {
        **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True},
        **{"base_model_name_or_path": base_name, "revision": revision},
        **{"r": r, "lora_alpha": method.scaling * r, "lora_dropout": 0.0, "use_rslora": False},
        **{"bias": "none", "target_modules": sorted(modules)},
    }
    if ranks:
        scaling = method.expert_scaling(min(ranks.values()))
        config |= {"target_parameters": sorted(ranks), "rank_pattern": ranks}
        config["alpha_pattern"] = {name: scaling * r for name, r in ranks.items()}
    folder.mkdir(parents=True, exist_ok=True)
    prefix = "base_model.model"
    written = {f"{prefix}.{n}.weight": t.detach().cpu().contiguous() for n, t in tensors.items()}
    save_file(written, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


def in_peft_layout(
    state: Mapping[str, torch.Tensor], n_experts: int
) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Return the factors of all layers' experts in PEFT's layout, and the rank of each parameter.

    PEFT has one pair of factors for gate and up: their A stacked vertically, and a block-diagonal
    B. The rows of A are in the order (expert, rank), the columns of B in the order (rank, expert).
    The module for down wraps the module for gate and up.
    """
    found: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for experts in dict.fromkeys(n.rsplit(".", 2)[0] for n in state):
        hidden, pairs = state[f"{experts}.gate_proj.A"].shape[-1], []
        for part in ("gate", "up", "down"):
            a, b = (state[f"{experts}.{part}_proj.{which}"] for which in "AB")
            rank = b.shape[-1]
            # a shared factor, which is on the hidden side, is repeated for each expert
            of_a = 1 if part != "down" and len(a) == rank else n_experts
            of_b = 1 if part == "down" and len(b) == hidden else n_experts
            a_ErI = a.unflatten(0, (of_a, -1)).expand(n_experts, -1, -1)
            pairs.append((a_ErI, b.unflatten(0, (of_b, -1)).expand(n_experts, -1, -1)))
        (a_gate, b_gate), (a_up, b_up), down = pairs
        ranks = {"mlp.experts.gate_up_proj": 2 * rank, "mlp.experts.down_proj": rank}
        b_both = torch.cat([F.pad(b_gate, (0, rank)), F.pad(b_up, (rank, 0))], 1)
        both = torch.cat([a_gate, a_up], 1), b_both
        for where, (a_ErI, b_EOr) in ((f"{experts}.base_layer", both), (experts, down)):
            found[f"{where}.lora_A"] = a_ErI.flatten(0, 1)
            found[f"{where}.lora_B"] = b_EOr.permute(1, 2, 0).flatten(1)
    return found, ranks
