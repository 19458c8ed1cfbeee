"""Products of which half is known: symmetric ones, and the diagonals of quadratic forms."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 256  # columns at a time: what they lead to stays in the cache


def symmetric_product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` where that is symmetric: little more than the lower triangle is computed.

    Args:
        left: (..., n, inner).
        right: (..., inner, n).
    """
    n = left.shape[-2]
    product = left.new_empty(*left.shape[:-1], n)
    for start in range(0, n, _BLOCK):
        stop = min(start + _BLOCK, n)
        product[..., start:, start:stop] = below = left[..., start:, :] @ right[..., start:stop]
        product[..., start:stop, stop:] = below[..., stop - start :, :].mT
    return product


def quadratic_forms(rows: Tensor, symmetric: Tensor) -> Tensor:
    """``r C rᵀ`` of every row ``r``: the diagonal of ``R C Rᵀ``, from one triangle of ``C``.

    Args:
        rows: ``R`` (..., rows, n).
        symmetric: ``C`` (..., n, n), of the same dtype.

    Returns:
        (..., rows).
    """
    n = rows.shape[-1]
    total = torch.zeros_like(rows[..., 0])
    for start in range(0, n, _BLOCK):
        stop = min(start + _BLOCK, n)
        mine = rows[..., start:stop]
        passed = mine @ symmetric[..., start:stop, start:stop]
        if stop < n:
            passed += 2 * (rows[..., stop:] @ symmetric[..., stop:, start:stop])
        total += (passed * mine).sum(-1)
    return total
