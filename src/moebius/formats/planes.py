"""Nested sign planes: every direction of every expert has as many planes as it deserves.

A matrix has *directions* and, along each, *entries*. The factor of ``gate_up`` sits left of a shared basis, so its directions
are its columns (``side="input"``); that of ``down`` sits right of one, so they are its rows (``side="output"``). With ``b``
planes in direction ``k``, entry ``j`` is

    ``entry_scale[j] · direction_scale[k] · Σ_{p<b} AMPLITUDES[b][p] · sign[p, k, j]``

and zero with none. Directions come in order of energy: plane ``p`` of an expert covers its first ``widths[p]`` directions, so
that nothing else says where planes are. Amplitudes depend on ``b`` alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.formats.base import Packed
from moebius.formats.bits import pack, packed_width, unpack, unpack_signs
from moebius.formats.logarithmic import decode, grid_faults
from moebius.formats.numbers import within

#: Planes to their amplitudes: those of least squared error for a Gaussian of unit variance, among sums of signs. For one and
#: two planes these are the Lloyd-Max levels themselves; for three and four the levels of a quantizer without the nesting would
#: err by 0.0345 and 0.0095. From five on each is half of the one before, which is within 1 % of the best and exact in bytes:
#: seven planes are the integers from -127 to 127.
AMPLITUDES: dict[int, tuple[float, ...]] = {
    1: (0.79788456,),
    2: (0.98159881, 0.52881878),
    3: (1.15784549, 0.60694633, 0.30104003),
    4: (1.33061049, 0.68568196, 0.33885703, 0.16955516),
    5: (1.5051104, 0.7525552, 0.3762776, 0.1881388, 0.0940694),
    6: (1.665008, 0.832504, 0.416252, 0.208126, 0.104063, 0.0520315),
    7: (1.81976576, 0.90988288, 0.45494144, 0.22747072, 0.11373536, 0.05686768, 0.02843384),
}
#: Squared error for a Gaussian of unit variance, by number of planes.
DISTORTION = (1.0, 0.36338023, 0.11748185, 0.03694262, 0.01141128, 0.00349521, 0.00104005, 0.00030433)
MOST_PLANES = 7


@dataclass(frozen=True)
class Planes(Packed):
    """Matrices of nested sign planes.

    Attributes:
        side: ``"input"``: directions are columns; ``"output"``: they are rows.
        planes: the most planes that a direction has.
        scale_bits: bits of a code of a scale.
        sign_rows: rows of ``signs``, the sum of ``widths``.
        live: directions with a plane, over all matrices.
        live_matrices: matrices with a plane.
        widths: directions that each plane covers, not increasing along the planes. int16 (batch, planes)
        signs: a row for every direction of every plane: matrix after matrix, plane after plane, direction after direction; a
            set bit is +1. uint8 (sign_rows, packed_width(entries, 1))
        entry_codes: scales of the entries of matrices that have a plane, see :mod:`moebius.formats.logarithmic`. uint8
            (live_matrices, packed_width(entries, scale_bits))
        entry_grids: float16 (live_matrices, 2).
        direction_codes: scales of the live directions, matrix after matrix, one stream. uint8
            (packed_width(live, scale_bits),)
        direction_grids: float16 (live_matrices, 2).
    """

    name = "planes"

    side: str = "input"
    planes: int = 1
    scale_bits: int = 8
    sign_rows: int = 0
    live: int = 0
    live_matrices: int = 0
    widths: Tensor | None = None
    signs: Tensor | None = None
    entry_codes: Tensor | None = None
    entry_grids: Tensor | None = None
    direction_codes: Tensor | None = None
    direction_grids: Tensor | None = None

    @classmethod
    def pack(
        cls,
        signs: Tensor,
        widths: Tensor,
        entry_codes: Tensor,
        entry_grids: Tensor,
        direction_codes: Tensor,
        direction_grids: Tensor,
        *,
        side: str,
        directions: int,
        entries: int,
        scale_bits: int,
    ) -> Planes:
        """Pack planes.

        Args:
            signs: uint8 (sign_rows, packed_width(entries, 1)), as they are stored, see :func:`pack_signs`.
            widths: (batch, planes).
            entry_codes: (batch, entries); those of matrices without planes are left out.
            entry_grids: (batch, 2).
            direction_codes: (batch, directions); those of directions without planes are left out.
            direction_grids: (batch, 2).
            side: see the class.
            directions: of each matrix.
            entries: along each direction.
            scale_bits: of the codes.
        """
        live = widths[:, :1].sum(1) > 0  # there may be no plane at all
        in_use = torch.arange(directions, device=widths.device) < widths[:, :1]
        return cls(
            len(widths),
            *_shape(side, directions, entries),
            side,
            widths.shape[1],
            scale_bits,
            int(widths.sum()),
            int(in_use.sum()),
            int(live.sum()),
            widths=widths.to(torch.int16).contiguous(),
            signs=signs.contiguous(),
            entry_codes=pack(entry_codes[live], scale_bits),
            entry_grids=entry_grids[live].half().contiguous(),
            direction_codes=pack(direction_codes[in_use], scale_bits),
            direction_grids=direction_grids[live].half().contiguous(),
        )

    @classmethod
    def skeleton(
        cls, widths: Tensor, *, side: str, directions: int, entries: int, scale_bits: int, device: torch.device | str = "meta"
    ) -> Planes:
        """What :meth:`pack` would make of matrices with these widths, with uninitialized tensors. Widths keep their values, and
        where the others are on the meta device their place: nothing else says where planes are.
        """
        rows, columns = _shape(side, directions, entries)
        counts = int(widths.sum()), int(widths[:, :1].sum()), int((widths[:, :1] > 0).sum())
        blank = cls(len(widths), rows, columns, side, widths.shape[1], scale_bits, *counts)
        tensors = {name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in blank.expected().items()}
        tensors["widths"] = widths.to(widths.device if tensors["signs"].is_meta else device, torch.int16).contiguous()
        return blank.replace(**tensors)

    @property
    def directions(self) -> int:
        """Of each matrix."""
        return self.columns if self.side == "input" else self.rows

    @property
    def entries(self) -> int:
        """Along each direction."""
        return self.rows if self.side == "input" else self.columns

    def entry_scales(self, index: Tensor | None = None) -> Tensor:
        """(chosen, entries) float32; ones for matrices without planes."""
        assert self.widths is not None and self.entry_codes is not None and self.entry_grids is not None
        live = self.widths[:, :1].sum(1) > 0
        place = (live.cumsum(0) - 1).clamp_min(0)
        if index is not None:
            live, place = live[index], place[index]
        scales = torch.ones(len(live), self.entries, device=live.device)
        if self.live_matrices:
            codes = unpack(self.entry_codes[place[live]], self.scale_bits, self.entries)
            scales[live] = decode(codes, self.entry_grids[place[live]])
        return scales

    def direction_scales(self, index: Tensor | None = None) -> Tensor:
        """(chosen, directions) float32; zeros for directions without planes."""
        assert self.widths is not None and self.direction_codes is not None and self.direction_grids is not None
        first = self.widths[:, :1].long().sum(1)
        begin, place = first.cumsum(0) - first, (first > 0).cumsum(0) - 1
        if index is not None:
            first, begin, place = first[index], begin[index], place[index]
        matrix, direction = (torch.arange(self.directions, device=first.device) < first.unsqueeze(1)).nonzero(as_tuple=True)
        scales = torch.zeros(len(first), self.directions, device=first.device)
        codes = unpack(self.direction_codes, self.scale_bits, self.live)[begin[matrix] + direction]
        scales[matrix, direction] = decode(codes.unsqueeze(1), self.direction_grids[place[matrix]]).squeeze(1)
        return scales

    def is_zero(self) -> bool:
        return self.sign_rows == 0

    def counts(self, index: Tensor | None = None) -> Tensor:
        """Planes of every direction, (chosen, directions) int64."""
        assert self.widths is not None
        widths = (self.widths if index is None else self.widths[index]).long()
        return (torch.arange(self.directions, device=widths.device) < widths.unsqueeze(2)).sum(1)

    def levels(self, index: Tensor | None = None) -> Tensor:
        """Sums of signed amplitudes, zero without planes. (chosen, directions, entries) float32"""
        assert self.widths is not None and self.signs is not None
        every = self.widths.long().flatten()
        begins = (every.cumsum(0) - every).view(self.batch, self.planes)
        widths = self.widths.long()
        if index is not None:
            begins, widths = begins[index], widths[index]
        table = torch.tensor([[0.0] * MOST_PLANES, *(a + (0.0,) * (MOST_PLANES - len(a)) for a in AMPLITUDES.values())])
        amplitudes = table.to(widths.device)[self.counts(index)]  # (chosen, directions, planes)
        levels = torch.zeros(len(widths), self.directions, self.entries, device=widths.device)
        for plane in range(self.planes):
            covered = torch.arange(self.directions, device=widths.device) < widths[:, plane, None]
            matrix, direction = covered.nonzero(as_tuple=True)
            signs = unpack_signs(self.signs[begins[matrix, plane] + direction], self.entries).float()
            levels[matrix, direction] += signs * amplitudes[matrix, direction, plane, None]
        return levels

    def _unpack_to(self, out: Tensor, index: Tensor | None) -> None:
        values = self.levels(index).mul_(self.direction_scales(index).unsqueeze(2))
        values *= self.entry_scales(index).unsqueeze(1)
        out.copy_(values.mT if self.side == "input" else values)

    def check_numbers(self) -> None:
        super().check_numbers()
        within(self, "live_matrices", 0, self.batch)
        within(self, "live", self.live_matrices, self.live_matrices * self.directions)
        within(self, "sign_rows", self.live, self.live * self.planes)

    def value_faults(self) -> Iterator[str]:
        assert self.widths is not None and self.entry_grids is not None and self.direction_grids is not None
        widths = self.widths.long()
        if bool((widths < 0).any() or (widths > self.directions).any() or (widths.diff(dim=1) > 0).any()):
            yield f"widths: wanted {self.directions} directions at most, and no plane wider than the one before"
        got = int(widths.sum()), int(widths[:, :1].sum()), int((widths[:, :1] > 0).sum())
        wanted = self.sign_rows, self.live, self.live_matrices
        if got != wanted:
            yield f"widths: got {got} rows of signs, directions and matrices in use, wanted {wanted}"
        yield from grid_faults("entry_grids", self.entry_grids, self.scale_bits)
        yield from grid_faults("direction_grids", self.direction_grids, self.scale_bits)

    def expected(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {
            "widths": ((self.batch, self.planes), torch.int16),
            "signs": ((self.sign_rows, packed_width(self.entries, 1)), torch.uint8),
            "entry_codes": ((self.live_matrices, packed_width(self.entries, self.scale_bits)), torch.uint8),
            "entry_grids": ((self.live_matrices, 2), torch.float16),
            "direction_codes": ((packed_width(self.live, self.scale_bits),), torch.uint8),
            "direction_grids": ((self.live_matrices, 2), torch.float16),
        }


def pack_signs(positive: Tensor, widths: Tensor) -> Tensor:
    """Rows of :attr:`Planes.signs` for some matrices.

    Args:
        positive: whether the sign is +1. (matrices, planes, directions, entries) bool
        widths: (matrices, planes).
    """
    covered = torch.arange(positive.shape[2], device=widths.device) < widths.unsqueeze(2)
    return pack(positive[covered], 1)


def _shape(side: str, directions: int, entries: int) -> tuple[int, int]:
    """(rows, columns)"""
    return (entries, directions) if side == "input" else (directions, entries)
