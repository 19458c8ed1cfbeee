"""Directions of a joint basis rounded at several widths, each with the scales that fit best (BitsMoE)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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


def _levels(group: Tensor, scale: Tensor, centre: float) -> Tensor:
    """The nearest of ``-centre, ..., centre`` in units of the scale."""
    steps = group / scale.clamp_min(_TINY)
    return ((steps + centre).round()).clamp(0, 2 * centre) - centre
