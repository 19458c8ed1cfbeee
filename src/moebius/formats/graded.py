"""A basis whose directions have fewer bits the less they matter.

Directions are the rows of a basis at the input side and the columns of one at the output side. They come in order of
energy, so their bits do not increase: the first so many have 8 bits, the next ones 6, and so on. Levels lie symmetrically
around zero, ``scale · (code − (2**bits − 1)/2)``, with a scale per direction on a logarithmic grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.errors import ShapeError
from moebius.formats.base import Packed
from moebius.formats.bits import pack, packed_width, unpack
from moebius.formats.logarithmic import decode, grid_faults

#: Bits of a scale's code.
SCALE_BITS = 8
#: Bits that are worth having, and the squared error that rounding to them leaves, relative to a direction's own: uniform levels
#: over a Gaussian, clipped where that errs least.
ROUNDING_NOISE = {8: 9.2e-5, 6: 1.04e-3, 5: 3.5e-3, 4: 1.15e-2, 3: 3.74e-2}


@dataclass(frozen=True)
class Graded(Packed):
    """Directions of 1 to 8 bits.

    Attributes:
        side: ``"input"``: directions are rows; ``"output"``: they are columns.
        grades: bits and how many directions in order have them: ``"8:12 6:40 4:100"``.
        codes: direction after direction, each from a byte of its own. uint8 (batch, bytes)
        scale_codes: uint8 (batch, directions).
        scale_grid: see :mod:`moebius.formats.logarithmic`. float16 (batch, 2)
    """

    name = "graded"

    side: str = "input"
    grades: str = ""
    codes: Tensor | None = None
    scale_codes: Tensor | None = None
    scale_grid: Tensor | None = None

    @classmethod
    def pack(cls, codes: Tensor, scale_codes: Tensor, scale_grid: Tensor, *, side: str, bits: Sequence[int]) -> Graded:
        """Pack integer codes.

        Args:
            codes: (batch, directions, entries), values of direction ``k`` in ``[0, 2**bits[k])``.
            scale_codes: (batch, directions).
            scale_grid: (batch, 2).
            side: see the class.
            bits: of every direction, not increasing.
        """
        batch, directions, entries = codes.shape
        runs = _runs(bits)
        parts, begin = [codes.new_zeros(batch, 0, dtype=torch.uint8)], 0
        for grade, count in runs:
            parts.append(pack(codes[:, begin : begin + count], grade).flatten(1))
            begin += count
        rows, columns = (directions, entries) if side == "input" else (entries, directions)
        grades = " ".join(f"{grade}:{count}" for grade, count in runs)
        stream = torch.cat(parts, 1)
        return cls(batch, rows, columns, side, grades, stream, scale_codes.to(torch.uint8).contiguous(), scale_grid.half())

    @classmethod
    def skeleton(cls, *, side: str, bits: Sequence[int], entries: int) -> Graded:
        """What :meth:`pack` would make of one matrix with these bits, with tensors on the meta device."""
        rows, columns = (len(bits), entries) if side == "input" else (entries, len(bits))
        blank = cls(1, rows, columns, side, " ".join(f"{grade}:{count}" for grade, count in _runs(bits)))
        return blank.replace(**{n: torch.empty(shape, dtype=t, device="meta") for n, (shape, t) in blank.expected().items()})

    @property
    def directions(self) -> int:
        """Of each matrix."""
        return self.rows if self.side == "input" else self.columns

    @property
    def entries(self) -> int:
        """Along each direction."""
        return self.columns if self.side == "input" else self.rows

    def _unpack_to(self, out: Tensor, index: Tensor | None) -> None:
        assert self.codes is not None and self.scale_codes is not None and self.scale_grid is not None
        pick = slice(None) if index is None else index
        codes, scales = self.codes[pick], decode(self.scale_codes[pick], self.scale_grid[pick])
        matrices = out if self.side == "input" else out.mT  # (chosen, directions, entries)
        first = begin = 0
        for grade, count in self.runs():
            width = packed_width(self.entries, grade)
            block = codes[:, begin : begin + count * width].reshape(len(codes), count, width)
            mine = slice(first, first + count)
            matrices[:, mine] = (unpack(block, grade, self.entries).float() - (2**grade - 1) / 2) * scales[:, mine, None]
            first, begin = first + count, begin + count * width

    def check_numbers(self) -> None:
        super().check_numbers()
        self.runs()

    def value_faults(self) -> Iterator[str]:
        assert self.scale_grid is not None
        yield from grid_faults("scale_grid", self.scale_grid, SCALE_BITS)

    def expected(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        stream = sum(count * packed_width(self.entries, grade) for grade, count in self.runs())
        return {
            "codes": ((self.batch, stream), torch.uint8),
            "scale_codes": ((self.batch, self.directions), torch.uint8),
            "scale_grid": ((self.batch, 2), torch.float16),
        }

    def runs(self) -> list[tuple[int, int]]:
        """Bits, and how many directions in order have them."""
        try:
            runs = [(int(grade), int(count)) for grade, count in (pair.split(":") for pair in self.grades.split())]
        except ValueError:
            runs = []
        if sum(count for _, count in runs) != self.directions or any(not 1 <= grade <= 8 or count < 1 for grade, count in runs):
            raise ShapeError(f"graded: got grades {self.grades!r}, wanted BITS:COUNT pairs that add up to {self.directions}")
        return runs


def _runs(bits: Sequence[int]) -> list[tuple[int, int]]:
    """Bits and how often, for every run of equal bits."""
    runs: list[tuple[int, int]] = []
    for grade in bits:
        if runs and runs[-1][0] == grade:
            runs[-1] = (grade, runs[-1][1] + 1)
        else:
            runs.append((int(grade), 1))
    return runs
