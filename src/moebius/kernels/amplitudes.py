"""What planes are worth, as the kernels of all ops read it."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from moebius.formats.planes import AMPLITUDES, MOST_PLANES


@cache
def amplitudes(device: torch.device) -> Tensor:
    """By number of planes and plane, float32 (planes + 1, planes) of the most planes there can be."""
    rows = (AMPLITUDES.get(planes, ()) for planes in range(MOST_PLANES + 1))
    return torch.tensor([[*row, *(0.0,) * (MOST_PLANES - len(row))] for row in rows], device=device)
