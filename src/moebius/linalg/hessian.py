"""Hessians that can be inverted: leaning on the layer, damping, and the Cholesky factor that error feedback needs."""

from __future__ import annotations

import torch
from torch import Tensor

_SMALL_TRIANGLE = 64


def layer_mean(moments: Tensor) -> Tensor:
    """Mean over the experts in float64, one expert at a time so that no float64 copy of all is needed."""
    total = torch.zeros_like(moments[0], dtype=torch.float64)
    for moment in moments:
        total += moment
    return total / len(moments)


def conditioned(moments: Tensor, *, lean: float, damping: float, layer: Tensor | None = None) -> Tensor:
    """Hessians of experts that may have seen few tokens, made positive definite.

    An expert seen by fewer tokens than it has inputs has a singular Hessian, and one seen by none has nothing at all. Each
    is therefore mixed with the mean over the experts of the layer, ``H_e + ρ · scale · H_layer``, and damped on its diagonal.

    Args:
        moments: (experts, ..., in, in) sums of outer products.
        lean: ρ, relative to the mean trace of the layer's experts.
        damping: share of each Hessian's mean diagonal added to its diagonal; at least 1e-4.
        layer: (..., in, in) mean over all experts of the layer, where ``moments`` holds some of them only.

    Returns:
        float64 like ``moments``. Identities where the layer saw no token at all, or no gradient.
    """
    layer = (layer_mean(moments) if layer is None else layer.double()).unsqueeze(0)
    layer_diagonal = layer.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)  # (1, ..., 1)
    # In place: each of these is as large as all Hessians together.
    hessians = moments.to(torch.float64, copy=True).add_(layer, alpha=lean)
    diagonal = hessians.diagonal(dim1=-2, dim2=-1)
    # Moments are gathered in float32: with less damping than this their rounding errors can make a Hessian indefinite.
    damping = max(damping, 1e-4)
    diagonal += torch.maximum(damping * diagonal.mean(-1, keepdim=True), 1e-10 * layer_diagonal)
    unseen = (layer_diagonal <= 0).expand(hessians.shape[:-1])
    if unseen.any():
        hessians[unseen] = torch.eye(hessians.shape[-1], dtype=torch.float64, device=hessians.device).expand_as(hessians)[
            unseen
        ]
    return hessians


def feedback_weights(hessians: Tensor) -> Tensor:
    """The unit upper factor ``V`` of ``H = V D Vᵀ``: how errors of earlier columns change what a later one aims for.

    This is GPTQ's feedback without the inverse of the Hessian (Chee et al., QuIP, 2023, Theorem 6): column ``k`` quantizes
    ``w_k + Σ_{j<k} (w_j − q_j) V_jk``. (..., n, n) to float32 (..., n, n)
    """
    return unit_upper(hessians)[0]


def feedback_factor(hessians: Tensor) -> Tensor:
    """Upper Cholesky factor ``U`` of the inverse, ``H⁻¹ = Uᵀ U``, float32: row ``i`` is how the error of column ``i`` is
    pushed into the columns after it (GPTQ, step 3). (..., n, n)
    """
    # With H = V D Vᵀ it is D^{-½} V⁻¹; a product of triangles is far cheaper than an inverse and its factor.
    upper, roots = unit_upper(hessians)
    return _inverse_lower(upper.mT).mT / roots.unsqueeze(-1)


def inverse_diagonal(hessians: Tensor) -> Tensor:
    """Diagonal of the inverse of each Hessian. (..., n, n) to float32 (..., n)"""
    lower = torch.linalg.cholesky(hessians).float()
    return _inverse_lower(lower).square().sum(-2)


def unit_upper(hessians: Tensor) -> tuple[Tensor, Tensor]:
    """``V`` (..., n, n) and ``D^½`` (..., n) of ``H = V D Vᵀ``, factored in float64 and rounded to float32."""
    upper = torch.linalg.cholesky(hessians.flip(-2, -1)).float().flip(-2, -1)
    roots = upper.diagonal(dim1=-2, dim2=-1).clone()
    return upper / roots.unsqueeze(-2), roots


def solve_unit_upper(upper: Tensor, roots: Tensor, wanted: Tensor) -> Tensor:
    """``H⁻¹ B`` from what :func:`unit_upper` returns of ``H``. ``wanted``: ``B`` (..., n, columns), which is also the shape."""
    half = torch.linalg.solve_triangular(upper, wanted, upper=True, unitriangular=True)
    half /= roots.square().unsqueeze(-1)
    return torch.linalg.solve_triangular(upper.mT, half, upper=False, unitriangular=True)


def _inverse_lower(lower: Tensor) -> Tensor:
    """Inverses of lower triangles (..., n, n), half by half: most of the work is dense products."""
    n = lower.shape[-1]
    if n <= _SMALL_TRIANGLE:
        eye = torch.eye(n, dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)
    half = n // 2
    inverse = torch.zeros_like(lower)
    inverse[..., :half, :half] = first = _inverse_lower(lower[..., :half, :half])
    inverse[..., half:, half:] = last = _inverse_lower(lower[..., half:, half:])
    inverse[..., half:, :half] = -(last @ (lower[..., half:, :half] @ first))
    return inverse
