"""Integers of 1 to 8 bits with a scale, and a zero point if asked, for every group of columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.formats.base import Packed
from moebius.formats.bits import pack, packed_width, unpack


@dataclass(frozen=True)
class Integers(Packed):
    """Codes ``q`` of ``bits`` bits.

    With a zero point ``z`` (an integer of the same bits) an entry is ``scale · (q − z)``; without, the levels lie
    symmetrically around zero: ``scale · (q − (2**bits − 1)/2)``, so that one bit means ``± scale/2``. Columns may have
    scales of their own on top (AWQ).

    Attributes:
        group_size: columns per group; the last group may be shorter.
        zero_points: whether the format stores zero points.
        codes: uint8 (batch, rows, packed_width(columns, bits)).
        scales: float16 (batch, rows, groups).
        column_scaled: whether columns have scales.
        zeros: uint8 (batch, packed_width(rows * groups, bits)), or None. One stream per matrix: a byte for each row would
            cost as much as a zero point of its own where a row has few groups.
        column_scales: float16 (batch, columns), or None.
    """

    name = "integers"
    later = frozenset({"column_scaled"})

    bits: int = 8
    group_size: int = 128
    zero_points: bool = False
    codes: Tensor | None = None
    scales: Tensor | None = None
    zeros: Tensor | None = None
    column_scaled: bool = False
    column_scales: Tensor | None = None

    @classmethod
    def pack(cls, codes: Tensor, scales: Tensor, zeros: Tensor | None, *, bits: int, group_size: int) -> Integers:
        """Pack integer codes.

        Args:
            codes: (batch, rows, columns), values in ``[0, 2**bits)``.
            scales: (batch, rows, groups).
            zeros: (batch, rows, groups) integers in ``[0, 2**bits)``, or None for symmetric levels.
        """
        batch, rows, columns = codes.shape
        return cls(
            batch,
            rows,
            columns,
            bits,
            group_size,
            zeros is not None,
            codes=pack(codes, bits),
            scales=scales.to(torch.float16).contiguous(),
            zeros=None if zeros is None else pack(zeros.flatten(1), bits),
        )

    def with_column_scales(self, column_scales: Tensor) -> Integers:
        """The same matrices with a scale (batch, columns) for each column."""
        return self.replace(column_scaled=True, column_scales=column_scales.half().contiguous())

    @property
    def groups(self) -> int:
        """Groups per row."""
        return -(-self.columns // self.group_size)

    def _unpack_to(self, out: Tensor, index: Tensor | None) -> None:
        assert self.codes is not None and self.scales is not None
        pick = slice(None) if index is None else index
        out.copy_(unpack(self.codes[pick], self.bits, self.columns))
        scales = self.scales[pick].float()
        if self.zeros is None:
            centres = torch.full_like(scales, (2**self.bits - 1) / 2)
        else:
            centres = unpack(self.zeros[pick], self.bits, self.rows * self.groups).float().view_as(scales)
        for group in range(self.groups):  # whole groups at once would want the last one whole too
            mine, which = slice(group * self.group_size, (group + 1) * self.group_size), slice(group, group + 1)
            out[..., mine].sub_(centres[..., which]).mul_(scales[..., which])
        if self.column_scales is not None:
            out *= self.column_scales[pick].float().unsqueeze(1)

    def expected(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "codes": ((self.batch, self.rows, packed_width(self.columns, self.bits)), torch.uint8),
            "scales": ((self.batch, self.rows, self.groups), torch.float16),
        }
        if self.zero_points:
            shapes["zeros"] = ((self.batch, packed_width(self.rows * self.groups, self.bits)), torch.uint8)
        if self.column_scaled:
            shapes["column_scales"] = ((self.batch, self.columns), torch.float16)
        return shapes
