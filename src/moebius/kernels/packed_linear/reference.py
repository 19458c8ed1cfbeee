"""The definition, in plain PyTorch: unpack the matrix, then multiply."""

from __future__ import annotations

from torch import Tensor

from moebius.formats import Packed


def packed_linear(inputs: Tensor, weight: Packed) -> Tensor:
    """``y = W x``.

    Args:
        inputs: (n, in), any floating dtype.
        weight: a batch of one matrix, (1, out, in).

    Returns:
        (n, out), dtype of ``inputs``.
    """
    return inputs @ weight.unpack()[0].to(inputs.dtype).mT
