"""Binarization with row and column scales, first order everywhere and second order in salient columns (MoBiE Eq. 47, 48)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.formats.signs import Signs

_TINY = 1e-30  # keeps 0/0 at 0 for rows and columns of zeros


@dataclass(frozen=True)
class SignPlanes:
    """Binarized matrices before their scales are rounded: ``row_scales · (first · column_scales + second · second_scales)``.

    Attributes:
        first: ±1 (experts, rows, columns).
        second: ±1 (experts, rows, columns), read in the salient columns.
        salient: bool (experts, columns), the same count in every expert.
        row_scales: (experts, rows).
        column_scales: (experts, columns).
        second_scales: (experts, columns), zero outside the salient columns.
    """

    first: Tensor
    second: Tensor
    salient: Tensor
    row_scales: Tensor
    column_scales: Tensor
    second_scales: Tensor

    def matrix(self) -> Tensor:
        """What the planes stand for. (experts, rows, columns)"""
        columns = self.first * self.column_scales.unsqueeze(1) + self.second * self.second_scales.unsqueeze(1)
        return columns * self.row_scales.unsqueeze(2)

    def one(self, expert: int) -> SignPlanes:
        """Those of one expert, a batch of one."""
        return SignPlanes(*(getattr(self, part.name)[expert : expert + 1] for part in dataclasses.fields(self)))

    def scaled(self, rows: Tensor | None = None, columns: Tensor | None = None) -> SignPlanes:
        """With factors for rows (experts, rows) and columns (experts, columns) fused into the scales of both planes."""
        planes = self
        if rows is not None:
            planes = dataclasses.replace(planes, row_scales=planes.row_scales * rows)
        if columns is not None:
            planes = dataclasses.replace(
                planes, column_scales=planes.column_scales * columns, second_scales=planes.second_scales * columns
            )
        return planes

    def pack(self) -> Signs:
        """Round the scales to fp16 and pack the signs."""
        return Signs.pack(
            self.first > 0,
            self.row_scales,
            self.column_scales,
            salient_mask=self.salient,
            salient_positive=self.second > 0,
            salient_column_scales=self.second_scales,
        )


def signs(values: Tensor) -> Tensor:
    """±1, with +1 for zero (MoBiE Eq. 3)."""
    return torch.where(values >= 0, 1.0, -1.0).to(values.dtype)


def rank_one_scales(weight: Tensor, planes: Tensor, alternations: int) -> tuple[Tensor, Tensor]:
    """Row and column scales of signs, by alternating the closed forms of Eq. 48. No update raises the squared error.

    Args:
        weight: (experts, rows, columns).
        planes: ±1 of the same shape.
        alternations: updates of both; 0 leaves the mean magnitude of each row and ones.

    Returns:
        (experts, rows) and (experts, columns).
    """
    agreement = weight * planes
    row_scales, column_scales = agreement.mean(2), torch.ones_like(agreement[:, 0])
    for _ in range(alternations):
        row_scales = _fit(agreement, column_scales)
        column_scales = _fit(agreement.mT, row_scales)
    return row_scales, column_scales


def mixed_order(weight: Tensor, salient: Tensor, alternations: int) -> SignPlanes:
    """Binarize matrices: one plane of signs, and one more of the residual in the salient columns (Algorithm 3).

    Args:
        weight: (experts, rows, columns).
        salient: bool (experts, columns).
        alternations: updates of the first order's scales.
    """
    first = signs(weight)
    row_scales, first_scales = rank_one_scales(weight, first, alternations)
    residual = weight - row_scales.unsqueeze(2) * first * first_scales.unsqueeze(1)
    second = signs(residual)
    second_scales = _fit((residual * second).mT, row_scales) * salient
    return SignPlanes(first, second, salient, row_scales, first_scales, second_scales)


def _fit(agreement: Tensor, other_scales: Tensor) -> Tensor:
    """Least-squares scales along the second axis, given those along the third."""
    energy = other_scales.square().sum(1, keepdim=True).clamp_min(_TINY)
    # A vector from the left: batched products with a vector on the right are 4 to 25 times slower on a CPU.
    return (other_scales.unsqueeze(1) @ agreement.mT).squeeze(1) / energy
