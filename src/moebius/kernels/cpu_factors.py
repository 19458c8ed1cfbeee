"""Packed matrices on the CPU, for all ops: what C++ reads of each format, and dense products where that does not multiply.

For one input or two of an expert, and up to ``FEW_INPUTS`` of a shared factor, vectors are
rounded to integers that are fine enough for sums in 16 bits (signs) or 32 bits (shared factors); sums are exact, so that every
level of instructions gives the same bits. For more, with AVX-512 VNNI, a tile of the matrix at a time is unpacked to bytes and
multiplied with inputs rounded to 8 bits, with a step for every 128 of them. Elsewhere one matrix at a time is unpacked to bf16
in a buffer and multiplied by PyTorch. Scales are decoded once; everything else is read as it is stored.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from moebius import native
from moebius.formats import Packed
from moebius.formats.bits import unpack, unpack_signs
from moebius.formats.graded import Graded
from moebius.formats.integers import Integers
from moebius.formats.logarithmic import decode
from moebius.formats.planes import Planes
from moebius.formats.signs import Signs
from moebius.kernels.amplitudes import amplitudes

_scratch = threading.local()


def as_stored(tensor: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A stored tensor that is read where it lies, and itself if that had to be a copy.

    The memory that it has now stays, whatever memory the tensor is given later.
    """
    held = tensor.detach().contiguous()
    return held, () if held.data_ptr() == tensor.data_ptr() else (tensor,)


class Kernel(ABC):
    """Packed matrices, and what the extension reads of them.

    Attributes:
        factor: the extension's own object. It reads the tensors in ``held``.
        copied: what of the stored tensors is held in another form: what is written to them later is not seen here.
    """

    factor: Any
    held: tuple[Tensor, ...]
    rows: int
    copied: tuple[Tensor, ...] = ()

    def has_tiles(self) -> bool:
        """Whether the extension multiplies any number of inputs fast, by tiles."""
        return native.has_tiles()

    def packed(self, inputs: Tensor, slots: Tensor | None = None, slots_per_input: int = 1) -> Tensor:
        """Row ``i`` is the matrix ``slots[i]`` times row ``i // slots_per_input`` of the inputs, zeros if that is no matrix.

        Args:
            inputs: (n, columns) float32.
            slots: (n * slots_per_input,) int64; None for the first matrix everywhere.
            slots_per_input: outputs for each input.

        Returns:
            (n * slots_per_input, rows) float32.
        """
        outputs = torch.empty(len(inputs) * slots_per_input, self.rows)
        self.factor.apply(inputs.contiguous(), outputs, slots, slots_per_input, torch.get_num_threads())
        return outputs

    def _as_stored(self, tensor: Tensor) -> Tensor:
        """:func:`as_stored`, with what was copied noted."""
        held, copied = as_stored(tensor)
        self.copied += copied
        return held

    @abstractmethod
    def dense(self, matrix: int, inputs: Tensor, dtype: torch.dtype) -> Tensor:
        """One matrix times (n, columns) inputs: (n, rows) float32, through a product in ``dtype``."""

    def _unpacked(self, matrix: int, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """What the extension unpacks of a matrix, in a buffer that the next call writes to. (rows or less, width)"""
        buffer: Tensor | None = getattr(_scratch, "buffer", None)
        if buffer is None or buffer.numel() < rows * width:
            buffer = _scratch.buffer = torch.empty(rows * width, dtype=torch.bfloat16)
        written = self.factor.unpack(matrix, buffer, torch.get_num_threads())
        return buffer[: written * width].view(written, width).to(dtype)


class _Planes(Kernel):
    def __init__(self, packed: Planes) -> None:
        assert packed.widths is not None and packed.signs is not None
        self.rows, self.shape = packed.rows, (packed.directions, packed.entries)
        self.input = packed.side == "input"
        self.entry_scales = packed.entry_scales()
        self.copied = tuple(tensor for name, tensor in packed.tensors().items() if name != "signs")
        self.held = packed.widths.contiguous(), self._as_stored(packed.signs), self.entry_scales, packed.direction_scales()
        self.factor = native.extension().planes(self.input, *self.held, amplitudes(packed.widths.device))

    def dense(self, matrix: int, inputs: Tensor, dtype: torch.dtype) -> Tensor:
        directions = self._unpacked(matrix, *self.shape, dtype)
        scales, used = self.entry_scales[matrix], len(directions)
        if self.input:
            return (inputs[:, :used].to(dtype) @ directions).float() * scales
        outputs = inputs.new_zeros(len(inputs), self.rows)
        outputs[:, :used] = (inputs * scales).to(dtype) @ directions.mT
        return outputs


class _Signs(Kernel):
    def __init__(self, packed: Signs) -> None:
        assert packed.signs is not None and packed.row_scales is not None and packed.column_scales is not None
        self.rows, self.columns, self.salient = packed.rows, packed.columns, packed.salient
        self.row_scales, self.column_scales = packed.row_scales.float(), packed.column_scales.float()
        self.copied = tuple(tensor for name, tensor in packed.tensors().items() if name not in ("signs", "salient_signs"))
        self.held = self._as_stored(packed.signs), self.row_scales.contiguous(), self.column_scales.contiguous()
        if packed.salient:
            assert packed.salient_mask is not None and packed.salient_signs is not None
            assert packed.salient_column_scales is not None
            marked = unpack(packed.salient_mask, 1, packed.columns).nonzero()[:, 1]
            self.picked = marked.int().view(packed.batch, packed.salient)
            self.second, self.second_scales = self._as_stored(packed.salient_signs), packed.salient_column_scales.float()
            self.held += self.picked, self.second, self.second_scales.contiguous()
        salient = self.held[3:] or (None, None, None)
        self.factor = native.extension().signs(packed.columns, *self.held[:3], *salient)

    def dense(self, matrix: int, inputs: Tensor, dtype: torch.dtype) -> Tensor:
        signs = self._unpacked(matrix, self.rows, self.columns, dtype)
        outputs = ((inputs * self.column_scales[matrix]).to(dtype) @ signs.mT).float()
        if self.salient:
            picked = (inputs[:, self.picked[matrix]] * self.second_scales[matrix]).to(dtype)
            outputs += picked @ unpack_signs(self.second[matrix], self.salient).to(dtype).mT
        return outputs * self.row_scales[matrix]


class _Codes(Kernel):
    """One matrix whose directions have a scale each: ``runs`` of bits, and how many directions have them."""

    def __init__(self, packed: Packed, codes: Tensor, scales: Tensor, runs: list[tuple[int, int]], side: str) -> None:
        self.copied = tuple(tensor for name, tensor in packed.tensors().items() if name != "codes")
        self.rows, self.input = packed.rows, side == "input"
        self.shape = (packed.rows, packed.columns) if self.input else (packed.columns, packed.rows)
        self.held = self._as_stored(codes).flatten(), scales.float().flatten().contiguous()
        self.factor = native.extension().codes(self.input, self.shape[1], runs, *self.held)

    def dense(self, matrix: int, inputs: Tensor, dtype: torch.dtype) -> Tensor:
        directions, half = self._unpacked(matrix, *self.shape, dtype), 0.5 * self.held[1]
        if self.input:
            return (inputs.to(dtype) @ directions.mT).float() * half
        return ((inputs * half).to(dtype) @ directions).float()


class Unpacked(Kernel):
    """A shared factor in any other format."""

    def __init__(self, packed: Packed) -> None:
        self.matrix, self.rows = packed, packed.rows

    def has_tiles(self) -> bool:
        return False

    def packed(self, inputs: Tensor, slots: Tensor | None = None, slots_per_input: int = 1) -> Tensor:
        return inputs @ self.matrix.unpack()[0].mT

    def dense(self, matrix: int, inputs: Tensor, dtype: torch.dtype) -> Tensor:
        return (inputs.to(dtype) @ self.matrix.unpack()[0].mT.to(dtype)).float()


def kernel_of(packed: Packed) -> Kernel:
    """The kernel that reads a format; for one that none reads, the format itself."""
    if isinstance(packed, Planes):
        return _Planes(packed)
    if isinstance(packed, Signs):
        return _Signs(packed)
    if isinstance(packed, Graded):
        assert packed.codes is not None and packed.scale_codes is not None and packed.scale_grid is not None
        scales = decode(packed.scale_codes, packed.scale_grid)
        return _Codes(packed, packed.codes, scales, packed.runs(), packed.side)
    if isinstance(packed, Integers) and packed.groups == 1 and not packed.zero_points and not packed.column_scaled:
        assert packed.codes is not None and packed.scales is not None
        return _Codes(packed, packed.codes, packed.scales, [(packed.bits, packed.rows)], "input")
    return Unpacked(packed)
