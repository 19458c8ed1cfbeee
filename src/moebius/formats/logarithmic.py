"""Positive scales as codes on a logarithmic grid: a quarter to half the bits of fp16, at an error of a percent or two."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_SMALLEST = 1e-30  # scales are positive; this stands in for zero
# Scales this far below the largest of their row belong to dead or zero-padded neurons: a grid that reached down to them would
# have no points left for the others. They take the first point.
_DEAD = 2.0**-13


def encode(scales: Tensor, bits: int, used: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes of the nearest grid points, with a grid of their own for every row.

    Args:
        scales: positive, (rows, columns).
        bits: of a code, 1 to 8.
        used: bool like ``scales``; which of them matter. A grid spans those that do, but for zeros and what is next to zero.

    Returns:
        Codes (rows, columns) uint8, and the grid (rows, 2) fp16: logarithm of the first point, and the step between points.
    """
    logarithms = scales.float().clamp_min(_SMALLEST).log()
    used = torch.ones_like(logarithms, dtype=torch.bool) if used is None else used
    largest = (
        torch.where(used, scales.float(), 0).amax(1, keepdim=True) if scales.shape[1] else scales.new_zeros(len(scales), 1)
    )
    used = used & (scales > _DEAD * largest)
    # A row without anything that matters has its grid at zero; the extra column keeps a row of nothing from being refused.
    nothing = logarithms.new_full((len(scales), 1), torch.inf)
    low = torch.cat([torch.where(used, logarithms, torch.inf), nothing], 1).amin(1)
    high = torch.cat([torch.where(used, logarithms, -torch.inf), -nothing], 1).amax(1)
    low, high = torch.where(low.isfinite(), low, 0), torch.where(high.isfinite(), high, 0)
    # As stored: codes must fit the rounded grid. A first point just below the smallest scale leaves none outside.
    first = (low - low.abs() * 2**-11).half()
    step = ((high - first.float()) / (2**bits - 1) * (1 + 2**-10)).half()
    grid = torch.stack([first, step], 1)
    points, steps = grid.float().split(1, dim=1)
    codes = torch.where(steps > 0, (logarithms - points) / steps, 0).round().clamp(0, 2**bits - 1)
    return codes.to(torch.uint8), grid


def decode(codes: Tensor, grid: Tensor) -> Tensor:
    """The scales that codes (rows, columns) stand for on grids (rows, 2)."""
    first, step = grid.float().split(1, dim=1)
    return (first + step * codes.float()).exp()


#: Beyond this a scale is no float32 any more, or no product of two of them is.
_LARGEST_LOGARITHM = 44.0


def grid_faults(name: str, grids: Tensor, bits: int) -> Iterator[str]:
    """Says so if there is a grid among (..., 2) on which a code stands for a scale that overflows.

    Args:
        name: of the tensor, for the message.
        grids: as :func:`encode` returns them.
        bits: of a code.
    """
    first, step = grids.float().unbind(-1)
    ends = torch.stack([first, first + step * (2**bits - 1)])
    if ends.numel() and float(ends.max()) > _LARGEST_LOGARITHM:
        yield f"{name}: reaches a scale of e^{float(ends.max()):.0f}, wanted at most e^{_LARGEST_LOGARITHM:.0f}"


def rounded(scales: Tensor, bits: int, used: Tensor | None = None) -> Tensor:
    """Scales as they will be once they were stored, (rows, columns)."""
    return decode(*encode(scales, bits, used))
