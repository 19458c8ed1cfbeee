"""Error feedback (GPTQ): the error of a step is pushed into the steps after it, where they can make up for it.

There are two forms of the same thing, see :func:`moebius.linalg.hessian.feedback_weights`. :func:`with_feedback` tells each
step what to aim for; :func:`columns_with_feedback` keeps the whole matrix as it becomes, for levels that are set when the
first column of their group is reached.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from moebius.quantize.binary import SignPlanes, rank_one_scales, signs

_TINY = 1e-30  # keeps 0/0 at 0 for rows of zeros


def columns_with_feedback(
    weight: Tensor, cholesky: Tensor, block_size: int, quantize_column: Callable[[int, Tensor], Tensor]
) -> None:
    """Visit the columns of a batch of matrices in order, each with the errors of those before it folded in.

    Args:
        weight: (experts, rows, columns) float32; overwritten with the columns as they were when visited.
        cholesky: upper Cholesky factor of the inverse Hessian (experts, columns, columns), see
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
            row = cholesky[:, column, start:stop]  # (experts, block)
            errors[:, :, offset] = (values - quantize_column(column, values)) / row[:, offset, None]
            block[:, :, offset + 1 :].addcmul_(errors[:, :, offset, None], row[:, None, offset + 1 :], value=-1)
        weight[:, :, stop:].baddbmm_(errors, cholesky[:, start:stop, stop:], alpha=-1)


def with_feedback(target: Tensor, weights: Tensor, block_size: int, quantize: Callable[[int, Tensor], Tensor]) -> None:
    """Visit the steps of a batch of targets in order, each with the errors of those before it folded in.

    Args:
        target: (experts, steps, width) float32.
        weights: see :func:`moebius.linalg.hessian.feedback_weights`.
        block_size: steps whose errors are gathered before they are pushed further.
        quantize: called with the index of a step and what it aims for, (experts, width); returns what it became.
    """
    errors = torch.empty_like(target)

    def visit(step: int, aim: Tensor) -> None:
        torch.sub(target[:, step], quantize(step, aim), out=errors[:, step])

    steps = target.shape[1]
    for start in range(0, steps, block_size):
        stop = min(start + block_size, steps)
        aims = torch.baddbmm(target[:, start:stop], weights[:, :start, start:stop].mT, errors[:, :start])
        _in_turn(aims, weights[:, start:stop, start:stop].mT, errors[:, start:stop], start, visit)


def with_all_errors(
    target: Tensor, current: Tensor, hessian: Tensor, block_size: int, quantize: Callable[[int, Tensor], Tensor]
) -> None:
    """Visit the steps once more, each in view of the errors of all others: those before it as they have become by now.

    Where :func:`with_feedback` leaves what a step cannot know yet to the steps after it, this is coordinate descent on the
    error under the Hessian.

    Args:
        target: (experts, steps, width) float32.
        current: what the steps are; overwritten with what they become. (experts, steps, width)
        hessian: (experts, steps, steps) float32, with a positive diagonal.
        block_size: steps whose changes are gathered before they are pushed further.
        quantize: as for :func:`with_feedback`.
    """
    weights = hessian / hessian.diagonal(dim1=1, dim2=2).unsqueeze(2)
    errors = target - current

    def visit(start: int, changes: Tensor, step: int, aim: Tensor) -> None:
        became = quantize(step, aim)
        torch.sub(current[:, step], became, out=changes[:, step - start])
        current[:, step] = became

    steps = target.shape[1]
    for start in range(0, steps, block_size):
        stop = min(start + block_size, steps)
        aims = current[:, start:stop] + weights[:, start:stop] @ errors
        changes = torch.empty_like(aims)
        _in_turn(aims, weights[:, start:stop, start:stop], changes, start, functools.partial(visit, start, changes))
        errors[:, start:stop] += changes


def _in_turn(aims: Tensor, pulls: Tensor, errors: Tensor, first: int, visit: Callable[[int, Tensor], None]) -> None:
    """Visit the steps of a block in order; ``visit`` writes the error of its step, which moves the aims of those after it.

    Half by half: what the first half errs is pushed into the second at once, in products as dense as the order allows.

    Args:
        aims: overwritten with what the steps aimed for. (experts, steps, width)
        pulls: how much an error (second) moves an aim (first). (experts, steps, steps)
        errors: where ``visit`` writes them. (experts, steps, width)
        first: the index of the first step of the block.
        visit: called with the index of a step and its aim (experts, width).
    """
    steps = aims.shape[1]
    if steps == 1:
        visit(first, aims[:, 0])
        return
    half = steps // 2
    _in_turn(aims[:, :half], pulls[:, :half, :half], errors[:, :half], first, visit)
    if half == 1:  # a product with one row or column is far slower as such
        aims[:, 1:].addcmul_(pulls[:, 1:, :1], errors[:, :1])
    else:
        aims[:, half:].baddbmm_(pulls[:, half:, :half], errors[:, :half])
    _in_turn(aims[:, half:], pulls[:, half:, half:], errors[:, half:], first + half, visit)


def mixed_order_with_feedback(
    weight: Tensor, salient: Tensor, weights: Tensor, *, alternations: int, block_size: int
) -> SignPlanes:
    """:func:`moebius.quantize.binary.mixed_order` with the errors of each column fed back into those after it.

    Row scales are those of the matrix as it came (Eq. 48); signs and column scales are those of the columns as they became.

    Args:
        weight: (experts, rows, columns) float32.
        salient: bool (experts, columns).
        weights: see :func:`moebius.linalg.hessian.feedback_weights`.
        alternations: updates of the row and column scales of the first order.
        block_size: see :func:`with_feedback`.
    """
    row_scales, _ = rank_one_scales(weight, signs(weight), alternations)
    negated, energy = -row_scales, row_scales.square().sum(1).clamp_min(_TINY)
    columns = weight.mT.contiguous()  # (experts, columns, rows): a column at a time
    first, second = (torch.ones_like(columns, dtype=torch.bool) for _ in range(2))
    first_scales, second_scales = (torch.zeros_like(columns[:, :, 0]) for _ in range(2))
    any_salient = salient.any(0).tolist()

    def plane(values: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
        """Signs of values, written down; the row scales with these signs, and the scale that fits them best."""
        torch.ge(values, 0, out=positive)
        signed = torch.where(positive, row_scales, negated)
        return signed, (values * signed).sum(1) / energy

    def binarize(column: int, values: Tensor) -> Tensor:
        signed, scale = plane(values, first[:, column])
        first_scales[:, column] = scale
        quantized = signed * scale.unsqueeze(1)
        if any_salient[column]:
            signed, scale = plane(values - quantized, second[:, column])
            second_scales[:, column] = scale = scale * salient[:, column]
            quantized = quantized + signed * scale.unsqueeze(1)
        return quantized

    with_feedback(columns, weights, block_size, binarize)
    planes = [torch.where(positive.mT, 1.0, -1.0).to(weight.dtype) for positive in (first, second)]
    return SignPlanes(planes[0], planes[1], salient, row_scales, first_scales, second_scales)
