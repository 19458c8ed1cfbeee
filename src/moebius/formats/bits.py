"""Small integers to bytes and back: the bit streams under every format.

Values of ``bits`` bits follow each other from the lowest bit of the first byte upwards; each row (the last axis) starts on
a byte of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from moebius.errors import ShapeError


def packed_width(columns: int, bits: int) -> int:
    """Bytes that a row of ``columns`` values of ``bits`` bits takes."""
    return (columns * bits + 7) // 8


def pack(values: Tensor, bits: int) -> Tensor:
    """Pack integers below ``2**bits`` along the last axis.

    Args:
        values: (..., columns), any integer or bool type, each value in ``[0, 2**bits)``.
        bits: 1 to 16.

    Returns:
        uint8 (..., packed_width(columns, bits)).

    Raises:
        ShapeError: if a value does not fit.
    """
    columns, kind = values.shape[-1], _holding(bits)
    values = values.to(kind)
    if bits != 8 and values.numel() and int(values.max()) >> bits:
        raise ShapeError(f"pack: got a value of {int(values.max())}, wanted less than 2**{bits}")
    if bits == 8:
        return values.contiguous()
    if bits in (1, 2, 4):  # values do not straddle bytes: no bit needs a byte of its own on the way
        each = 8 // bits
        places = torch.nn.functional.pad(values, (0, -columns % each)).unflatten(-1, (-1, each))
        packed = places[..., 0].clone()
        for place in range(1, each):
            packed |= places[..., place] << (bits * place)
        return packed
    shifts = torch.arange(bits, dtype=kind, device=values.device)
    stream = ((values.unsqueeze(-1) >> shifts) & 1).to(torch.uint8).flatten(-2)  # (..., columns * bits), lowest bit first
    stream = torch.nn.functional.pad(stream, (0, packed_width(columns, bits) * 8 - columns * bits))
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=values.device)
    return (stream.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of :func:`pack`: (..., columns), uint8 up to 8 bits and int32 beyond.

    Raises:
        ShapeError: if the bytes are not as many as ``columns`` values take.
    """
    if packed.shape[-1] != packed_width(columns, bits):
        wanted = packed_width(columns, bits)
        raise ShapeError(f"unpack: got rows of {packed.shape[-1]} bytes, wanted {wanted} for {columns} values of {bits} bits")
    if bits == 8:
        return packed
    if bits in (1, 2, 4):  # values do not straddle bytes
        spread = _spread_bytes(bits, packed.device)
        values = spread.index_select(0, packed.reshape(-1).int()).view(torch.uint8)
        return values.view(*packed.shape[:-1], packed.shape[-1] * 8 // bits)[..., :columns]
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    stream = ((packed.unsqueeze(-1) >> shifts) & 1).flatten(-2)[..., : columns * bits].unflatten(-1, (columns, bits))
    weights = 1 << torch.arange(bits, dtype=_holding(bits), device=packed.device)
    return (stream * weights).sum(-1, dtype=weights.dtype)


def _holding(bits: int) -> torch.dtype:
    """A type for values of this many bits."""
    return torch.uint8 if bits <= 8 else torch.int32


@cache
def _spread_bytes(bits: int, device: torch.device) -> Tensor:
    """The values in every possible byte, those of one byte as one wide integer: a table is three times as fast as shifts."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=device)
    values = (torch.arange(256, device=device).to(torch.uint8).unsqueeze(1) >> shifts) & ((1 << bits) - 1)
    return values.contiguous().view({1: torch.int64, 2: torch.int32, 4: torch.int16}[bits]).squeeze(1)


def unpack_signs(packed: Tensor, columns: int) -> Tensor:
    """Bits as signs: int8 (..., columns), +1 for a set bit and -1 for a clear one."""
    return unpack(packed, 1, columns).to(torch.int8) * 2 - 1


def count_faults(name: str, masks: Tensor, columns: int, wanted: int) -> Iterator[str]:
    """Says so if a mask among (batch, packed_width(columns, 1)) marks another number of columns than it should.

    Args:
        name: of the tensor, for the message.
        masks: packed, a bit for each column.
        columns: of the matrices.
        wanted: how many of them each mask marks.
    """
    counts = unpack(masks, 1, columns).sum(1)
    if wrong := (counts != wanted).nonzero().flatten().tolist():
        yield f"{name}: marks {int(counts[wrong[0]])} columns of matrix {wrong[0]}, wanted {wanted} of each"
