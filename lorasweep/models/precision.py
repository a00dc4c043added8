"""Define each precision: the types of the weights, and the context of forward passes."""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

MASTER_DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}
"""Type of the weights that are trained. bf16 means autocast over them, in every arm."""
COMPUTE_DTYPES = {**MASTER_DTYPES, "bf16": torch.bfloat16}
"""Type of activations and weight copies in matrix products."""

EXPERT_STACKS = ("gate_up_proj", "down_proj")
"""Parameters of a module of experts, [experts, outputs, inputs]."""


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which transformers' forward passes run."""
    if precision != "bf16":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def bf16_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the matrices that can be held in bf16 under autocast without a change of any number.

    Autocast rounds the weight of an nn.Linear to bf16 anyway, and `experts_forward` rounds stacks
    of experts. The rows of an nn.Embedding are read as they are, and `hold_in_bf16` widens them.
    Modules derived from these may do other things with their weights, so a matrix that one of them
    has stays as it is.
    """
    found: dict[str, nn.Parameter] = {}
    others: set[int] = set()
    for name, module in model.named_modules():
        for kind, p in module.named_parameters(recurse=False, remove_duplicate=False):
            is_plain = kind == "weight" and type(module) in (nn.Linear, nn.Embedding)
            if is_plain or (kind in EXPERT_STACKS and p.dim() == 3):
                found[f"{name}.{kind}"] = p
            else:
                others.add(id(p))
    return {name: p for name, p in found.items() if id(p) not in others}


def hold_in_bf16(model: nn.Module) -> None:
    """Hold the matrices of bf16_matrices in bf16. Their values must be bf16 numbers.

    The residual stream stays in the type of the norms: embeddings are widened as they are read.
    """
    for p in bf16_matrices(model).values():
        p.data = p.data.to(torch.bfloat16)
    for module in model.modules():
        if type(module) is nn.Embedding:
            module.register_forward_hook(_widened)


def _widened(module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
    return out.float()


def norms_in_float64(model: nn.Module) -> None:
    """Compute RMS norms in float64: transformers' go through float32 whatever their input."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.forward = partial(_rms_norm, module)


def _rms_norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)
    return module.weight * (x * scale)


def are_bf16(values: torch.Tensor) -> bool:
    """Return whether all values are bf16 numbers."""
    return all(torch.equal(part.to(torch.bfloat16).to(part), part) for part in values.split(8192))
