"""Directions of a joint basis, each at a width of its own from 0 to 8 bits (BitsMoE).

The codes of all directions of all matrices lie in one payload of a fixed size, sorted by width: how the bits are spread over
the directions does not change what is stored. Four bits per direction say its width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.formats.base import Packed
from moebius.formats.bits import pack, packed_width, unpack

#: The widest a direction can be.
MAX_BITS = 8


@dataclass(frozen=True)
class Spectral(Packed):
    """Directions are the rows of each matrix, or its columns where ``transposed``.

    The record of a direction of ``b > 0`` bits is a float16 scale for every ``group_size`` entries, then the packed codes
    ``q``, which mean ``scale · (q − (2**b − 1)/2)``. Records follow each other by width, matrix and direction.

    Attributes:
        transposed: whether directions are columns.
        group_size: entries that share a scale; the last group may be shorter.
        payload_bytes: what the records may take; the rest is zero.
        row_scaled: whether rows have scales.
        widths: uint8 (batch, packed_width(directions, 4)).
        payload: uint8 (payload_bytes,).
        row_scales: float16 (batch, rows), or None.
    """

    name = "spectral"

    transposed: bool = False
    group_size: int = 128
    payload_bytes: int = 0
    row_scaled: bool = False
    widths: Tensor | None = None
    payload: Tensor | None = None
    row_scales: Tensor | None = None

    @property
    def directions(self) -> int:
        """Directions of each matrix."""
        return self.columns if self.transposed else self.rows

    @property
    def length(self) -> int:
        """Entries of a direction."""
        return self.rows if self.transposed else self.columns

    def fill(self, widths: Tensor, codes: Tensor, scales: Tensor, row_scales: Tensor | None = None) -> Spectral:
        """The same description with these directions in it.

        Args:
            widths: integers from 0 to 8. (batch, directions)
            codes: (batch, directions, length), of a direction of ``b`` bits in ``[0, 2**b)``.
            scales: (batch, directions, groups).
            row_scales: (batch, rows), or None.
        """
        payload = codes.new_zeros(self.payload_bytes, dtype=torch.uint8)
        for bits, units, start in self.sections(widths):
            scale_bytes = scales.flatten(0, 1)[units].half().contiguous().view(torch.uint8)
            records = torch.cat([scale_bytes, pack(codes.flatten(0, 1)[units], bits)], 1)
            payload[start : start + records.numel()] = records.flatten()
        return self.replace(
            widths=pack(widths, 4), payload=payload, row_scales=None if row_scales is None else row_scales.half().contiguous()
        )

    def _unpack_to(self, out: Tensor, index: Tensor | None) -> None:
        assert self.widths is not None and self.payload is not None
        widths = unpack(self.widths, 4, self.directions)
        index = torch.arange(self.batch, device=widths.device) if index is None else index
        place = torch.full((self.batch,), -1, device=widths.device).index_copy_(
            0, index, torch.arange(len(index), device=widths.device)
        )
        matrices = (out.mT if self.transposed else out).zero_()
        for bits, units, start in self.sections(widths):
            records = self.payload[start : start + len(units) * self.record_bytes(bits)].view(len(units), -1)
            matrix = place[units // self.directions]
            chosen = matrix >= 0
            records = records[chosen]
            scales = self._scales(records).float()
            levels = unpack(records[:, 2 * self.groups :], bits, self.length).float().sub_((2**bits - 1) / 2)
            for group in range(self.groups):
                levels[:, group * self.group_size : (group + 1) * self.group_size] *= scales[:, group, None]
            matrices[matrix[chosen], (units % self.directions)[chosen]] = levels
        if self.row_scales is not None:
            out *= self.row_scales[index].float().unsqueeze(2)

    @property
    def groups(self) -> int:
        """Scales per direction."""
        return -(-self.length // self.group_size)

    def record_bytes(self, bits: int) -> int:
        """What a direction of this width takes in the payload."""
        return 2 * self.groups + packed_width(self.length, bits) if bits else 0

    def _scales(self, records: Tensor) -> Tensor:
        """Of records (n, bytes), float16 (n, groups)."""
        return records[:, : 2 * self.groups].clone(memory_format=torch.contiguous_format).view(torch.float16)

    def value_faults(self) -> Iterator[str]:
        assert self.widths is not None and self.payload is not None
        widths = unpack(self.widths, 4, self.directions)
        if self.directions and int(widths.max()) > MAX_BITS:
            yield f"widths: got directions of {int(widths.max())} bits, wanted {MAX_BITS} at most"
        taken = sum(self.record_bytes(bits) * len(units) for bits, units, _ in self.sections(widths))
        if taken > self.payload_bytes:
            yield f"widths: ask for {taken} bytes of codes, wanted at most {self.payload_bytes}"
            return
        for bits, units, start in self.sections(widths):
            records = self.payload[start : start + len(units) * self.record_bytes(bits)].view(len(units), -1)
            if not self._scales(records).isfinite().all():
                yield "payload: holds scales that are NaN or Inf"

    def expected(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "widths": ((self.batch, packed_width(self.directions, 4)), torch.uint8),
            "payload": ((self.payload_bytes,), torch.uint8),
        }
        if self.row_scaled:
            shapes["row_scales"] = ((self.batch, self.rows), torch.float16)
        return shapes

    def sections(self, widths: Tensor) -> Iterator[tuple[int, Tensor, int]]:
        """Each width that occurs, its units (matrix · directions + direction) and where their records begin."""
        start, flat = 0, widths.flatten()
        for bits in range(1, MAX_BITS + 1):
            units = (flat == bits).nonzero().squeeze(1)
            if len(units):
                yield bits, units, start
                start += len(units) * self.record_bytes(bits)
