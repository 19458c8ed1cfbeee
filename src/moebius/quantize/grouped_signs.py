"""Signs in two groups of magnitudes, a second plane in salient columns, block by block with error feedback (BiLLM, ARB)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.formats.grouped_signs import GroupedSigns, assemble
from moebius.quantize.binary import signs
from moebius.quantize.feedback import columns_with_feedback

_TINY = 1e-30  # keeps 0/0 at 0 for zones that are empty


@dataclass(frozen=True)
class GroupedPlanes:
    """Sign planes before their scales are rounded, as in :class:`moebius.formats.grouped_signs.GroupedSigns`.

    Attributes:
        first: ±1 (experts, rows, columns).
        second: ±1 (experts, rows, columns), read in the salient columns.
        large: bool (experts, rows, columns), read outside the salient columns.
        salient: bool (experts, columns).
        row_scales: (experts, rows, blocks, 2).
        column_scales: (experts, 2, columns), or None.
        salient_row_scales: (experts, rows, salient blocks, 2).
        block: columns per block.
        salient_block: the same for the salient columns.
    """

    first: Tensor
    second: Tensor
    large: Tensor
    salient: Tensor
    row_scales: Tensor
    column_scales: Tensor | None
    salient_row_scales: Tensor
    block: int
    salient_block: int

    def matrix(self) -> Tensor:
        """What the planes stand for. (experts, rows, columns)"""
        return assemble(
            self.first,
            self.large,
            self.row_scales,
            self.column_scales,
            self.salient,
            self.second,
            self.salient_row_scales,
            block=self.block,
            salient_block=self.salient_block,
        )

    def scaled(self, rows: Tensor, columns: Tensor | None = None) -> GroupedPlanes:
        """With factors for rows (experts, rows), and for columns (experts, columns) where columns have scales, fused in."""
        rows = rows[:, :, None, None]
        planes = dataclasses.replace(self, row_scales=self.row_scales * rows, salient_row_scales=self.salient_row_scales * rows)
        if columns is None or self.column_scales is None:
            return planes
        return dataclasses.replace(planes, column_scales=self.column_scales * columns.unsqueeze(1))

    def pack(self) -> GroupedSigns:
        """Round the scales to fp16 and pack the planes."""
        return GroupedSigns.pack(
            self.first > 0,
            self.large,
            self.row_scales,
            self.column_scales,
            self.salient,
            self.second > 0,
            self.salient_row_scales,
            block=self.block,
            salient_block=self.salient_block,
        )


def grouped_planes(
    weight: Tensor, salient: Tensor, cholesky: Tensor, *, block: int, alternations: int | None = None
) -> GroupedPlanes:
    """Binarize matrices with error feedback.

    When a block is reached, its magnitudes are split in two groups and the scales of all zones are set, from its columns as
    they are then. Each column then takes the nearest of its levels: errors of the columns before it are made up for.

    Args:
        weight: (experts, rows, columns) float32.
        salient: columns with a second plane. bool (experts, columns)
        cholesky: see :func:`moebius.quantize.feedback.columns_with_feedback`.
        block: columns per block.
        alternations: updates of row and column scales, by which the salient columns do with the row scales of the matrix as
            it came (ARB-LLM_RC); None for row scales alone, all of them per block (BiLLM).
    """
    updated = weight.clone()
    whole = None if alternations is None else _zones(weight, salient, alternations)
    first, second = torch.empty_like(weight), torch.empty_like(weight)
    large = torch.empty_like(weight, dtype=torch.bool)
    blocks: list[tuple[_Scales, ...]] = []

    def quantize(column: int, values: Tensor) -> Tensor:
        offset = column % block
        if offset == 0:
            here = slice(column, column + block)
            blocks.append(_zones(updated[:, :, here], salient[:, here], alternations, whole))
        small, big, one, two = (scales.column(offset) for scales in blocks[-1])  # (experts, rows) each
        mask = salient[:, column, None]
        first[:, :, column] = sign = signs(values)
        large[:, :, column] = is_large = 2 * values.abs() > small + big
        level = torch.where(mask, one, torch.where(is_large, big, small)) * sign
        second[:, :, column] = sign = signs(values - level)
        return level + torch.where(mask, two * sign, 0)

    columns_with_feedback(updated, cholesky, block, quantize)
    rows = torch.stack([torch.stack([scales.rows for scales in zones], 2) for zones in blocks], 2)  # (..., blocks, 4)
    columns = None
    if alternations is not None:
        small, big, one, two = (torch.cat([scales.columns for scales in zone], 1) for zone in zip(*blocks, strict=True))
        columns = torch.stack([torch.where(salient, one, small), torch.where(salient, two, big)], 1)
        salient_rows, salient_block = rows[:, :, :1, 2:], weight.shape[2]
    else:
        salient_rows, salient_block = rows[..., 2:], block
    return GroupedPlanes(first, second, large, salient, rows[..., :2], columns, salient_rows, block, salient_block)


def split_magnitudes(magnitudes: Tensor, counted: Tensor) -> Tensor:
    """Which entries of each row are in the upper of two groups, such that a mean for each group leaves the least error.

    Two means on a line part it at one place: every place is tried, by sorting and running sums. BiLLM searches a percentile
    per block instead; as membership is stored entry by entry, a place for each row costs nothing.

    Args:
        magnitudes: none negative. (experts, rows, columns)
        counted: columns that take part. bool (experts, columns)
    """
    mask = counted.unsqueeze(1)
    ordered, order = torch.where(mask, magnitudes, -1).sort(dim=2, descending=True, stable=True)
    head = ordered.clamp_min(0).cumsum(2)
    size = torch.arange(1, magnitudes.shape[2] + 1, device=magnitudes.device)
    rest = counted.sum(1)[:, None, None] - size
    explained = head.square() / size + torch.where(rest > 0, (head[..., -1:] - head).square() / rest.clamp_min(1), 0)
    explained = torch.where(rest >= 0, explained, -1)
    last = explained.argmax(2, keepdim=True)
    rank = torch.empty_like(order).scatter_(2, order, torch.arange(order.shape[2], device=order.device).expand_as(order))
    return (rank <= last) & mask


def _zones(
    block: Tensor, salient: Tensor, alternations: int | None, whole: tuple[_Scales, ...] | None = None
) -> tuple[_Scales, ...]:
    """Scales of small and large entries, and of both planes of the salient columns; of the latter the rows of ``whole``."""
    magnitudes = block.abs()
    inside = salient.unsqueeze(1).expand_as(block)
    upper = split_magnitudes(magnitudes, ~salient)
    small, large = _Scales.means(magnitudes, ~upper & ~inside), _Scales.means(magnitudes, upper)
    first = _Scales.means(magnitudes, inside)
    second = _Scales.means((magnitudes - first.matrix()).abs(), inside)
    if whole is not None:
        first, second = (_Scales(scales.rows, torch.ones_like(block[:, 0])) for scales in whole[2:])
    for _ in range(alternations or 0):
        small, large = small.refined(magnitudes, ~upper & ~inside), large.refined(magnitudes, upper)
        upper = (2 * magnitudes > small.matrix() + large.matrix()) & ~inside
        first = first.refined(magnitudes - signs(magnitudes - first.matrix()) * second.matrix(), inside, whole is None)
        second = second.refined((magnitudes - first.matrix()).abs(), inside, whole is None)
    return small, large, first, second


@dataclass(frozen=True)
class _Scales:
    """``rows · columnsᵀ`` for the entries of one zone. (experts, rows) and (experts, columns)"""

    rows: Tensor
    columns: Tensor

    @classmethod
    def means(cls, values: Tensor, zone: Tensor) -> _Scales:
        """The mean of each row, columns of one."""
        return cls((values * zone).sum(2) / zone.sum(2).clamp_min(1), torch.ones_like(values[:, 0]))

    def matrix(self) -> Tensor:
        """(experts, rows, columns)"""
        return self.rows.unsqueeze(2) * self.columns.unsqueeze(1)

    def column(self, offset: int) -> Tensor:
        """One column of :meth:`matrix`. (experts, rows)"""
        return self.rows * self.columns[:, offset, None]

    def refined(self, values: Tensor, zone: Tensor, move_rows: bool = True) -> _Scales:
        """One update of both by least squares over the zone (ARB-LLM_RC), or of the columns alone."""
        inside = zone.to(values.dtype)
        values = values * inside
        columns = _closed_form(values.mT, inside.mT, self.rows)
        return _Scales(_closed_form(values, inside, columns) if move_rows else self.rows, columns)


def _closed_form(values: Tensor, inside: Tensor, other: Tensor) -> Tensor:
    """Least-squares scales along the second axis, given those along the third."""
    wanted = (other.unsqueeze(1) @ values.mT).squeeze(1)
    return wanted / (other.square().unsqueeze(1) @ inside.mT).squeeze(1).clamp_min(_TINY)
