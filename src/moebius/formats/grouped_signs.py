"""Signs in two groups of magnitudes, with scales per block of columns: BiLLM, and with column scales ARB-LLM.

An entry is ``row scale · column scale · sign``, where the row scale is that of the entry's block of columns and of its zone:
small, large (told apart by a bitmap of one bit per weight) or salient. In the salient columns a second such term is added.
Row scales of the salient zone may be those of longer blocks: there are few salient columns in each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.formats.base import Packed
from moebius.formats.bits import count_faults, pack, packed_width, unpack, unpack_signs
from moebius.formats.numbers import within


@dataclass(frozen=True)
class GroupedSigns(Packed):
    """One plane of signs everywhere, a group for each entry outside the salient columns, a second plane inside them.

    Attributes:
        block: columns that share row scales; the last block may be shorter.
        salient_block: the same for the row scales of the salient columns.
        salient: columns with a second plane, the same number in every matrix of the batch.
        column_scaled: whether columns have scales.
        signs: uint8 (batch, rows, packed_width(columns, 1)); a set bit is +1.
        groups: uint8 (batch, rows, packed_width(columns - salient, 1)); a set bit is the large group. Columns in ascending
            order, without the salient ones.
        row_scales: float16 (batch, rows, blocks, 2), of the small and of the large group.
        column_scales: float16 (batch, 2, columns), or None. Outside the salient columns those of the small and of the large
            group, inside those of the first and of the second plane.
        salient_mask: uint8 (batch, packed_width(columns, 1)), or None without salient columns.
        salient_signs: uint8 (batch, rows, packed_width(salient, 1)), the salient columns in ascending order.
        salient_row_scales: float16 (batch, rows, salient blocks, 2), of the first and of the second plane.
    """

    name = "grouped_signs"

    block: int = 128
    salient_block: int = 128
    salient: int = 0
    column_scaled: bool = False
    signs: Tensor | None = None
    groups: Tensor | None = None
    row_scales: Tensor | None = None
    column_scales: Tensor | None = None
    salient_mask: Tensor | None = None
    salient_signs: Tensor | None = None
    salient_row_scales: Tensor | None = None

    @classmethod
    def pack(
        cls,
        positive: Tensor,
        large: Tensor,
        row_scales: Tensor,
        column_scales: Tensor | None,
        salient_mask: Tensor,
        second_positive: Tensor,
        salient_row_scales: Tensor,
        *,
        block: int,
        salient_block: int,
    ) -> GroupedSigns:
        """Pack sign planes.

        Args:
            positive: whether the sign is +1. (batch, rows, columns) bool
            large: whether an entry is in the large group, read outside the salient columns. (batch, rows, columns) bool
            row_scales: (batch, rows, blocks, 2).
            column_scales: (batch, 2, columns), or None.
            salient_mask: bool (batch, columns), the same count in every matrix.
            second_positive: second plane, read in the salient columns. (batch, rows, columns) bool
            salient_row_scales: (batch, rows, salient blocks, 2).
            block: columns that share row scales.
            salient_block: the same for the salient columns.
        """
        batch, rows, columns = positive.shape
        chosen, others = _columns_of(salient_mask), _columns_of(~salient_mask)
        salient = chosen.shape[1]
        second = {
            "salient_mask": pack(salient_mask, 1),
            "salient_signs": pack(_at(second_positive, chosen), 1),
            "salient_row_scales": salient_row_scales.half().contiguous(),
        }
        return cls(
            batch,
            rows,
            columns,
            block,
            salient_block,
            salient,
            column_scales is not None,
            signs=pack(positive, 1),
            groups=pack(_at(large, others), 1),
            row_scales=row_scales.half().contiguous(),
            column_scales=None if column_scales is None else column_scales.half().contiguous(),
            **(second if salient else {}),
        )

    @property
    def blocks(self) -> int:
        """Blocks of columns."""
        return -(-self.columns // self.block)

    @property
    def salient_blocks(self) -> int:
        """Blocks of columns, as the salient ones count them."""
        return -(-self.columns // self.salient_block)

    def _unpack_to(self, out: Tensor, index: Tensor | None) -> None:
        assert self.signs is not None and self.groups is not None and self.row_scales is not None
        pick = slice(None) if index is None else index
        signs = unpack_signs(self.signs[pick], self.columns)
        mask = self._mask(signs, pick)
        others = _columns_of(~mask).unsqueeze(1).expand(-1, self.rows, -1)
        groups = unpack(self.groups[pick], 1, self.columns - self.salient)
        large = torch.zeros_like(signs, dtype=torch.bool).scatter_(2, others, groups.bool())
        second, salient_rows = torch.zeros_like(signs), signs.new_zeros(*signs.shape[:2], self.salient_blocks, 2).float()
        if self.salient:
            assert self.salient_signs is not None and self.salient_row_scales is not None
            salient_rows = self.salient_row_scales[pick].float()
            chosen = _columns_of(mask).unsqueeze(1).expand(-1, self.rows, -1)
            second.scatter_(2, chosen, unpack_signs(self.salient_signs[pick], self.salient))
        column_scales = None if self.column_scales is None else self.column_scales[pick].float()
        matrices = assemble(
            signs,
            large,
            self.row_scales[pick].float(),
            column_scales,
            mask,
            second,
            salient_rows,
            block=self.block,
            salient_block=self.salient_block,
        )
        out.copy_(matrices)

    def _mask(self, signs: Tensor, pick: Tensor | slice) -> Tensor:
        if self.salient_mask is None:
            return torch.zeros_like(signs[:, 0], dtype=torch.bool)
        return unpack(self.salient_mask[pick], 1, self.columns).bool()

    def check_numbers(self) -> None:
        super().check_numbers()
        within(self, "salient", 0, self.columns)

    def value_faults(self) -> Iterator[str]:
        if self.salient_mask is not None:
            yield from count_faults("salient_mask", self.salient_mask, self.columns, self.salient)

    def expected(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "signs": ((self.batch, self.rows, packed_width(self.columns, 1)), torch.uint8),
            "groups": ((self.batch, self.rows, packed_width(self.columns - self.salient, 1)), torch.uint8),
            "row_scales": ((self.batch, self.rows, self.blocks, 2), torch.float16),
        }
        if self.column_scaled:
            shapes["column_scales"] = ((self.batch, 2, self.columns), torch.float16)
        if self.salient:
            shapes["salient_mask"] = ((self.batch, packed_width(self.columns, 1)), torch.uint8)
            shapes["salient_signs"] = ((self.batch, self.rows, packed_width(self.salient, 1)), torch.uint8)
            shapes["salient_row_scales"] = ((self.batch, self.rows, self.salient_blocks, 2), torch.float16)
        return shapes


def assemble(
    signs: Tensor,
    large: Tensor,
    row_scales: Tensor,
    column_scales: Tensor | None,
    salient_mask: Tensor,
    second_signs: Tensor,
    salient_row_scales: Tensor,
    *,
    block: int,
    salient_block: int,
) -> Tensor:
    """The matrices that planes stand for, float32; arguments as in :meth:`GroupedSigns.pack`, with ±1 for the signs."""
    columns = signs.shape[2]
    small, big = row_scales.repeat_interleave(min(block, columns), dim=2)[:, :, :columns].unbind(3)
    first, second = salient_row_scales.repeat_interleave(min(salient_block, columns), dim=2)[:, :, :columns].unbind(3)
    mask = salient_mask.unsqueeze(1)
    if column_scales is not None:
        lower, upper = column_scales.unsqueeze(2).unbind(1)  # (batch, 1, columns) each
        small, big, first, second = small * lower, big * upper, first * lower, second * upper
    return torch.where(mask, first * signs + second * second_signs, torch.where(large, big, small) * signs)


def _at(plane: Tensor, columns: Tensor) -> Tensor:
    """Chosen columns of each matrix. (batch, rows, columns), (batch, count) to (batch, rows, count)"""
    return plane.gather(2, columns.unsqueeze(1).expand(-1, plane.shape[1], -1))


def _columns_of(mask: Tensor) -> Tensor:
    """The set columns of each matrix in ascending order. bool (batch, columns) to (batch, count)"""
    columns = mask.nonzero()[:, 1]
    return columns.view(len(mask), len(columns) // max(len(mask), 1))
