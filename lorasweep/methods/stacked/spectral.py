"""The largest singular value of a matrix, by the power method."""

import torch

ITERATIONS = 60
"""Of the power method: within 1% of the largest singular value unless the second is closer than
that."""


@torch.no_grad()
def spectral_norm(matrix: torch.Tensor) -> float:
    """Return the largest singular value, by the power method from a fixed start: a whole
    decomposition of a large model's matrices would take longer than the run."""
    matrix = matrix.double()
    v = torch.linspace(1.0, 2.0, matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    for _ in range(ITERATIONS):
        v = matrix.mT @ (matrix @ (v / torch.linalg.vector_norm(v).clamp_min(1e-300)))
    return float(
        torch.linalg.vector_norm(matrix @ (v / torch.linalg.vector_norm(v).clamp_min(1e-300)))
    )
