"""Define each precision: the type of the master weights and the context of forward passes."""

from contextlib import AbstractContextManager, nullcontext

import torch

MASTER_DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}
"""Type of the weights. bf16 means autocast over fp32 master weights, in every arm."""
COMPUTE_DTYPES = {**MASTER_DTYPES, "bf16": torch.bfloat16}
"""Type of activations and weight copies in matrix products."""


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which transformers' forward passes run."""
    if precision != "bf16":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
