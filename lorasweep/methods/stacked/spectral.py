"""The largest singular value of a matrix, by the power method."""

import torch

ITERATIONS = 60
"""Power iterations: enough for 1% unless the second singular value is closer than that."""


@torch.no_grad()
def spectral_norm(matrix: torch.Tensor) -> float:
    """Return the largest singular value, by the power method from a fixed start.

    A full decomposition of a large model's matrices would take longer than the run.
    """
    matrix = matrix.double()
    v = torch.linspace(1.0, 2.0, matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    for _ in range(ITERATIONS):
        v = matrix.mT @ (matrix @ _unit(v))
    return float(torch.linalg.vector_norm(matrix @ _unit(v)))


def _unit(v: torch.Tensor) -> torch.Tensor:
    return v / torch.linalg.vector_norm(v).clamp_min(1e-300)
