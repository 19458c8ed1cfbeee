"""The expert MLP in Triton: the launches, and the small tables that they need.

A layer of ``moebius`` takes six launches: shared factor, gate_up, activation, down, weighted sum, shared factor; two more where
tokens are so few that the sums of a shared factor are split, and some to sort the slots where they are many. Nothing depends on
values that the host would have to see, so that a CUDA graph can hold all of it, once a call outside of it has compiled the
kernels and made the tables.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from moebius.formats import Packed, PackedProjection
from moebius.formats.bits import packed_width
from moebius.formats.graded import Graded
from moebius.formats.integers import Integers
from moebius.formats.logarithmic import decode
from moebius.formats.planes import Planes
from moebius.formats.signs import Signs
from moebius.kernels.amplitudes import amplitudes
from moebius.kernels.routed_experts import reference
from moebius.kernels.routed_experts import triton_kernels as kernels
from moebius.kernels.routed_experts.activations import ACTIVATIONS, recognize
from moebius.kernels.routed_experts.experts import PackedExperts, Prepared, Run
from moebius.kernels.routed_experts.triton_route import Route, route_of, triton_type
from moebius.kernels.routed_experts.triton_tables import as_words, directory_of, forget, picked_columns, remembered, words_of

#: Programs that keep a large GPU busy. A number for each device would sum in another order on each.
_BUSY = 512
#: Most parts that a sum is split into to have so many.
_MOST_SPLITS = 16
#: By slots of a block: rows of signs at a time, and steps of sixteen, where rows are summed. Sums take half as many registers
#: of each thread as slots times steps.
_OVER_ROWS = {16: (64, 16), 32: (64, 8), 64: (32, 4)}
#: Rows of signs along inputs that a program works for.
_ROWS = 64


def prepare(experts: PackedExperts) -> Run:
    """What :func:`moebius.kernels.routed_experts.reference.routed_experts` defines, for what :func:`refusal` lets through.

    Factors of products are bf16 numbers and sums float32; with hidden states of float32 or more, all is float32. Repeats give
    the same bits: every slot is written once and summed in order.
    """
    act = recognize(experts.activation, experts.gate_up.shape[1])
    assert act is not None
    copied = tuple(_tabulated(experts))
    forget(copied)
    return Prepared(partial(_routed_experts, experts, act), copied)


def _tabulated(experts: PackedExperts) -> Iterator[Tensor]:
    """Stored tensors that tables are made of."""
    for projection in (experts.gate_up, experts.down):
        for name, part in projection.parts().items():
            kept = {"widths", "salient_mask"} if name == "factor" else {"scales", "scale_codes", "scale_grid"}
            yield from (tensor for name, tensor in part.tensors().items() if name in kept)


def _routed_experts(
    experts: PackedExperts, act: tuple[str, bool], hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    experts.check_call(hidden, top_k_index, top_k_weights)
    gate_up, down = experts.gate_up, experts.down
    if not top_k_index.numel() or not gate_up.factor.rows * gate_up.factor.columns * down.factor.rows * down.factor.columns:
        return reference.routed_experts(hidden, top_k_index, top_k_weights, experts)
    route = route_of(top_k_index, experts.count, hidden.dtype)
    coordinates = _through(gate_up.right, hidden.contiguous(), route)
    states = _gate_up(gate_up.factor, coordinates, route)
    states = states.through(gate_up.left, route)
    outputs = _down(down, states, act, experts.gate_up_bias, route)
    sums = _weighted_sum(outputs, top_k_weights, route, hidden.dtype if down.left is None else torch.float32)
    result = _through(down.left, sums, route, hidden.dtype)
    if experts.down_bias is None:
        return result
    return result + reference.routed_bias(top_k_index, top_k_weights, experts.down_bias).to(result.dtype)


def refusal(experts: PackedExperts) -> str | None:
    """What keeps :func:`prepare` from running a layer, in words; None if nothing does.

    It runs experts of sign planes: ``gate_up`` of input directions, ``down`` of output directions, or either of plain signs;
    shared factors of integers whose rows have one scale each; and the activations in :data:`ACTIVATIONS`, applied to the first
    half of the channels and multiplied with the second, or to all channels.
    """
    gate_up, down = experts.gate_up, experts.down
    for name, projection, side in (("gate_up", gate_up, "input"), ("down", down, "output")):
        factor = projection.factor
        if isinstance(factor, Planes):
            if factor.side != side:
                return f"{name} has planes with directions at the {factor.side} side, wanted the {side} side"
        elif not isinstance(factor, Signs):
            return f"{name} has a factor of format {factor.name!r}, wanted planes or signs"
        for part in (projection.left, projection.right):
            if isinstance(part, Integers) and (part.zero_points or part.groups > 1 or part.column_scaled):
                return f"{name} has a shared factor with zero points, groups or scales of columns, wanted one scale per row"
            if part is not None and not isinstance(part, (Graded, Integers)):
                return f"{name} has a shared factor of format {part.name!r}, wanted graded or integers"
        device = next(iter(factor.tensors().values())).device
        if device.type != "cuda" and not kernels.INTERPRETED.value:
            return f"{name} is on {device}, wanted a CUDA device"
    if isinstance(gate_up.factor, Planes) and gate_up.left is not None:
        return "gate_up has planes behind a left factor"
    if recognize(experts.activation, gate_up.shape[1]) is None:
        return f"the activation is none of {', '.join(ACTIVATIONS)}, with its gate in the first half of the channels or without"
    return None


# Shared factors


@dataclass(frozen=True)
class _Rows:
    """Stored rows of integers: where each begins in the bytes, its bits and its scale."""

    begins: Tensor
    bits: Tensor
    scales: Tensor
    only_bytes: bool


def _through(factor: Packed | None, states: Tensor, route: Route, dtype: torch.dtype = torch.float32) -> Tensor:
    """States (n, in) through a shared factor, (n, out)."""
    if factor is None:
        return states
    assert isinstance(factor, (Graded, Integers)) and factor.codes is not None
    rows, along = _rows(factor), isinstance(factor, Integers) or factor.side == "input"
    count, few = len(states), len(states) <= 16
    M, N, K = (16, 16 if along else 32, 256 if along else 128) if few else (64, 64, 64)
    programs = triton.cdiv(count, M) * triton.cdiv(factor.rows, N)
    splits = min(_MOST_SPLITS, max(1, _BUSY // programs), triton.cdiv(factor.columns, K))
    per_split = triton.cdiv(triton.cdiv(factor.columns, splits), K) * K
    out = states.new_empty(splits, count, factor.rows, dtype=dtype if splits == 1 else torch.float32)
    kernels.shared_kernel[(triton.cdiv(count, M), triton.cdiv(factor.rows, N), splits)](
        states, factor.codes, rows.begins, rows.bits, rows.scales, out,
        count, factor.columns, factor.rows, per_split,
        M=M, N=N, K=K, ALONG=along, BYTES=rows.only_bytes, TYPE=triton_type(route.type), num_warps=4,
    )  # fmt: skip
    return out[0] if splits == 1 else _sum_of_splits(out, dtype)


def _sum_of_splits(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 (splits, n, out) summed and rounded in one launch: (n, out)."""
    out = parts.new_empty(parts.shape[1:], dtype=dtype)
    kernels.sum_kernel[(triton.cdiv(out.numel(), 512),)](parts, out, len(parts), out.numel(), BLOCK=512, num_warps=4)
    return out


def _rows(factor: Graded | Integers) -> _Rows:
    if isinstance(factor, Graded):
        return remembered(factor.scale_codes, lambda: _graded_rows(factor), factor.scale_grid, factor.grades)
    return remembered(factor.scales, lambda: _integer_rows(factor))


def _graded_rows(factor: Graded) -> _Rows:
    assert factor.codes is not None and factor.scale_codes is not None and factor.scale_grid is not None
    runs = factor.runs()
    bits = torch.tensor([grade for grade, count in runs for _ in range(count)], dtype=torch.int64)
    widths = (factor.entries * bits + 7) // 8
    table = torch.stack([widths.cumsum(0) - widths, bits]).int().to(factor.codes.device)
    scales = decode(factor.scale_codes, factor.scale_grid)[0]
    return _Rows(table[0], table[1], scales, all(grade == 8 for grade, _ in runs))


def _integer_rows(factor: Integers) -> _Rows:
    assert factor.codes is not None and factor.scales is not None
    begins = torch.arange(factor.rows, dtype=torch.int32, device=factor.codes.device) * factor.codes.shape[2]
    bits = torch.full_like(begins, factor.bits)
    return _Rows(begins, bits, factor.scales[0, :, 0].float(), factor.bits == 8)


# Expert factors


@dataclass(frozen=True)
class _States:
    """States of every slot: (slots, channels), or the sums that planes of input directions leave: (splits, slots, words)."""

    values: Tensor
    channels: int
    planes: Planes | None = None

    def through(self, factor: Packed | None, route: Route) -> _States:
        return self if factor is None else _States(_through(factor, self.values, route), factor.rows)


def _gate_up(factor: Packed, coordinates: Tensor, route: Route) -> _States:
    """The factor applied to the coordinates (tokens, in) of the token of each slot."""
    if isinstance(factor, Planes):
        return _over_rows(factor, coordinates, route)
    assert isinstance(factor, Signs)
    prepared = _prepare(factor, _States(coordinates, factor.columns), route, per_token=True)
    return _States(_along(factor, prepared, route), factor.rows)


def _down(down: PackedProjection, states: _States, act: tuple[str, bool], bias: Tensor | None, route: Route) -> Tensor:
    """Activation, then the right and the expert factor of ``down``: float32 (slots, rows of the factor)."""
    if down.right is None:
        return _along(down.factor, _prepare(down.factor, states, route, act=act, bias=bias), route)
    inner = _States(_prepare(None, states, route, act=act, bias=bias), down.right.columns).through(down.right, route)
    return _along(down.factor, _prepare(down.factor, inner, route), route)


def _over_rows(factor: Planes, coordinates: Tensor, route: Route) -> _States:
    assert factor.signs is not None and factor.widths is not None
    words, directory = words_of(factor.entries), directory_of(factor)
    # Sixteen words to a warp: fewer would make warps repeat each other.
    Q, (K, steps) = 64 if words % 64 == 0 else 32, _OVER_ROWS[route.block]
    tiles = triton.cdiv(words, Q) * (16 // steps)
    splits = 2 ** int(math.log2(min(_MOST_SPLITS, max(1, _BUSY // (route.blocks * tiles)))))
    out = coordinates.new_empty(splits, route.slots, 16 * words, dtype=torch.float32)
    signs, wide = as_words(factor.signs)
    kernels.over_rows_kernel[(route.blocks, tiles, splits)](
        coordinates, out, *route.members(),
        signs, directory.widths, directory.rows, directory.codes, directory.grids,
        factor.direction_codes, factor.direction_grids, amplitudes(out.device),
        route.slots, route.experts, route.top_k, coordinates.shape[1], words, factor.signs.shape[1],
        Q=Q, K=K, STEPS=steps, SPLITS=splits,
        PLANES=directory.planes, BITS=factor.scale_bits, WIDE=wide, **route.settings(), num_warps=Q // 16,
    )  # fmt: skip
    return _States(out, factor.entries, factor)


def _along(factor: Packed, prepared: Tensor, route: Route) -> Tensor:
    """Prepared states through a factor whose stored rows are outputs: float32 (slots, rows). Padding slots are not written."""
    assert isinstance(factor, (Planes, Signs)) and factor.signs is not None
    out = prepared.new_empty(route.slots, factor.rows, dtype=torch.float32)
    grid = (route.blocks, triton.cdiv(factor.rows, _ROWS))
    signs, wide = as_words(factor.signs)
    words, row_bytes = words_of(factor.columns), packed_width(factor.columns, 1)
    # States of the sixteen steps are on their way at once: two stages of 64 slots and 16 words fill 64 KiB of shared memory.
    words_at_once, stages = (32, 3) if route.block == 16 else (16, 2)
    tile: dict[str, Any] = {"N": _ROWS, "Q": words_at_once, "WIDE": wide, **route.settings()}
    tile |= {"num_warps": 4, "num_stages": stages}
    if isinstance(factor, Planes):
        directory = directory_of(factor)
        kernels.along_planes_kernel[grid](
            prepared, out, *route.members(),
            signs, directory.widths, directory.rows, directory.codes, directory.grids,
            factor.direction_codes, factor.direction_grids, amplitudes(out.device),
            route.slots, route.experts, factor.rows, words, row_bytes,
            PLANES=directory.planes, BITS=factor.scale_bits, **tile,
        )  # fmt: skip
        return out
    salient, salient_wide = (signs, wide) if factor.salient_signs is None else as_words(factor.salient_signs)
    kernels.along_signs_kernel[grid](
        prepared, out, *route.members(),
        signs, salient, factor.row_scales,
        route.slots, route.experts, factor.rows, words, row_bytes, words_of(factor.salient), packed_width(factor.salient, 1),
        SALIENT=factor.salient > 0, SALIENT_WIDE=salient_wide, **tile,
    )  # fmt: skip
    return out


def _prepare(
    reader: Packed | None,
    states: _States,
    route: Route,
    *,
    act: tuple[str, bool] = ("", False),
    bias: Tensor | None = None,
    per_token: bool = False,
) -> Tensor:
    """States of every slot the way ``reader`` wants them, or as they are for None, once they were activated.

    Returns:
        (slots, width): ``route.type`` and in word order for a reader, float32 otherwise.
    """
    activation, gated = act
    entries = states.channels // 2 if gated else states.channels
    writes = _writes(reader, entries)
    out = states.values.new_empty(route.slots, writes.width, dtype=torch.float32 if reader is None else route.type)
    block = min(1024, max(128, triton.next_power_of_2(writes.width)))
    kernels.prepare_kernel[(route.slots, triton.cdiv(writes.width, block))](
        states.values, out, route.index, bias=None if bias is None else bias.contiguous(),
        slots=route.slots, experts=route.experts, top_k=route.top_k, channels=states.channels, entries=entries,
        PER_TOKEN=per_token, BIASED=bias is not None, ACTIVATION=activation, GATED=gated,
        **_left(states), **writes.arguments, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out


def _left(states: _States) -> dict[str, Any]:
    """What ``prepare_kernel`` needs to know of the product before."""
    planes = states.planes
    if planes is None:
        tensors = dict.fromkeys(("up_widths", "up_places", "up_codes", "up_grids"))
        return {**tensors, "up_words": 0, "up_bytes": 0, "SPLITS": 0, "UP_PLANES": 1, "UP_BITS": 8}
    directory = directory_of(planes)
    return {
        "up_widths": directory.widths,
        "up_places": directory.grids,
        "up_codes": planes.entry_codes,
        "up_grids": planes.entry_grids,
        "up_words": words_of(planes.entries),
        "up_bytes": packed_width(planes.entries, planes.scale_bits),
        "SPLITS": len(states.values),
        "UP_PLANES": directory.planes,
        "UP_BITS": planes.scale_bits,
    }


@dataclass(frozen=True)
class _Writes:
    """What ``prepare_kernel`` needs to know of the product after it, and how wide the states for it are."""

    width: int
    arguments: dict[str, Any]


def _writes(reader: Packed | None, entries: int) -> _Writes:
    words = words_of(entries)
    blank: dict[str, Any] = dict.fromkeys(("scales", "places", "grids", "widths", "picked", "picked_scales"))
    blank |= {"words": words, "code_bytes": 0, "salient": 0, "salient_words": 0, "READER": "plain", "PLANES": 1, "BITS": 8}
    if isinstance(reader, Planes):
        directory = directory_of(reader)
        return _Writes(16 * words, blank | {
            "scales": reader.entry_codes, "places": directory.grids, "grids": reader.entry_grids, "widths": directory.widths,
            "code_bytes": packed_width(entries, reader.scale_bits),
            "READER": "planes", "PLANES": directory.planes, "BITS": reader.scale_bits,
        })  # fmt: skip
    if isinstance(reader, Signs):
        salient_words = words_of(reader.salient)
        return _Writes(16 * (words + salient_words), blank | {
            "scales": reader.column_scales, "picked": picked_columns(reader), "picked_scales": reader.salient_column_scales,
            "salient": reader.salient, "salient_words": salient_words, "READER": "signs",
        })  # fmt: skip
    return _Writes(entries, blank)


def _weighted_sum(outputs: Tensor, weights: Tensor, route: Route, dtype: torch.dtype) -> Tensor:
    """Outputs (slots, width) summed over the slots of each token, times the routing weights: (tokens, width)."""
    width = outputs.shape[1]
    out, block = outputs.new_empty(route.tokens, width, dtype=dtype), min(512, triton.next_power_of_2(width))
    kernels.weighted_sum_kernel[(route.tokens, triton.cdiv(width, block))](
        outputs, out, route.index, weights.contiguous(), route.experts, route.top_k, width, BLOCK=block, num_warps=4
    )
    return out
