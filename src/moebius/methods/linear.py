"""A single linear layer rounded to nearest: shared experts and dense layers, where a recipe asks for them."""

from __future__ import annotations

from torch import Tensor

from moebius.formats.base import Packed, empty_like_spec
from moebius.formats.integers import Integers
from moebius.quantize.integers import round_to_nearest, whole_rows

_GROUP_SIZE = 128


def quantize_linear(weight: Tensor, bits: int) -> Packed:
    """Round a weight (out, in) to ``bits`` bits with a scale and a zero point for every 128 inputs; a batch of one."""
    group_size = whole_rows(_GROUP_SIZE, weight.shape[1])
    return round_to_nearest(weight.float().unsqueeze(0), bits, group_size).pack()


def plan_linear(shape: tuple[int, int], bits: int) -> Packed:
    """What :func:`quantize_linear` stores for a weight of this shape, on the meta device."""
    return empty_like_spec(Integers(1, *shape, bits, whole_rows(_GROUP_SIZE, shape[1]), bits > 1).spec())
