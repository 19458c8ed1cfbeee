"""Sign planes with row and column scales: the binarized expert factors of MoBiE.

An entry is ``row_scales[i] · (signs[i, j] · column_scales[j])``, and in the salient columns a second such term with signs
and column scales of its own is added inside the bracket (MoBiE Eq. 47, Algorithm 3). Both planes share the row scales: a
second set would cost 16 bits per row and measured no better. Which columns are salient costs one bit per column.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.errors import ShapeError
from moebius.formats.base import Packed
from moebius.formats.bits import count_faults, pack, packed_width, unpack, unpack_signs
from moebius.formats.numbers import within


@dataclass(frozen=True)
class Signs(Packed):
    """One plane of signs everywhere and a second one in ``salient`` columns of each matrix.

    Attributes:
        salient: columns with a second plane, the same number in every matrix of the batch.
        signs: uint8 (batch, rows, packed_width(columns, 1)); a set bit is +1.
        row_scales: float16 (batch, rows).
        column_scales: float16 (batch, columns).
        salient_mask: uint8 (batch, packed_width(columns, 1)), or None without salient columns.
        salient_signs: uint8 (batch, rows, packed_width(salient, 1)), the salient columns in ascending order.
        salient_column_scales: float16 (batch, salient).
    """

    name = "signs"

    salient: int = 0
    signs: Tensor | None = None
    row_scales: Tensor | None = None
    column_scales: Tensor | None = None
    salient_mask: Tensor | None = None
    salient_signs: Tensor | None = None
    salient_column_scales: Tensor | None = None

    @classmethod
    def pack(
        cls,
        positive: Tensor,
        row_scales: Tensor,
        column_scales: Tensor,
        *,
        salient_mask: Tensor | None = None,
        salient_positive: Tensor | None = None,
        salient_column_scales: Tensor | None = None,
    ) -> Signs:
        """Pack sign planes.

        Args:
            positive: whether the sign is +1. (batch, rows, columns) bool
            row_scales: (batch, rows).
            column_scales: (batch, columns).
            salient_mask: (batch, columns) bool with the same count in every matrix, or None.
            salient_positive: second plane. (batch, rows, columns) bool, read in the salient columns only.
            salient_column_scales: (batch, columns), read in the salient columns only.

        Raises:
            ShapeError: if the matrices have different numbers of salient columns.
        """
        batch, rows, columns = positive.shape
        first = {
            "signs": pack(positive, 1),
            "row_scales": row_scales.half().contiguous(),
            "column_scales": column_scales.half().contiguous(),
        }
        if salient_mask is None or not salient_mask.any():
            return cls(batch, rows, columns, 0, **first)
        counts = salient_mask.sum(1)
        if not (counts == counts[0]).all():
            raise ShapeError(f"signs: got {counts.tolist()} salient columns per matrix, wanted the same number in each")
        assert salient_positive is not None and salient_column_scales is not None
        picked = salient_mask.nonzero()[:, 1].view(batch, -1)  # (batch, salient), ascending
        return cls(
            batch,
            rows,
            columns,
            picked.shape[1],
            **first,
            salient_mask=pack(salient_mask, 1),
            salient_signs=pack(salient_positive.gather(2, picked[:, None].expand(-1, rows, -1)), 1),
            salient_column_scales=salient_column_scales.gather(1, picked).half().contiguous(),
        )

    def _unpack_to(self, out: Tensor, index: Tensor | None) -> None:
        assert self.signs is not None and self.row_scales is not None and self.column_scales is not None
        pick = slice(None) if index is None else index
        out.copy_(unpack_signs(self.signs[pick], self.columns))
        out *= self.column_scales[pick].float().unsqueeze(1)
        if self.salient:
            assert self.salient_mask is not None and self.salient_signs is not None
            assert self.salient_column_scales is not None
            second = unpack_signs(self.salient_signs[pick], self.salient).float()
            second *= self.salient_column_scales[pick].float().unsqueeze(1)
            mask = unpack(self.salient_mask[pick], 1, self.columns)
            picked = mask.nonzero()[:, 1].view(len(out), 1, self.salient)
            out.scatter_add_(2, picked.expand_as(second), second)
        out *= self.row_scales[pick].float().unsqueeze(2)

    def check_numbers(self) -> None:
        super().check_numbers()
        within(self, "salient", 0, self.columns)

    def value_faults(self) -> Iterator[str]:
        if self.salient_mask is not None:
            yield from count_faults("salient_mask", self.salient_mask, self.columns, self.salient)

    def expected(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "signs": ((self.batch, self.rows, packed_width(self.columns, 1)), torch.uint8),
            "row_scales": ((self.batch, self.rows), torch.float16),
            "column_scales": ((self.batch, self.columns), torch.float16),
        }
        if self.salient:
            shapes |= {
                "salient_mask": ((self.batch, packed_width(self.columns, 1)), torch.uint8),
                "salient_signs": ((self.batch, self.rows, packed_width(self.salient, 1)), torch.uint8),
                "salient_column_scales": ((self.batch, self.salient), torch.float16),
            }
        return shapes
