"""What the Triton kernels have in common: slots, signs, codes and scales as blocks of numbers."""

# Triton's language has no types, and its constants stand on the left of nothing.
# mypy: ignore-errors
# ruff: noqa: SIM300
from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def rounded(x, TYPE: tl.constexpr):
    """Numbers in another type, rounded to the nearest."""
    if INTERPRETED and TYPE == tl.bfloat16:  # its own conversion cuts off
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        x = bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(TYPE)


@triton.jit
def dot(a, b, total):
    """``total + a @ b`` in float32."""
    if INTERPRETED:  # its own product of bf16 numbers is one of their bits
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


#: Whether Triton runs kernels in its interpreter: ``TRITON_INTERPRET=1`` when it was imported.
INTERPRETED = tl.constexpr(not isinstance(rounded, triton.JITFunction))
#: Whether signs are made by an instruction of NVIDIA's.
PAIRS = tl.constexpr(not INTERPRETED.value and torch.version.hip is None)


@triton.jit
def members(index, order, block_expert, block_begin, block_end, slots, experts, M: tl.constexpr, SCAN: tl.constexpr):
    """Expert of this program, and up to ``M`` of its slots.

    With few slots (``SCAN``, rounded up to a power of two) there is a program for each: it works for its slot and those that
    follow with the same expert, unless a program before it already does. That needs no sorting. With many (``SCAN`` is 0),
    blocks of sorted slots were prepared.

    Returns:
        The expert, ``experts`` when there is nothing to do; slots (M,); which of them are real (M,).
    """
    block = tl.program_id(0)
    member = tl.arange(0, M)
    if SCAN:
        place = tl.arange(0, SCAN)
        chosen = tl.load(index + place, mask=place < slots, other=-1)
        expert = tl.load(index + block)
        same = chosen == expert
        before = tl.sum((same & (place < block)).to(tl.int32), 0)
        rank = tl.cumsum(same.to(tl.int32), 0) - 1
        match = same[None, :] & (rank[None, :] == before + member[:, None])
        slot = tl.sum(tl.where(match, place[None, :], 0), 1)
        real = tl.sum(match.to(tl.int32), 1) > 0
        leads = (expert >= 0) & (expert < experts) & (before % M == 0)
        expert = tl.where(leads, expert, experts).to(tl.int32)
    else:
        expert = tl.load(block_expert + block).to(tl.int32)
        place = tl.load(block_begin + block) + member
        real = place < tl.load(block_end + block)
        slot = tl.load(order + place, mask=real, other=0).to(tl.int32)
    return expert, slot, real


@triton.jit
def load_words(signs, rows, q, inside, words, row_bytes, WIDE: tl.constexpr):
    """Words ``q`` of sign rows, uint16 in the common shape of both. Rows of an odd number of bytes (not ``WIDE``) are read byte
    by byte."""
    if WIDE:
        found = tl.load(signs + rows * words + q, mask=inside, other=0)
        found = found.to(tl.uint16, bitcast=True)
    else:
        at = signs + rows * row_bytes + 2 * q
        low = tl.load(at, mask=inside, other=0).to(tl.int32)
        high = tl.load(at + 1, mask=inside & (2 * q + 1 < row_bytes), other=0).to(tl.int32)
        found = (low | (high << 8)).to(tl.uint16)
    return found


@triton.jit
def next_signs(words, TYPE: tl.constexpr):
    """±1 by the last entry of each word, and the words with the entry before it in its place."""
    if TYPE == tl.bfloat16 and PAIRS:  # two words to a register: the compiler does not find that by itself
        signs, words = tl.inline_asm_elementwise(
            "lop3.b32 $0, $2, 0x80008000, 0xBF80BF80, 0x6A; shl.b32 $1, $2, 1;",
            "=&r,=r,r",
            [words],
            dtype=(tl.bfloat16, tl.uint16),
            is_pure=True,
            pack=2,
        )
    elif TYPE == tl.bfloat16:
        signs = ((words.to(tl.int32) & 0x8000) ^ 0xBF80).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        words = (words.to(tl.int32) << 1).to(tl.uint16)
    else:
        signs = tl.where((words.to(tl.int32) & 0x8000) != 0, 1.0, -1.0).to(TYPE)
        words = (words.to(tl.int32) << 1).to(tl.uint16)
    return signs, words


@triton.jit
def code_at(codes, begin, bits, place, inside):
    """Code number ``place`` of a stream of codes of ``bits`` bits, 8 at most, that begins at byte ``begin``. int32"""
    position = place * bits
    at = codes + begin + (position >> 3)
    shift = position & 7
    low = tl.load(at, mask=inside, other=0).to(tl.int32)
    high = tl.load(at + 1, mask=inside & (shift + bits > 8), other=0).to(tl.int32)
    return ((low | (high << 8)) >> shift) & ((1 << bits) - 1)


@triton.jit
def block_where(condition, block):
    """A scalar condition with the shape of a block of integers. Triton's interpreter gets that wrong by itself."""
    return tl.zeros_like(block) + condition.to(tl.int32) > 0


@triton.jit
def grid_scale(codes, grids, begin, place, matrix, live, inside, BITS: tl.constexpr):
    """What code number ``place`` stands for on the logarithmic grid of a matrix; zero where it is not ``inside``. A matrix that
    is not ``live`` has neither codes nor a grid."""
    first = tl.load(grids + 2 * matrix, mask=live, other=0.0).to(tl.float32)
    step = tl.load(grids + 2 * matrix + 1, mask=live, other=0.0).to(tl.float32)
    inside = inside & block_where(live, place)
    code = code_at(codes, begin, BITS, place, inside)
    return tl.where(inside, tl.exp(first + step * code.to(tl.float32)), 0.0)
