"""Tail-biting trellis codes: every weight is a level that is looked up by the last eight bits of a sequence of codes.

The codes of a column have 0 to 4 bits per entry; entry ``i`` is the level of the state made of the codes of entries
``i``, ``i - 1``, ... (lowest bits first, around the end of the column), as in trellis coded quantization (Marcellin and
Fischer, 1990) with the sliding window of QTIP (Tseng et al., 2024). Levels are trained on a Gaussian and shared by everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.formats.base import Packed
from moebius.formats.bits import pack, packed_width, unpack
from moebius.formats.logarithmic import decode, grid_faults
from moebius.formats.numbers import within
from moebius.formats.trellis_levels import LEVELS

STATE_BITS = 8
MOST_RATE = 4
SCALE_BITS = 8
#: Squared error of a Gaussian of unit variance at rates of 0, 1, ... bits.
DISTORTION = (1.0, 0.2831, 0.0779, 0.0215, 0.0059)
_RATE_BITS = 4
_GRIDS = 4  # fp16 numbers: the grids of the scales of rows and columns


@dataclass(frozen=True)
class Trellis(Packed):
    """Matrices whose element ``(i, j)`` is ``row_scale_i · column_scale_j · level``.

    Attributes:
        code_rows: of ``codes``: the sum of all rates.
        rates: bits per entry of every column, packed. uint8 (batch, packed_width(columns, 4))
        codes: the bit planes of the codes, lowest first, column after column. uint8 (code_rows, packed_width(rows, 1))
        row_codes: of the scales of rows. uint8 (batch, rows)
        column_codes: of the scales of columns. uint8 (batch, columns)
        grids: of the scales of rows, then of columns, see :mod:`moebius.formats.logarithmic`. float16 (batch, 4)
    """

    name = "trellis"

    code_rows: int = 0
    rates: Tensor | None = None
    codes: Tensor | None = None
    row_codes: Tensor | None = None
    column_codes: Tensor | None = None
    grids: Tensor | None = None

    @classmethod
    def pack(
        cls, states: Tensor, rates: Tensor, row_scales: tuple[Tensor, Tensor], column_scales: tuple[Tensor, Tensor]
    ) -> Trellis:
        """Pack matrices.

        Args:
            states: the code of every entry, below ``2**rate``. uint8 (batch, rows, columns)
            rates: int64 (batch, columns).
            row_scales, column_scales: codes and grid, see :func:`moebius.formats.logarithmic.encode`.
        """
        batch, rows, columns = states.shape
        planes = torch.stack([(states.mT >> plane) & 1 for plane in range(MOST_RATE)], 2)  # (batch, columns, planes, rows)
        kept = torch.arange(MOST_RATE, device=rates.device) < rates.unsqueeze(2)
        return cls(
            batch,
            rows,
            columns,
            int(rates.sum()),
            rates=pack(rates, _RATE_BITS),
            codes=pack(planes[kept], 1),
            row_codes=row_scales[0].contiguous(),
            column_codes=column_scales[0].contiguous(),
            grids=torch.cat([row_scales[1], column_scales[1]], 1).half().contiguous(),
        )

    @classmethod
    def skeleton(cls, rates: Tensor, rows: int) -> Trellis:
        """What :meth:`pack` would make of matrices with these rates, on the meta device but for the rates: nothing else says
        where codes are.
        """
        blank = cls(len(rates), rows, rates.shape[1], int(rates.sum()))
        tensors = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in blank.expected().items()}
        return blank.replace(**{**tensors, "rates": pack(rates, _RATE_BITS)})

    def check_numbers(self) -> None:
        super().check_numbers()
        within(self, "code_rows", 0, self.batch * self.columns * MOST_RATE)

    def value_faults(self) -> Iterator[str]:
        assert self.grids is not None
        rates = self.each_rate()
        highest, together = int(rates.max()) if rates.numel() else 0, int(rates.sum())
        if highest > MOST_RATE or together != self.code_rows:
            wanted = f"rates of up to {MOST_RATE} bits that add up to {self.code_rows}"
            yield f"rates: got up to {highest}, {together} in all, wanted {wanted}"
        yield from grid_faults("grids", self.grids.view(-1, 2), SCALE_BITS)

    def is_zero(self) -> bool:
        return self.code_rows == 0

    def each_rate(self, index: Tensor | None = None) -> Tensor:
        """Bits per entry of every column, int64 (chosen, columns)."""
        assert self.rates is not None
        return unpack(self.rates if index is None else self.rates[index], _RATE_BITS, self.columns).long()

    def row_scales(self, index: Tensor | None = None) -> Tensor:
        """(chosen, rows) float32"""
        assert self.row_codes is not None and self.grids is not None
        every = slice(None) if index is None else index
        return decode(self.row_codes[every], self.grids[every, :2])

    def column_scales(self, index: Tensor | None = None) -> Tensor:
        """(chosen, columns) float32"""
        assert self.column_codes is not None and self.grids is not None
        every = slice(None) if index is None else index
        return decode(self.column_codes[every], self.grids[every, 2:])

    def levels(self, index: Tensor | None = None) -> Tensor:
        """Zero where the rate is. (chosen, rows, columns) float32"""
        assert self.codes is not None
        every = self.each_rate().flatten()
        begins = (every.cumsum(0) - every).view(self.batch, self.columns)
        rates = self.each_rate(index)
        begins = begins if index is None else begins[index]
        levels = torch.zeros(len(rates), self.columns, self.rows, device=rates.device)
        for rate in range(1, MOST_RATE + 1):
            matrix, column = (rates == rate).nonzero(as_tuple=True)
            first = begins[matrix, column]
            codes = torch.zeros(len(first), self.rows, dtype=torch.int64, device=rates.device)
            for plane in range(rate):
                codes |= unpack(self.codes[first + plane], 1, self.rows).long() << plane
            levels[matrix, column] = levels_of(codes, rate)
        return levels.mT

    def _unpack_to(self, out: Tensor, index: Tensor | None) -> None:
        torch.mul(self.levels(index), self.column_scales(index).unsqueeze(1), out=out)
        out *= self.row_scales(index).unsqueeze(2)

    def expected(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {
            "rates": ((self.batch, packed_width(self.columns, _RATE_BITS)), torch.uint8),
            "codes": ((self.code_rows, packed_width(self.rows, 1)), torch.uint8),
            "row_codes": ((self.batch, self.rows), torch.uint8),
            "column_codes": ((self.batch, self.columns), torch.uint8),
            "grids": ((self.batch, _GRIDS), torch.float16),
        }


def levels_of(codes: Tensor, rate: int) -> Tensor:
    """The levels along sequences of codes. (sequences, entries) int64 to float32"""
    states = torch.zeros_like(codes)
    for back in range(-(-STATE_BITS // rate)):
        states |= codes.roll(back, 1) << (rate * back)
    return table(rate, codes.device)[states & (2**STATE_BITS - 1)]


def table(rate: int, device: torch.device | str = "cpu") -> Tensor:
    """The level of every state at a rate, (256,) float32."""
    step, levels = LEVELS[rate]
    codes = torch.frombuffer(bytearray.fromhex(levels), dtype=torch.int8)
    return (codes.float() * step).to(device)


def fixed_bytes(batch: int, rows: int, columns: int) -> int:
    """What is stored of matrices besides their codes."""
    return batch * (packed_width(columns, _RATE_BITS) + rows + columns + 2 * _GRIDS)
