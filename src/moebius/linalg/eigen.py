"""Eigenbases of Gram matrices, with signs and order fixed so that the same input gives the same bytes."""

from __future__ import annotations

import numpy as np
import scipy.linalg
import scipy.sparse.linalg
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


def used_directions(moments: Tensor, threshold: float) -> Tensor:
    """Orthonormal bases of the directions that inputs use: eigenvalues above ``threshold`` of the largest (NGES).

    What is orthogonal to them is the null space. They are few, so that neither the other eigenvectors nor the projector on
    the null space is worth computing.

    Args:
        moments: (experts, n, n).
        threshold: share of the largest eigenvalue.

    Returns:
        float32 (experts, n, most), with columns of zeros where an expert uses fewer directions than another. No column at all
        for a moment of zeros: what was never seen cannot matter.
    """
    bases = [_above(moment.float().cpu().numpy(), threshold) for moment in moments]
    used = moments.new_zeros(*moments.shape[:2], max(basis.shape[1] for basis in bases), dtype=torch.float32)
    for expert, basis in enumerate(bases):
        used[expert, :, : basis.shape[1]] = torch.from_numpy(basis)
    return used


def _above(moment: np.ndarray, threshold: float) -> np.ndarray:
    """Eigenvectors of one moment (n, n) whose eigenvalues are above ``threshold`` of the largest. (n, used)"""
    if not moment.any():
        return moment[:, :0]
    # Lanczos, from a fixed start: a fiftieth of the time that a decomposition takes to find the largest.
    start = np.ones(len(moment), moment.dtype)
    largest = scipy.sparse.linalg.eigsh(moment, 1, v0=start, return_eigenvectors=False)[0] if len(moment) > 1 else moment.max()
    return scipy.linalg.eigh(moment, subset_by_value=(threshold * largest, np.inf))[1]
