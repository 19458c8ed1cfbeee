"""Integers with a scale per group of columns: round to nearest, and with error feedback (GPTQ)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.formats.integers import Integers
from moebius.quantize.feedback import columns_with_feedback

#: Shares of the largest magnitude of a group that its levels may span.
_CLIPPING = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6)


@dataclass(frozen=True)
class IntegerCodes:
    """Integer codes before their scales are rounded, as in :class:`moebius.formats.integers.Integers`.

    Attributes:
        codes: uint8 (experts, rows, columns).
        scales: (experts, rows, groups).
        zeros: integers as floats (experts, rows, groups), or None for levels symmetric around zero.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group_size: int

    def matrix(self) -> Tensor:
        """What the codes stand for. (experts, rows, columns)"""
        centre = (2**self.bits - 1) / 2 if self.zeros is None else self._spread(self.zeros)
        return (self.codes - centre) * self._spread(self.scales)

    def scaled(self, rows: Tensor) -> IntegerCodes:
        """With a factor for each row (experts, rows) fused into its scales."""
        return dataclasses.replace(self, scales=self.scales * rows.unsqueeze(2))

    def pack(self) -> Integers:
        """Round the scales to fp16 and pack the codes."""
        return Integers.pack(self.codes, self.scales, self.zeros, bits=self.bits, group_size=self.group_size)

    def _spread(self, per_group: Tensor) -> Tensor:
        return per_group.repeat_interleave(self.group_size, dim=2)[..., : self.codes.shape[2]]


def whole_rows(group_size: int, columns: int) -> int:
    """The group size that a recipe means: 0 is the whole row, and no group is longer than the row."""
    return min(group_size, columns) if group_size else columns


def round_to_nearest(weight: Tensor, bits: int, group_size: int) -> IntegerCodes:
    """Round every entry to the nearest level of its group.

    Two bits and more have levels from the smallest to the largest entry of the group, zero always among them; one bit is
    plus or minus the mean magnitude.

    Args:
        weight: (experts, rows, columns) float32.
        bits: 1 to 8.
        group_size: columns per group.
    """
    codes, scales, zeros = [], [], []
    for group in weight.split(group_size, dim=2):
        scale, zero = _levels(group, bits)
        codes.append(_codes(group, scale, zero, bits).to(torch.uint8))
        scales.append(scale)
        zeros.append(zero)
    return IntegerCodes(torch.cat(codes, 2), torch.cat(scales, 2), torch.cat(zeros, 2) if bits > 1 else None, bits, group_size)


def round_symmetrically(weight: Tensor, bits: int, group_size: int) -> IntegerCodes:
    """Round every entry to the nearest of levels that lie symmetrically around zero, spaced so that a group errs least.

    Args:
        weight: (experts, rows, columns) float32.
        bits: 1 to 8.
        group_size: columns per group.
    """
    most, codes, scales = 2**bits - 1, [], []
    for group in weight.split(group_size, dim=2):
        peaks = group.abs().amax(2, keepdim=True)
        least, best = torch.full_like(peaks, torch.inf), peaks
        for share in _CLIPPING:
            scale = (peaks * (share * 2 / most)).half().float()  # as it is stored: codes must fit it
            error = (group - (_symmetric(group, scale, most) - most / 2) * scale).square_().sum(2, keepdim=True)
            least, best = torch.minimum(error, least), torch.where(error < least, scale, best)
        codes.append(_symmetric(group, best, most).to(torch.uint8))
        scales.append(best)
    return IntegerCodes(torch.cat(codes, 2), torch.cat(scales, 2), None, bits, group_size)


def round_with_feedback(weight: Tensor, cholesky: Tensor, bits: int, group_size: int, block_size: int) -> IntegerCodes:
    """GPTQ: round column by column, each error pushed into the columns after it.

    The levels of a group are set when its first column is reached, from its columns as they are then.

    Args:
        weight: (experts, rows, columns) float32.
        cholesky: see :func:`moebius.quantize.feedback.columns_with_feedback`.
        bits: 1 to 8.
        group_size: columns per group.
        block_size: columns whose errors are gathered before they are pushed further.
    """
    updated = weight.clone()
    codes = torch.empty_like(weight, dtype=torch.uint8)
    scales: list[Tensor] = []
    zeros: list[Tensor] = []

    def quantize(column: int, values: Tensor) -> Tensor:
        if column % group_size == 0:
            scale, zero = _levels(updated[:, :, column : column + group_size], bits)
            scales.append(scale)
            zeros.append(zero)
        code = _codes(values.unsqueeze(2), scales[-1], zeros[-1], bits)
        codes[:, :, column] = code.squeeze(2).to(torch.uint8)
        return ((code - zeros[-1]) * scales[-1]).squeeze(2)

    columns_with_feedback(updated, cholesky, block_size, quantize)
    return IntegerCodes(codes, torch.cat(scales, 2), torch.cat(zeros, 2) if bits > 1 else None, bits, group_size)


def round_in_order(weight: Tensor, factor: Tensor, order: Tensor, bits: int, group_size: int, block_size: int) -> IntegerCodes:
    """:func:`round_with_feedback` in an order of its own: GPTQ's activation order with static groups.

    The levels of a group are set from its columns as they came, wherever they stand in the order: codes and scales stay where
    they are, and the order need not be stored.

    Args:
        weight: (experts, rows, columns) float32.
        factor: of the Hessians whose rows and columns are in this order.
        order: columns of each expert in the order of their rounding. int64 (experts, columns)
        bits: 1 to 8.
        group_size: columns per group.
        block_size: as for :func:`round_with_feedback`.
    """
    places = order.unsqueeze(1).expand_as(weight)
    updated, rows = weight.gather(2, places), weight.shape[1]
    levels = [torch.cat(parts, 2) for parts in zip(*(_levels(g, bits) for g in weight.split(group_size, 2)), strict=True)]
    ordered = torch.empty_like(weight, dtype=torch.uint8)

    def quantize(column: int, values: Tensor) -> Tensor:
        group = (order[:, column] // group_size)[:, None, None].expand(-1, rows, 1)
        scale, zero = (level.gather(2, group) for level in levels)
        code = _codes(values.unsqueeze(2), scale, zero, bits)
        ordered[:, :, column] = code.squeeze(2).to(torch.uint8)
        return ((code - zero) * scale).squeeze(2)

    columns_with_feedback(updated, factor, block_size, quantize)
    codes = torch.empty_like(ordered).scatter_(2, places, ordered)
    return IntegerCodes(codes, levels[0], levels[1] if bits > 1 else None, bits, group_size)


def _symmetric(values: Tensor, scale: Tensor, most: int) -> Tensor:
    """The nearest codes from 0 to ``most`` of levels around zero, as floats."""
    return (torch.where(scale > 0, values / scale, 0) + most / 2).round_().clamp_(0, most)


def _levels(group: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each row of a group, (experts, rows, 1) each; the zero point of one bit is one half."""
    if bits == 1:
        scale = 2 * group.abs().mean(2, keepdim=True)
        return scale, torch.full_like(scale, 0.5)
    low, high = group.amin(2, keepdim=True).clamp_max(0), group.amax(2, keepdim=True).clamp_min(0)
    scale = (high - low) / (2**bits - 1)
    return scale, torch.where(scale > 0, -low / scale, 0).round()


def _codes(values: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The nearest codes of values, as floats. One bit takes +1 for zero."""
    if bits == 1:
        return (values >= 0).to(values.dtype)
    return (torch.where(scale > 0, values / scale, 0).round() + zero).clamp(0, 2**bits - 1)
