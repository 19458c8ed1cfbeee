"""Vector quantization: every few columns of a row are one entry of a codebook that the matrix has to itself (GPTVQ, KBVQ-MoE).

``W = diag(row_scales) · (loadings · directions + entries) · diag(column_scales)``: what the codes stand for, on top of a few
directions that all matrices share and that stay in 16 bit (IDRE, KBVQ-MoE Eq. 4 and 6). All of these extras are optional.
Vectors lie along the rows, or along the columns where ``transposed`` (VPTQ).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.formats.base import Packed
from moebius.formats.bits import pack, packed_width, unpack
from moebius.formats.numbers import within

# A vector may reach beyond its row, but not so far that unpacking takes many times what the matrix does.
_LONGEST = 16


@dataclass(frozen=True)
class Codebook(Packed):
    """Codes of ``code_bits`` bits, each for ``length`` columns.

    Attributes:
        length: entries per code; the last vector of a row, or of a column, may reach beyond its end.
        rank: directions that all matrices share; 0 for none.
        row_scaled, column_scaled: whether rows, and columns, have scales.
        transposed: whether vectors lie along the columns.
        codes: uint8 (batch, rows, packed_width(vectors per row, code_bits)); where transposed, columns take the place of rows.
        codebooks: float16 (batch, 2**code_bits, length).
        row_scales: float16 (batch, rows), or None.
        loadings: float16 (batch, rows, rank), or None.
        directions: float16 (1, rank, columns), or None.
        column_scales: float16 (batch, columns), or None.
    """

    name = "codebook"
    later = frozenset({"transposed", "column_scaled"})

    code_bits: int = 8
    length: int = 4
    rank: int = 0
    row_scaled: bool = False
    codes: Tensor | None = None
    codebooks: Tensor | None = None
    row_scales: Tensor | None = None
    loadings: Tensor | None = None
    directions: Tensor | None = None
    transposed: bool = False
    column_scaled: bool = False
    column_scales: Tensor | None = None

    @classmethod
    def pack(cls, codes: Tensor, codebooks: Tensor, along: int, *, transposed: bool = False) -> Codebook:
        """Pack codes.

        Args:
            codes: (batch, rows, vectors per row), values below the number of entries; of the transposed matrices where
                ``transposed``.
            codebooks: (batch, entries, length); a power of two of entries.
            along: columns of the matrices, or rows where ``transposed``: what vectors lie along.
            transposed: whether vectors lie along the columns.
        """
        batch, entries, length = codebooks.shape
        bits = (entries - 1).bit_length()
        rows, columns = (along, codes.shape[1]) if transposed else (codes.shape[1], along)
        packed = cls(batch, rows, columns, bits, length, transposed=transposed)
        return packed.replace(codes=pack(codes, bits), codebooks=codebooks.half().contiguous())

    def with_shared(self, loadings: Tensor, directions: Tensor) -> Codebook:
        """The same codes on top of shared directions.

        Args:
            loadings: (batch, rows, rank).
            directions: (rank, columns).
        """
        return self.replace(
            rank=len(directions), loadings=loadings.half().contiguous(), directions=directions.half()[None].contiguous()
        )

    def with_row_scales(self, row_scales: Tensor) -> Codebook:
        """The same matrices with a scale (batch, rows) for each row."""
        return self.replace(row_scaled=True, row_scales=row_scales.half().contiguous())

    def with_column_scales(self, column_scales: Tensor) -> Codebook:
        """The same matrices with a scale (batch, columns) for each column."""
        return self.replace(column_scaled=True, column_scales=column_scales.half().contiguous())

    @property
    def lines(self) -> tuple[int, int]:
        """How many lines of vectors there are, and how many entries each has: rows and columns, or the other way round."""
        return (self.columns, self.rows) if self.transposed else (self.rows, self.columns)

    @property
    def vectors(self) -> int:
        """Codes per line."""
        return -(-self.lines[1] // self.length)

    def _unpack_to(self, out: Tensor, index: Tensor | None) -> None:
        assert self.codes is not None and self.codebooks is not None
        pick = slice(None) if index is None else index
        codes = unpack(self.codes[pick], self.code_bits, self.vectors).long().flatten(1)  # (chosen, lines * vectors)
        books = self.codebooks[pick].float()
        places = codes.unsqueeze(2).expand(-1, -1, self.length)
        lines, entries = self.lines
        if self.transposed or entries % self.length:
            values = books.gather(1, places).view(len(codes), lines, -1)[..., :entries]
            out.copy_(values.mT if self.transposed else values)
        else:
            torch.gather(books, 1, places, out=out.view(len(codes), -1, self.length))
        if self.loadings is not None and self.directions is not None:
            loadings, directions = self.loadings[pick].float(), self.directions[0].float()
            out.baddbmm_(loadings, directions.expand(len(loadings), -1, -1))
        if self.row_scales is not None:
            out *= self.row_scales[pick].float().unsqueeze(2)
        if self.column_scales is not None:
            out *= self.column_scales[pick].float().unsqueeze(1)

    def check_numbers(self) -> None:
        super().check_numbers()
        within(self, "rank", 0, self.columns)
        within(self, "length", 1, max(self.columns, _LONGEST))

    def expected(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "codes": ((self.batch, self.lines[0], packed_width(self.vectors, self.code_bits)), torch.uint8),
            "codebooks": ((self.batch, 2**self.code_bits, self.length), torch.float16),
        }
        if self.row_scaled:
            shapes["row_scales"] = ((self.batch, self.rows), torch.float16)
        if self.column_scaled:
            shapes["column_scales"] = ((self.batch, self.columns), torch.float16)
        if self.rank:
            shapes["loadings"] = ((self.batch, self.rows, self.rank), torch.float16)
            shapes["directions"] = ((1, self.rank, self.columns), torch.float16)
        return shapes
