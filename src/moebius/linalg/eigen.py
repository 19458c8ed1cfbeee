"""Eigenbases of Gram matrices, with signs and order fixed so that the same input gives the same bytes."""

from __future__ import annotations

import torch
from torch import Tensor


def descending_eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (largest first, none negative) and eigenvectors of symmetric matrices, in float64.

    The largest entry of each eigenvector is made positive: LAPACK leaves the sign open.

    Args:
        gram: (..., n, n).

    Returns:
        values (..., n), vectors (..., n, n) with eigenvectors as columns.
    """
    values, vectors = torch.linalg.eigh(gram.double())
    values, vectors = values.flip(-1).clamp_min(0), vectors.flip(-1)
    peaks = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    return values, vectors * torch.where(peaks < 0, -1.0, 1.0)


def null_space_projector(moments: Tensor, threshold: float) -> Tensor:
    """Projector on the directions that inputs hardly ever use: eigenvalues below ``threshold`` of the largest (NGES).

    Args:
        moments: (..., n, n).
        threshold: share of the largest eigenvalue.

    Returns:
        float32 (..., n, n). The identity where the moment is zero: what was never seen cannot matter.
    """
    values, vectors = descending_eigh(moments)
    unused = values <= threshold * values[..., :1]
    kept = vectors * unused.unsqueeze(-2)
    return (kept @ kept.mT).float()
