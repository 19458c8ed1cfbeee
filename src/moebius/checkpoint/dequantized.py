"""Quantized tensors of a checkpoint, seen as the 16-bit weights that they stand for and made so one at a time.

What is read is decided by the tensors, not by a config: float8 codes with scales per block, row or tensor (powers of two stored
as bytes for MXFP8), MXFP4 as gpt-oss stores it (``_blocks``, ``_scales``), and symmetric INT4 of compressed-tensors
(``weight_packed``, ``weight_scale``, ``weight_shape``). Scales that belong to such a weight are not seen any more.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moebius.checkpoint.shards import DTYPES, StoredTensor
from moebius.errors import CheckpointError

_FLOAT8 = ("F8_E4M3", "F8_E5M2")
_BLOCK = 128
#: What the scales of ``x.weight`` are called in place of ``.weight``, or behind it.
_SCALES_BEHIND = ("_scale_inv", "_scale")
_SCALES_INSTEAD = (".scale", ".qscale_weight")
#: Scales of activations, of no use where weights are computed with in 16 bit.
_OF_ACTIVATIONS = (".activation_scale", ".input_scale", ".qscale_act")
# float4 (e2m1): sign, two bits of exponent, one of mantissa.
_FLOAT4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@dataclass(frozen=True)
class DequantizedTensor:
    """A weight of 16 bit that is stored as codes and scales.

    Attributes:
        name: what it is called where it is not quantized.
        dtype: as safetensors calls it.
        shape: of the weight.
        kind: what it is stored as, such as ``"float8"``.
        codes, scales: what is in the files.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: str
    codes: StoredTensor
    scales: StoredTensor

    begin = 0
    is_guard = False

    @property
    def end(self) -> int:
        """Bytes of the weight, as it will be written."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def stored_bytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.stored_bytes + self.scales.stored_bytes

    @property
    def file(self) -> Path:
        """That of the codes."""
        return self.codes.file

    def load(self) -> Tensor:
        """The weight: the product in float32, rounded once."""
        make = {"float8": _from_float8, "MXFP4": _from_mxfp4, "INT4": _from_int4}[self.kind]
        return make(self.codes.load(), self.scales.load(), self.shape, DTYPES[self.dtype])

    def chunks(self) -> Iterator[memoryview]:
        """The bytes of the weight, at once."""
        yield self.load().view(-1).view(torch.uint8).numpy().data

    def sha256(self) -> str:
        """Hash of the bytes of the weight."""
        return hashlib.sha256(next(self.chunks())).hexdigest()


#: A tensor of a source checkpoint.
SourceTensor = StoredTensor | DequantizedTensor


def dequantized(tensors: Mapping[str, StoredTensor], dtype: torch.dtype | None) -> dict[str, SourceTensor]:
    """The tensors of a checkpoint with weights in place of codes and scales that Moebius knows; all others as they are.

    Args:
        tensors: by name.
        dtype: what the config says; weights come in it if it is float16, else in bfloat16.

    Raises:
        CheckpointError: scales that do not fit the shape of their codes.
    """
    wide = "F16" if dtype == torch.float16 else "BF16"
    seen: dict[str, SourceTensor] = dict(tensors)
    for name, codes in tensors.items():
        if (
            found := _float8(name, codes, tensors, wide)
            or _mxfp4(name, codes, tensors, wide)
            or _int4(name, codes, tensors, wide)
        ):
            for used in (name, found.scales.name, f"{found.name}_shape"):
                seen.pop(used, None)
            seen[found.name] = found
    if any(isinstance(tensor, DequantizedTensor) for tensor in seen.values()):
        seen = {name: tensor for name, tensor in seen.items() if not name.endswith(_OF_ACTIVATIONS)}
    return seen


def _float8(name: str, codes: StoredTensor, tensors: Mapping[str, StoredTensor], wide: str) -> DequantizedTensor | None:
    if codes.dtype not in _FLOAT8 or (scales := _scales_of(name, tensors)) is None:
        return None
    if len(codes.shape) < 2 or _block(codes.shape, scales.shape) is None:
        raise CheckpointError(f"{codes.file}: {name} is {codes.shape}, which its scales {scales.shape} do not fit")
    return DequantizedTensor(name, wide, codes.shape, "float8", codes, scales)


def _mxfp4(name: str, codes: StoredTensor, tensors: Mapping[str, StoredTensor], wide: str) -> DequantizedTensor | None:
    weight = name.removesuffix("_blocks")
    scales = tensors.get(f"{weight}_scales")
    if weight == name or scales is None or codes.dtype != "U8" or scales.dtype != "U8":
        return None
    if len(codes.shape) != 4 or codes.shape[:3] != scales.shape:
        raise CheckpointError(f"{codes.file}: {name} is {codes.shape}, which its scales {scales.shape} do not fit")
    experts, rows, groups, held = codes.shape
    return DequantizedTensor(weight, wide, (experts, 2 * groups * held, rows), "MXFP4", codes, scales)


def _scales_of(name: str, tensors: Mapping[str, StoredTensor]) -> StoredTensor | None:
    base = name.removesuffix(".weight")
    names = [name + end for end in _SCALES_BEHIND] + ([base + end for end in _SCALES_INSTEAD] if base != name else [])
    return next((tensors[scale] for scale in names if scale in tensors), None)


def _block(shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, int] | None:
    """Rows and columns that a scale is for; None if the shapes do not fit."""
    if math.prod(scales) == 1:
        return shape[-2], shape[-1]
    if len(scales) == 1 or scales[:-2] != shape[:-2]:
        return (1, shape[-1]) if scales == shape[-2:-1] else None
    if len(scales) != len(shape):
        return None
    sides = []
    for length, count in zip(shape[-2:], scales[-2:], strict=True):
        # Blocks are of 128 unless the scales are as many as equal parts of another size.
        side = _BLOCK if -(-length // _BLOCK) == count and count > 1 else length // max(count, 1)
        if side == 0 or -(-length // side) != count:
            return None
        sides.append(side)
    return sides[0], sides[1]


def _from_float8(codes: Tensor, scales: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    block = _block(shape, tuple(scales.shape))
    assert block is not None
    if scales.dtype == torch.uint8:  # exponents of two
        scales = (scales.float() - 127).exp2()
    scales = scales.float()
    if scales.numel() == 1:
        return (codes.float() * scales.reshape(())).to(dtype)
    if scales.ndim == 1:
        return (codes.float() * scales.unsqueeze(1)).to(dtype)
    rows, columns = block
    wide = scales.repeat_interleave(rows, -2)[..., : shape[-2], :].repeat_interleave(columns, -1)[..., : shape[-1]]
    return (codes.float() * wide).to(dtype)


def _from_mxfp4(blocks: Tensor, scales: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """(experts, rows, groups, 16) bytes of two codes each and (experts, rows, groups) exponents to (experts, columns, rows)."""
    values = torch.tensor(_FLOAT4)
    weight = torch.empty(shape, dtype=dtype)
    for into, codes, exponents in zip(weight, blocks, scales, strict=True):
        halves = torch.stack([codes & 15, codes >> 4], -1).flatten(2).int()  # (rows, groups, 32)
        of_group = torch.ldexp(values[halves], (exponents.int() - 127).unsqueeze(-1))
        into.copy_(of_group.flatten(1).T)
    return weight


def _int4(name: str, codes: StoredTensor, tensors: Mapping[str, StoredTensor], wide: str) -> DequantizedTensor | None:
    """The weight of packed codes that are symmetric, 4 bit and in order; None of others."""
    weight = name.removesuffix("_packed")
    if weight == name:
        return None
    scales, shape = tensors.get(f"{weight}_scale"), tensors.get(f"{weight}_shape")
    others = (f"{weight}{end}" for end in ("_zero_point", "_g_idx", "_global_scale"))
    if scales is None or shape is None or any(other in tensors for other in others):
        return None
    if codes.dtype != "I32" or len(codes.shape) != 2 or len(scales.shape) != 2 or shape.shape != (2,):
        return None
    rows, columns = (int(size) for size in shape.load())
    fits = codes.shape == (rows, -(-columns // 8)) and scales.shape[0] == rows and columns % max(scales.shape[1], 1) == 0
    return DequantizedTensor(weight, wide, (rows, columns), "INT4", codes, scales) if fits else None


def _from_int4(packed: Tensor, scales: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Eight codes to a word, the lowest bits first, 8 above what they stand for."""
    codes = ((packed.unsqueeze(-1) >> torch.arange(0, 32, 4)) & 15).flatten(1)[:, : shape[1]] - 8
    return (codes.float() * scales.float().repeat_interleave(shape[1] // scales.shape[1], 1)).to(dtype)


def same_contents(one: SourceTensor, other: SourceTensor) -> bool:
    """Whether two tensors of a source are the same, byte for byte."""
    return (one.shape, one.dtype) == (other.shape, other.dtype) and one.sha256() == other.sha256()
