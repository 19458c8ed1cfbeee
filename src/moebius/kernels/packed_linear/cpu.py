"""On the CPU, from the stored integers: C++ in the ``csrc/`` of the routed experts.

For a few rows of inputs, these are rounded to 13 bits and a sign and multiplied with the codes in integers, exactly, so that
every level of instructions gives the same bits. For many, codes of eight bits are multiplied as those of shared factors are,
where there are instructions for it; else a part of the matrix at a time is unpacked into a buffer and multiplied by PyTorch.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from moebius.formats import Packed
from moebius.formats.integers import Integers
from moebius.kernels.routed_experts import cpu as compiled

#: Rows of inputs up to which reading codes for each of them is faster than unpacking them once.
_FEW_INPUTS = 8
#: Weights that are unpacked at a time.
_UNPACKED_WEIGHTS = 1 << 22
_GROUPS = (32, 64, 128)
_DTYPES = (torch.float32, torch.bfloat16)

_scratch = threading.local()


def refusal(weight: Packed) -> str | None:
    """What keeps :class:`CpuLinear` from a matrix, in words; None if nothing does."""
    if compiled.missing() is not None:
        return compiled.missing()
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
        self.rows, self.columns = weight.rows, weight.columns
        self.held = weight.codes.contiguous(), weight.scales.contiguous()
        shape = weight.rows, weight.columns, weight.bits, _group_size(weight)
        # As rows of bytes, for products of many inputs.
        self.bytes = compiled.kernel_of(weight) if weight.bits == 8 else None
        self.linear = compiled.extension().PackedLinear(*shape, *(tensor.data_ptr() for tensor in self.held))

    def __call__(self, inputs: Tensor) -> Tensor:
        """(n, in) to (n, out), in the dtype of the inputs."""
        if inputs.dtype not in _DTYPES:
            return self(inputs.float()).to(inputs.dtype)
        if len(inputs) > _FEW_INPUTS:
            return self._many(inputs)
        inputs, outputs = inputs.contiguous(), inputs.new_empty(len(inputs), self.rows)
        addresses, bf16 = (inputs.data_ptr(), outputs.data_ptr()), inputs.dtype == torch.bfloat16
        self.linear.apply(*addresses, len(inputs), bf16, compiled.current(), torch.get_num_threads())
        return outputs

    def _many(self, inputs: Tensor) -> Tensor:
        if self.bytes is not None and self.bytes.has_tiles():
            return self.bytes.packed(inputs.float()).to(inputs.dtype)
        dtype = compiled.product_dtype(inputs.dtype)
        states = inputs.to(dtype)
        outputs, step = states.new_empty(len(inputs), self.rows), max(1, _UNPACKED_WEIGHTS // self.columns)
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
        bf16, threads = dtype == torch.bfloat16, torch.get_num_threads()
        self.linear.unpack(first, count, buffer.data_ptr(), bf16, compiled.current(), threads)
        return buffer[:wanted].view(dtype).view(count, self.columns)
