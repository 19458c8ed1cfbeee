"""Hessians that can be inverted: leaning on the layer, damping, and the Cholesky factor that error feedback needs."""

from __future__ import annotations

import torch
from torch import Tensor


def conditioned(moments: Tensor, *, lean: float, damping: float) -> Tensor:
    """Hessians of experts that may have seen few tokens, made positive definite.

    An expert seen by fewer tokens than it has inputs has a singular Hessian, and one seen by none has nothing at all. Each
    is therefore mixed with the mean over the experts of the layer, ``H_e + ρ · scale · H_layer``, and damped on its diagonal.

    Args:
        moments: (experts, in, in) sums of outer products.
        lean: ρ, relative to the mean trace of the layer's experts.
        damping: share of each Hessian's mean diagonal added to its diagonal.

    Returns:
        float64 (experts, in, in). A layer that saw no token at all gets identities.
    """
    moments = moments.double()
    layer = moments.mean(0)
    inputs = moments.shape[-1]
    layer_diagonal = layer.diagonal().mean()
    if layer_diagonal <= 0:
        return torch.eye(inputs, dtype=torch.float64, device=moments.device).expand_as(moments).clone()
    hessians = moments + lean * layer
    diagonal = hessians.diagonal(dim1=1, dim2=2)
    diagonal += (damping * diagonal.mean(1, keepdim=True)).clamp_min(1e-10 * layer_diagonal)
    return hessians


def inverse_diagonal(hessians: Tensor) -> Tensor:
    """Diagonal of the inverse of each Hessian. (..., in, in) to (..., in)"""
    return torch.cholesky_inverse(torch.linalg.cholesky(hessians)).diagonal(dim1=-2, dim2=-1)


def feedback_factor(hessians: Tensor) -> Tensor:
    """Upper Cholesky factor ``U`` of the inverse, ``H⁻¹ = Uᵀ U``, float32: row ``i`` is how the error of column ``i`` is
    pushed into the columns after it (GPTQ, step 3). (..., in, in)
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessians))
    return torch.linalg.cholesky(inverse, upper=True).float()
