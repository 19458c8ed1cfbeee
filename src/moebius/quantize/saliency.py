"""Which columns deserve a second sign plane (MoBiE Eq. 11, Algorithm 2)."""

from __future__ import annotations

import torch
from torch import Tensor


def column_saliency(weight: Tensor, inverse_diagonals: Tensor) -> Tensor:
    """Mean over the rows of ``s_ij = w_ij² / [H⁻¹]_jj²``.

    Args:
        weight: (experts, rows, columns).
        inverse_diagonals: diagonals of the inverse Hessians, (experts, groups, columns). Row ``i`` is in group
            ``i · groups // rows``; as many groups as rows is Eq. 10 as printed, one group is a Hessian for all rows.

    Returns:
        float64 (experts, columns).
    """
    experts, rows, columns = weight.shape
    groups = inverse_diagonals.shape[1]
    group_of_row = torch.arange(rows, device=weight.device) * groups // rows
    energy = weight.new_zeros(experts, groups, columns).index_add_(1, group_of_row, weight.square())
    return (energy / inverse_diagonals.double().square()).sum(1) / rows


def salient_count(columns: int, fraction: float) -> int:
    """How many of ``columns`` are salient: the fraction, rounded up to whole bytes of signs, which cost the same."""
    return min(-(-round(fraction * columns) // 8) * 8, columns)


def salient_columns(saliency: Tensor, fraction: float) -> Tensor:
    """Mask of the most salient columns, the same number in every expert. (experts, columns) to bool (experts, columns)"""
    columns = saliency.shape[1]
    order = saliency.argsort(dim=1, descending=True, stable=True)[:, : salient_count(columns, fraction)]
    return torch.zeros_like(saliency, dtype=torch.bool).scatter_(1, order, True)
