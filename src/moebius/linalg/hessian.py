"""Hessians that can be inverted: shrinkage towards the layer, damping, and the Cholesky factor that error feedback needs.

Batches are factored one Hessian at a time: what that takes in between stays in the cache, and its memory is used again.
"""

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


def conditioned(moments: Tensor, *, shrinkage: float, damping: float, layer: Tensor | None = None) -> Tensor:
    """Hessians of experts that may have seen few tokens, made positive definite.

    An expert seen by fewer tokens than it has inputs has a singular Hessian, and one seen by none has nothing at all. Each
    is therefore mixed with the mean over the experts of the layer, ``H_e + ρ · scale · H_layer``, and damped on its diagonal.

    Args:
        moments: (experts, ..., in, in) sums of outer products.
        shrinkage: ρ, relative to the mean trace of the layer's experts.
        damping: share of each Hessian's mean diagonal added to its diagonal; at least 1e-4.
        layer: (..., in, in) mean over all experts of the layer, where ``moments`` holds some of them only.

    Returns:
        As ``moments``, of the same dtype. Identities where the layer saw no token at all, or no gradient.
    """
    layer = (layer_mean(moments) if layer is None else layer).to(moments.dtype).unsqueeze(0)
    layer_diagonal = layer.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)  # (1, ..., 1)
    hessians = torch.add(moments, layer, alpha=shrinkage)
    diagonal = hessians.diagonal(dim1=-2, dim2=-1)
    # Moments are gathered in float32: with less damping than this their rounding errors can make a Hessian indefinite.
    damping = max(damping, 1e-4)
    diagonal += torch.maximum(damping * diagonal.mean(-1, keepdim=True), 1e-10 * layer_diagonal)
    seen = layer_diagonal.unsqueeze(-1) > 0
    if not seen.all():
        hessians = torch.where(seen, hessians, torch.eye(hessians.shape[-1], dtype=hessians.dtype, device=hessians.device))
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
    factors, roots = unit_upper(hessians)
    for factor, root in zip(factors.flatten(0, -3), roots.flatten(0, -2), strict=True):
        torch.div(_inverse_lower(factor.mT).mT, root.unsqueeze(-1), out=factor)
    return factors


def inverse_diagonal(hessians: Tensor) -> Tensor:
    """Diagonal of the inverse of each Hessian. (..., n, n) to float32 (..., n)"""
    found = [_inverse_lower(_lower(hessian)).square().sum(-2) for hessian in hessians.flatten(0, -3)]
    return torch.stack(found).view(hessians.shape[:-1])


def unit_upper(hessians: Tensor) -> tuple[Tensor, Tensor]:
    """``V`` (..., n, n) and ``D^½`` (..., n) of ``H = V D Vᵀ``, float32."""
    uppers = torch.empty_like(hessians, dtype=torch.float32)
    roots = uppers.new_empty(hessians.shape[:-1])
    for hessian, upper, root in zip(hessians.flatten(0, -3), uppers.flatten(0, -3), roots.flatten(0, -2), strict=True):
        factor = _lower(hessian.flip(0, 1)).flip(0, 1)
        root.copy_(factor.diagonal())
        torch.div(factor, root, out=upper)
    return uppers, roots


def solve_unit_upper(upper: Tensor, roots: Tensor, wanted: Tensor) -> Tensor:
    """``H⁻¹ B`` from what :func:`unit_upper` returns of ``H``. ``wanted``: ``B`` (..., n, columns), which is also the shape."""
    half = torch.linalg.solve_triangular(upper, wanted, upper=True, unitriangular=True)
    half /= roots.square().unsqueeze(-1)
    return torch.linalg.solve_triangular(upper.mT, half, upper=False, unitriangular=True)


def _lower(hessian: Tensor) -> Tensor:
    """Cholesky factor of one Hessian, float32; factored in float64 where damping leaves it too close to singular."""
    lower, failed = torch.linalg.cholesky_ex(hessian.float())
    return torch.linalg.cholesky(hessian.double()).float() if failed else lower


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
