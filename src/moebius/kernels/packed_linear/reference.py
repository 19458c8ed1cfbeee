"""The definition, in plain PyTorch: unpack the matrix, then multiply."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.errors import KernelError, ShapeError
from moebius.formats import Packed
from moebius.kernels.choice import FLOATS, wants_gradients


@dataclass(frozen=True, eq=False)
class DefinedLinear:
    """:func:`packed_linear` of a matrix, unpacked anew for every call."""

    weight: Packed
    copied: tuple[Tensor, ...] = ()

    def __call__(self, inputs: Tensor) -> Tensor:
        return packed_linear(inputs, self.weight)


def packed_linear(inputs: Tensor, weight: Packed) -> Tensor:
    """``y = W x``.

    Args:
        inputs: (n, in), any floating dtype.
        weight: a batch of one matrix, (1, out, in).

    Returns:
        (n, out), dtype of ``inputs``.

    Raises:
        ShapeError: inputs of another shape, dtype or device.
    """
    check_call(inputs, weight, gradients=True)
    return inputs @ weight.unpack()[0].to(inputs.dtype).mT


def check_call(inputs: Tensor, weight: Packed, *, gradients: bool = False) -> None:
    """Refuse what the definition does not take, the same for every backend; and gradients where there are none.

    Raises:
        ShapeError, KernelError: as :meth:`moebius.kernels.routed_experts.PackedExperts.check_call`.
    """
    if inputs.dim() != 2 or inputs.shape[1] != weight.columns or inputs.dtype not in FLOATS:
        got = f"{inputs.dtype} {tuple(inputs.shape)}"
        raise ShapeError(f"packed linear layer: got inputs {got}, wanted floats (n, {weight.columns})")
    where = next(iter(weight.tensors().values())).device
    if inputs.device != where or inputs.layout != torch.strided:
        raise ShapeError(f"packed linear layer: got {inputs.layout} inputs on {inputs.device}, wanted dense ones on {where}")
    if not gradients and wants_gradients(inputs):
        raise KernelError("packed linear layer: kernels have no gradients; use the reference, or torch.no_grad()")
