"""Hessians that can be inverted: leaning on the layer, damping, and the Cholesky factor that error feedback needs."""

from __future__ import annotations

import torch
from torch import Tensor


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
    hessians = moments.double() + lean * layer
    layer_diagonal = layer.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)  # (1, ..., 1)
    diagonal = hessians.diagonal(dim1=-2, dim2=-1)
    # Moments are gathered in float32: with less damping than this their rounding errors can make a Hessian indefinite.
    damping = max(damping, 1e-4)
    diagonal += torch.maximum(damping * diagonal.mean(-1, keepdim=True), 1e-10 * layer_diagonal)
    seen = (layer_diagonal > 0).unsqueeze(-1)
    return torch.where(seen, hessians, torch.eye(hessians.shape[-1], dtype=torch.float64, device=hessians.device))


def inverse_diagonal(hessians: Tensor) -> Tensor:
    """Diagonal of the inverse of each Hessian. (..., in, in) to (..., in)"""
    return torch.cholesky_inverse(torch.linalg.cholesky(hessians)).diagonal(dim1=-2, dim2=-1)


def feedback_factor(hessians: Tensor) -> Tensor:
    """Upper Cholesky factor ``U`` of the inverse, ``H⁻¹ = Uᵀ U``, float32: row ``i`` is how the error of column ``i`` is
    pushed into the columns after it (GPTQ, step 3). (..., in, in)
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessians))
    return torch.linalg.cholesky(inverse, upper=True).float()
