"""Error feedback (GPTQ): the error of a column is pushed into the columns after it, where they can make up for it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moebius.quantize.binary import SignPlanes, column_scales, rank_one_scales, signs


def columns_with_feedback(
    weight: Tensor, factor: Tensor, block_size: int, quantize_column: Callable[[int, Tensor], Tensor]
) -> None:
    """Visit the columns of a batch of matrices in order, each with the errors of those before it folded in.

    Args:
        weight: (experts, rows, columns) float32; overwritten with the columns as they were when visited.
        factor: upper Cholesky factor of the inverse Hessian (experts, columns, columns), see
            :func:`moebius.linalg.hessian.feedback_factor`.
        block_size: columns whose errors are gathered before they are pushed beyond the block: a matter of speed.
        quantize_column: called with the index and values of a column (experts, rows); returns its quantized values.
    """
    columns = weight.shape[2]
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        block = weight[:, :, start:stop]
        errors = torch.zeros_like(block)
        for offset in range(stop - start):
            column = start + offset
            values = block[:, :, offset]
            row = factor[:, column, start:stop]  # (experts, block)
            errors[:, :, offset] = (values - quantize_column(column, values)) / row[:, offset, None]
            block[:, :, offset + 1 :].addcmul_(errors[:, :, offset, None], row[:, None, offset + 1 :], value=-1)
        weight[:, :, stop:].baddbmm_(errors, factor[:, start:stop, stop:], alpha=-1)


def mixed_order_with_feedback(
    weight: Tensor, salient: Tensor, factor: Tensor, *, alternations: int, block_size: int
) -> SignPlanes:
    """:func:`moebius.quantize.binary.mixed_order` with the errors of each column fed back into those after it.

    Row scales are those of the matrix as it came (Eq. 48); signs and column scales are those of the columns as they became.

    Args:
        weight: (experts, rows, columns) float32.
        salient: bool (experts, columns).
        factor: see :func:`columns_with_feedback`.
        alternations: updates of the row and column scales of the first order.
        block_size: see :func:`columns_with_feedback`.
    """
    row_scales, _ = rank_one_scales(weight, signs(weight), alternations)
    first, second = torch.empty_like(weight), torch.empty_like(weight)
    first_scales, second_scales = torch.empty_like(weight[:, 0]), torch.empty_like(weight[:, 0])

    def binarize(column: int, values: Tensor) -> Tensor:
        first[:, :, column] = sign = signs(values)
        first_scales[:, column] = scale = column_scales(values, sign, row_scales)
        quantized = row_scales * sign * scale.unsqueeze(1)
        residual = values - quantized
        second[:, :, column] = sign = signs(residual)
        second_scales[:, column] = scale = column_scales(residual, sign, row_scales) * salient[:, column]
        return quantized + row_scales * sign * scale.unsqueeze(1)

    columns_with_feedback(weight.clone(), factor, block_size, binarize)
    return SignPlanes(first, second, salient, row_scales, first_scales, second_scales)
