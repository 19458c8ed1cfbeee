"""Eigenbases of Gram matrices, with signs and order fixed so that the same input gives the same bytes."""

from __future__ import annotations

import torch
from torch import Tensor

# A Krylov space grows by so many vectors at a time, and is looked at whenever it has grown by so many. Matrices up to the
# size of a few looks are decomposed in full.
_GROWTH, _LOOK = 32, 128
_RESIDUAL = 0.03  # of the threshold: how far eigenvectors may be from being ones


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

    What is orthogonal to them is the null space. They are few as a rule, so that neither the other eigenvectors nor the
    projector on the null space is worth computing.

    Args:
        moments: (experts, n, n).
        threshold: share of the largest eigenvalue.

    Returns:
        float32 (experts, n, most), with columns of zeros where an expert uses fewer directions than another. No column at all
        for a moment of zeros: what was never seen cannot matter.
    """
    bases = [_above(moment, threshold) for moment in moments]
    used = moments.new_zeros(*moments.shape[:2], max(basis.shape[1] for basis in bases), dtype=torch.float32)
    for mine, basis in zip(used, bases, strict=True):
        mine[:, : basis.shape[1]] = basis
    return used


def _above(moment: Tensor, threshold: float) -> Tensor:
    """Eigenvectors of one moment (n, n) whose eigenvalues are above ``threshold`` of the largest. (n, used)"""
    if not moment.any():
        return moment[:, :0]
    vectors = _leading(moment.float(), threshold)
    if vectors is None:
        values, every = descending_eigh(moment)
        vectors = every[:, values > threshold * values[0]]
    return vectors


def _leading(matrix: Tensor, threshold: float) -> Tensor | None:
    """:func:`_above` from a block Krylov space with full orthogonalization; None if more than half of all directions are not
    enough for it. A third of the time of a decomposition of 2048 columns whose spectrum falls as ``1/k``.
    """
    n = len(matrix)
    start = torch.randn(n, _GROWTH, generator=torch.Generator().manual_seed(0)).to(matrix.device)
    space, images = torch.linalg.qr(start).Q, matrix.new_zeros(n, 0)
    while space.shape[1] <= n // 2:
        image = matrix @ space[:, -_GROWTH:]
        images = torch.cat([images, image], 1)
        if space.shape[1] % _LOOK == 0:
            values, turns = torch.linalg.eigh(space.mT @ images)  # ascending
            above = values > threshold * values[-1]
            turns = turns[:, above]
            residual = (images @ turns - (space @ turns) * values[above]).norm(dim=0).amax()
            # Nothing above the threshold is missing where the space has found its way below it.
            if turns.shape[1] + _GROWTH <= space.shape[1] and residual < _RESIDUAL * threshold * values[-1]:
                return space @ turns
        for _ in range(2):  # the first leaves rounding errors of what was nearly in the space
            image = torch.linalg.qr(image - space @ (space.mT @ image)).Q
        space = torch.cat([space, image], 1)
    return None
