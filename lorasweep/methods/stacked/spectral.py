"""Largest singular values from Gram matrices, on the device of the matrices, in float64.

|M|^2 is the largest eigenvalue of the smaller of M M' and M' M. Squaring halves the digits of small
singular values, not of the largest: its relative error is about k * 1e-16 for a Gram matrix [k, k].
Nothing here copies to the host.
"""

import torch

BLOCK = 8192
"""Rows that are held in float64 at once."""


def largest_singular(gram_kk: torch.Tensor) -> torch.Tensor:
    """Return the square root of the largest eigenvalue of each Gram matrix [..., k, k].

    NaN where a matrix is not finite: a run may have broken down while others of its pack end well.
    """
    finite = gram_kk.isfinite().all(-1).all(-1)
    safe = torch.where(finite[..., None, None], gram_kk, 0.0)
    roots = torch.linalg.eigvalsh(safe)[..., -1].clamp_min(0).sqrt()
    return torch.where(finite, roots, torch.nan)


@torch.no_grad()
def spectral_norm(matrix: torch.Tensor) -> torch.Tensor:
    """Return the largest singular value of a matrix, as a float64 tensor without dimensions.

    A stack of matrices [E, ...] counts as one block-diagonal matrix.
    """
    if matrix.dim() == 3:
        return torch.stack([spectral_norm(m) for m in matrix]).amax()
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
    blocks = (rows.double() for rows in tall.split(BLOCK))
    return largest_singular(torch.stack([rows.mT @ rows for rows in blocks]).sum(0))


@torch.no_grad()
def factor_norms(
    a_nErI: torch.Tensor, b_nEOr: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return |A|, |B| and |B A| of each run, [n] each, from products r x r.

    The E pairs of a run count as one block-diagonal matrix; E may be 1 in either factor, which
    all pairs then share. |B A|^2 is the largest eigenvalue of S (B'B) S' with A A' = S' S. Its
    relative error is about r * 1e-16 * (|A| |B| / |B A|)^2.
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
