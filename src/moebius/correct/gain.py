"""Row gain: a quantized matrix is a shrunken one, and what its outputs lose in variance no later layer restores."""

from __future__ import annotations

import torch
from torch import Tensor

from moebius.linalg.products import quadratic_forms


def row_gain(weight: Tensor, approximation: Tensor, moments: Tensor) -> Tensor:
    """``g_j = sqrt((W C Wᵀ)_jj / (Ŵ C Ŵᵀ)_jj)``: the factor by which each output row gets its energy back.

    Args:
        weight: ``W`` (experts, rows, columns).
        approximation: ``Ŵ``, of the same shape.
        moments: ``C`` (experts, columns, columns), of the same dtype.

    Returns:
        (experts, rows); one for a row whose approximation puts nothing out.
    """
    wanted, got = quadratic_forms(weight, moments), quadratic_forms(approximation, moments)
    return torch.where(got > 0, (wanted / got).clamp_min(0).sqrt(), 1)
