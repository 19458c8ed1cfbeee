"""Directions of a joint basis rounded at several widths, each with the scales that fit best (BitsMoE)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.quantize.feedback import columns_with_feedback

_ITERATIONS = 20
_TINY = 1e-30


@dataclass(frozen=True)
class RoundedDirections:
    """Symmetric integers with a scale per group.

    Attributes:
        codes: uint8 (..., length).
        scales: (..., groups), in the precision of fp16.
        values: what they stand for. (..., length)
    """

    codes: Tensor
    scales: Tensor
    values: Tensor


def round_directions(directions: Tensor, bits: int, group_size: int) -> RoundedDirections:
    """Round to ``scale · (q − (2**bits − 1)/2)``; codes and least-squares scales take turns, and neither raises the error.

    Args:
        directions: (..., length) float32.
        bits: 1 to 8.
        group_size: entries per scale.
    """
    rounded = [_round_group(group, bits) for group in directions.split(group_size, dim=-1)]
    codes, scales, values = (torch.cat(parts, -1) for parts in zip(*rounded, strict=True))
    return RoundedDirections(codes.to(torch.uint8), scales, values)


def distortions(directions: Tensor, widths: range, group_size: int) -> Tensor:
    """The share of each direction's energy that rounding loses, for every width from 0. (..., len(widths))"""
    energy = directions.square().sum(-1).clamp_min(_TINY)
    lost = [
        (directions - round_directions(directions, bits, group_size).values).square().sum(-1) / energy
        if bits
        else energy / energy
        for bits in widths
    ]
    return torch.stack(lost, -1)


def round_rows_with_feedback(
    weight: Tensor, factor: Tensor, widths: Tensor, group_size: int, block_size: int
) -> RoundedDirections:
    """GPTQ with rows of different widths: the directions are rows, and errors are pushed from column to column.

    Args:
        weight: (experts, rows, columns) float32.
        factor: see :func:`moebius.quantize.feedback.columns_with_feedback`.
        widths: bits of each row, 1 to 8. (experts, rows)
        group_size: columns per scale; its levels are set when its first column is reached.
        block_size: columns whose errors are gathered before they are pushed further.
    """
    updated, codes, values = weight.clone(), torch.empty_like(weight, dtype=torch.uint8), torch.empty_like(weight)
    centre, scales = ((1 << widths) - 1) / 2, weight.new_zeros(*widths.shape, -(-weight.shape[2] // group_size))

    def quantize(column: int, column_values: Tensor) -> Tensor:
        scale = scales[:, :, column // group_size]
        if column % group_size == 0:
            group = updated[:, :, column : column + group_size]
            for bits in widths.unique().tolist():
                scale[widths == bits] = round_directions(group[widths == bits], bits, group_size).scales[:, 0]
        levels = _levels(column_values, scale, centre)
        codes[:, :, column], values[:, :, column] = (levels + centre).to(torch.uint8), levels * scale
        return values[:, :, column]

    columns_with_feedback(updated, factor, block_size, quantize)
    return RoundedDirections(codes, scales, values)


def _round_group(group: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes as floats, (..., 1) scales and values of one group."""
    centre = (2**bits - 1) / 2
    peak = group.abs().amax(-1, keepdim=True)
    # Few levels clip the largest entries: a start from half a Gaussian's range ends in a better place than one from the peak.
    scale = torch.minimum(peak / centre, group.square().mean(-1, keepdim=True).sqrt() * (3 / centre))
    for _ in range(_ITERATIONS):
        levels = _levels(group, scale, centre)
        scale = (group * levels).sum(-1, keepdim=True) / levels.square().sum(-1, keepdim=True)
    scale = scale.half().float()
    levels = _levels(group, scale, centre)
    return levels + centre, scale, levels * scale


def _levels(group: Tensor, scale: Tensor, centre: float | Tensor) -> Tensor:
    """The nearest of ``-centre, ..., centre`` in units of the scale."""
    steps = (group / scale.clamp_min(_TINY) + centre).round()
    highest = 2 * centre
    clamped = steps.clamp(min=0).minimum(highest) if isinstance(highest, Tensor) else steps.clamp(0, highest)
    return clamped - centre
