"""On the CPU, from the packed bytes as they lie in memory, by the kernels of shared factors.

A few inputs are rounded to integers of 14 bits and multiplied with the codes in integers; for many, some rows at a time are
unpacked to bf16 in a buffer and multiplied by PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moebius.formats import Packed
from moebius.formats.integers import Integers
from moebius.kernels.routed_experts import cpu as kernels

#: Inputs up to which reading the codes for each is faster than unpacking them once.
_FEW_INPUTS = 8
_UNPACKED_ROWS = 4096


def refusal(weight: Packed) -> str | None:
    """What keeps :class:`CpuLinear` from a matrix, in words; None if nothing does."""
    if kernels.missing() is not None:
        return kernels.missing()
    if not isinstance(weight, Integers) or not kernels.reads(weight):
        return f"it is stored as {weight.spec()}, wanted symmetric integers with scales of whole rows or 64·2^n columns"
    where = {tensor.device.type for tensor in weight.tensors().values()}
    return None if where == {"cpu"} else f"it is on {', '.join(sorted(where))}, wanted cpu"


class CpuLinear:
    """:func:`moebius.kernels.packed_linear.reference.packed_linear` of a matrix that :func:`refusal` lets through."""

    def __init__(self, weight: Packed) -> None:
        assert isinstance(weight, Integers) and weight.codes is not None and weight.scales is not None
        self.rows = weight.rows
        codes, scales = weight.codes.split(_UNPACKED_ROWS, dim=1), weight.scales.split(_UNPACKED_ROWS, dim=1)
        parts = (weight.replace(rows=c.shape[1], codes=c, scales=s) for c, s in zip(codes, scales, strict=True))
        self.parts = [kernels.codes_of(part) for part in parts]

    def __call__(self, inputs: Tensor) -> Tensor:
        """(n, in) to (n, out), in the dtype of the inputs."""
        if len(inputs) <= _FEW_INPUTS:
            states = inputs.float()
            outputs = [part.packed(states) for part in self.parts]
        else:
            dtype = kernels.product_dtype(inputs.dtype)
            outputs = [part.dense(0, inputs, dtype) for part in self.parts]
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)).to(inputs.dtype)
