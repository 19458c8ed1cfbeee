"""Linear layers outside the experts, rounded to nearest where a recipe asks for them."""

from __future__ import annotations

import torch
from torch import Tensor

from moebius.formats.base import Packed, empty_like_spec
from moebius.formats.integers import Integers
from moebius.quantize.integers import round_symmetrically, whole_rows
from moebius.recipe import Recipe
from moebius.types import MoeModel

_GROUP_SIZE = 64
_ROWS = 4096
_REST_BITS = {"bf16": 16, "int8": 8, "int4": 4}


def packed_linears(moe: MoeModel, recipe: Recipe) -> dict[str, int]:
    """The linear layers that a recipe packs, by module path, and their bits."""
    bits = dict.fromkeys(moe.linears, _REST_BITS[recipe.rest])
    for names, own in ((moe.shared_experts, recipe.shared_experts), (moe.dense_mlps, recipe.dense_layers)):
        bits.update(dict.fromkeys(names, own) if own < 16 else {})
    return {name: b for name, b in bits.items() if b < 16}


def quantize_linear(weight: Tensor, bits: int) -> Packed:
    """Round a weight (out, in) to symmetric levels of ``bits`` bits; a batch of one.

    Eight bits have one scale per row, fewer have one for every 64 inputs.
    """
    group_size = _group_size(weight.shape[1], bits)
    # Some rows at a time: a head with a large vocabulary would need several copies of itself.
    parts = [round_symmetrically(rows.float().unsqueeze(0), bits, group_size) for rows in weight.split(_ROWS)]
    codes, scales = torch.cat([part.codes for part in parts], 1), torch.cat([part.scales for part in parts], 1)
    return Integers.pack(codes, scales, None, bits=bits, group_size=group_size)


def plan_linear(shape: tuple[int, int], bits: int) -> Packed:
    """What :func:`quantize_linear` stores for a weight of this shape, on the meta device."""
    return empty_like_spec(Integers(1, *shape, bits, _group_size(shape[1], bits), False).spec())


def _group_size(inputs: int, bits: int) -> int:
    return whole_rows(0 if bits == 8 else _GROUP_SIZE, inputs)
