"""On the CPU, from the stored integers: in C++ (:mod:`moebius.native`).

For a few rows of inputs, these are rounded to 13 bits and a sign and multiplied with the codes in integers, exactly, so that
every level of instructions gives the same bits. For many, codes of eight bits are multiplied as those of shared factors are,
where there are instructions for it; else a part of the matrix at a time is unpacked into a buffer and multiplied by PyTorch.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from moebius import native
from moebius.formats import Packed
from moebius.formats.integers import Integers
from moebius.kernels.cpu_factors import as_stored, kernel_of
from moebius.kernels.packed_linear.reference import check_call

#: Weights that are unpacked at a time.
_UNPACKED_WEIGHTS = 1 << 22
_GROUPS = (32, 64, 128)
_DTYPES = (torch.float32, torch.bfloat16)

_scratch = threading.local()


def refusal(weight: Packed) -> str | None:
    """What keeps :class:`CpuLinear` from a matrix, in words; None if nothing does."""
    if native.missing() is not None:
        return native.missing()
    if not isinstance(weight, Integers) or weight.zero_points or weight.column_scaled or weight.batch != 1:
        return f"it is stored as {weight.spec()}, wanted one matrix of symmetric integers"
    if (weight.bits, weight.groups) != (8, 1) and (weight.bits != 4 or _group_size(weight) not in _GROUPS):
        groups = f"{weight.bits} bits with a scale for every {weight.group_size} columns"
        return f"it has {groups}, wanted 8 bits with one for each row, or 4 bits with one for every 32, 64 or 128"
    where = {tensor.device.type for tensor in weight.tensors().values()}
    return None if where == {"cpu"} else f"it is on {', '.join(sorted(where))}, wanted cpu"


def _group_size(weight: Integers) -> int:
    """Columns that share a scale; a row that is no longer than a group may be taken for one."""
    return _GROUPS[-1] if weight.groups == 1 and weight.columns <= _GROUPS[-1] else weight.group_size


class CpuLinear:
    """:func:`moebius.kernels.packed_linear.reference.packed_linear` of a matrix that :func:`refusal` lets through."""

    def __init__(self, weight: Packed) -> None:
        assert isinstance(weight, Integers) and weight.codes is not None and weight.scales is not None
        self.weight, self.rows, self.columns = weight, weight.rows, weight.columns
        (codes, codes_copied), (scales, scales_copied) = as_stored(weight.codes), as_stored(weight.scales)
        self.held = codes, scales
        # As rows of bytes, for products of many inputs.
        self.bytes = kernel_of(weight) if weight.bits == 8 else None
        # The rows of bytes are made from the same two tensors.
        self.copied = codes_copied + scales_copied if self.bytes is None else self.bytes.copied
        self.linear = native.extension().PackedLinear(
            weight.columns, weight.bits, _group_size(weight), codes.squeeze(0), scales.squeeze(0)
        )

    def __call__(self, inputs: Tensor) -> Tensor:
        """(n, in) to (n, out), in the dtype of the inputs."""
        check_call(inputs, self.weight)
        inputs = inputs.detach()
        if inputs.dtype not in _DTYPES:
            return self(inputs.float()).to(inputs.dtype)
        if len(inputs) > native.extension().FEW_INPUTS:
            return self._many(inputs)
        return native.multiplied(self.linear, inputs, inputs.new_empty(len(inputs), self.rows))

    def _many(self, inputs: Tensor) -> Tensor:
        if self.bytes is not None and self.bytes.has_tiles():
            return self.bytes.packed(inputs.float()).to(inputs.dtype)
        dtype = native.product_dtype(inputs.dtype)
        states = inputs.to(dtype)
        outputs, step = states.new_empty(len(inputs), self.rows), max(1, _UNPACKED_WEIGHTS // max(1, self.columns))
        for first in range(0, self.rows, step):
            count = min(step, self.rows - first)
            torch.mm(states, self._unpacked(first, count, dtype).mT, out=outputs[:, first : first + count])
        return outputs.to(inputs.dtype)

    def _unpacked(self, first: int, count: int, dtype: torch.dtype) -> Tensor:
        """Rows of the matrix, (count, in), in a buffer that the next call writes to."""
        wanted = count * self.columns * dtype.itemsize
        buffer: Tensor | None = getattr(_scratch, "buffer", None)
        if buffer is None or buffer.numel() < wanted:
            buffer = _scratch.buffer = torch.empty(wanted, dtype=torch.uint8)
        matrix = buffer[:wanted].view(dtype).view(count, self.columns)
        self.linear.unpack(first, matrix, torch.get_num_threads())
        return matrix
