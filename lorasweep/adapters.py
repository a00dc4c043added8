"""The stacked LoRA module: N members' adapters around one frozen nn.Linear, one base product for all.

Knows tensors. Refuses to know the loop, and configuration beyond rank, scaling and seed.
Shapes: N members, B sequences a member, T tokens, r rank, I inputs, O outputs. Hidden states carry the members
in the batch dimension, [N*B, T, I], member by member, so the model around needs no change.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorasweep.data import stream


class StackedLinear(nn.Module):
    """y = W x + scaling_n B_n A_n x for member n. A: [N, r, I]. B: [N, O, r]. W (and bias) stay frozen."""

    def __init__(self, base: nn.Linear, a_NrI: torch.Tensor, b_NOr: torch.Tensor, scaling_N: torch.Tensor) -> None:
        super().__init__()
        self.base = base
        self.A = nn.Parameter(a_NrI)
        self.B = nn.Parameter(b_NOr)
        self.scaling_N = scaling_N

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        n = self.A.shape[0]
        x_NXI = x.reshape(n, -1, x.shape[-1])
        low_NXr = torch.bmm(x_NXI, self.A.transpose(1, 2)) * self.scaling_N.view(-1, 1, 1)
        return torch.baddbmm(y.reshape(n, -1, y.shape[-1]), low_NXr, self.B.transpose(1, 2)).view(y.shape)


class StackedAdapters:
    """Trainables of a LoRA pack: a StackedLinear in the place of each chosen module of the base."""

    stacked = True

    def __init__(
        self, base: Any, modules: dict[str, nn.Linear], rank: int, scalings: Sequence[float], seeds: Sequence[int]
    ) -> None:
        """Wrap `modules` (name -> module of `base`). A is uniform in +-1/sqrt(I) from the stream named 'init'
        (PEFT's kaiming_uniform with a = sqrt(5) has that range), B is zero."""
        self._base, self._originals, self._wrapped = base, modules, {}
        for p in base.parameters():
            p.requires_grad_(False)
        for name, linear in modules.items():
            weight = linear.weight
            a = [_uniform_a(seed, name, rank, linear.in_features) for seed in seeds]
            a_NrI = torch.stack(a).to(weight)
            b_NOr = torch.zeros(len(seeds), linear.out_features, rank).to(weight)
            wrapped = StackedLinear(linear, a_NrI, b_NOr, torch.tensor(list(scalings)).to(weight))
            _replace(base, name, wrapped)
            self._wrapped[name] = wrapped

    def parameters(self) -> dict[str, torch.Tensor]:
        out = {}
        for name, module in self._wrapped.items():
            out[f"{name}.A"], out[f"{name}.B"] = module.A, module.B
        return out

    def keep(self, members: list[int]) -> None:
        for module in self._wrapped.values():
            module.A = nn.Parameter(module.A.detach()[members].clone())
            module.B = nn.Parameter(module.B.detach()[members].clone())
            module.scaling_N = module.scaling_N[members].clone()

    @torch.no_grad()
    def norms(self) -> list[dict[str, float]]:
        """Frobenius norms over all adapted matrices of A, of B, and of the change scaling * B A."""
        n = next(iter(self._wrapped.values())).A.shape[0]
        sums = torch.zeros(3, n, dtype=torch.float64)
        for m in self._wrapped.values():
            a, b, s = m.A.double().cpu(), m.B.double().cpu(), m.scaling_N.double().cpu()
            sums[0] += a.square().sum((1, 2))
            sums[1] += b.square().sum((1, 2))
            # |BA|_F^2 = tr(B'B AA'): r x r products instead of an O x I matrix
            sums[2] += s.square() * (torch.bmm(b.mT, b) * torch.bmm(a, a.mT)).sum((1, 2))
        root = sums.clamp_min(0).sqrt()
        return [
            {"norm_a": float(root[0, i]), "norm_b": float(root[1, i]), "norm_delta": float(root[2, i])}
            for i in range(n)
        ]

    def detach(self) -> None:
        for name, linear in self._originals.items():
            _replace(self._base, name, linear)


def _uniform_a(seed: int, name: str, rank: int, d_in: int) -> torch.Tensor:
    """Draw A [r, I]. Rows come in order, so a smaller rank's A is the beginning of a larger one's."""
    bound = 1 / math.sqrt(d_in)
    return torch.from_numpy(stream("init", seed, name).uniform(-bound, bound, size=(rank, d_in)))


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(root.get_submodule(parent) if parent else root, last, module)


def save_peft(folder: Path, state: dict[str, torch.Tensor], rank: int, alpha: float, base_name: str) -> None:
    """Write one member (names '<module>.A' [r, I] and '<module>.B' [O, r]) as a folder that PeftModel loads.

    An adapted unembedding is written too; where it is tied to the embedding the adapter must never be merged.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors, modules = {}, set()
    for name, tensor in state.items():
        module, _, which = name.rpartition(".")
        modules.add(module.rpartition(".")[2])
        tensors[f"base_model.model.{module}.lora_{which}.weight"] = tensor.detach().cpu().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "r": rank,
        "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none", "target_modules": sorted(modules),
        "inference_mode": True, "use_rslora": False,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
