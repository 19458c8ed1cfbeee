"""The Triton kernels behind :mod:`moebius.kernels.routed_experts.triton`.

**Signs become numbers in two instructions for two of them.** Sign rows are read as 16-bit words. The top bit of a word is at
the place of the sign of a bf16 number, so ``word & 0x8000 ^ 0xBF80`` is ±1 by the word's last entry; shifted left, the word
offers the entry before it. Step ``i`` of sixteen therefore multiplies entries ``16 q + 15 - i`` of all words ``q`` at once, and
what meets signs is stored in *word order*: position ``i · words + q`` holds entry ``16 q + 15 - i``. A tile of weights never
exists in memory, not even in shared memory: its bits go from registers to the tensor cores.

**Slots** are (token, choice) pairs, ``token · top_k + choice``. A program works for one expert and up to ``M`` of its slots,
see :func:`~moebius.kernels.routed_experts.triton_language.members`.

Arguments in lower case vary from call to call; those in capitals are compiled in.
"""

# Triton's language has no types, and its constants stand on the left of nothing.
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from moebius.kernels.routed_experts.triton_language import (
    INTERPRETED,
    block_where,
    code_at,
    dot,
    grid_scale,
    load_words,
    members,
    next_signs,
    rounded,
)

__all__ = ["INTERPRETED"]


@triton.jit(do_not_specialize=["count"])  # a prompt of 16 tokens needs no kernel of its own
def shared_kernel(
    states, codes, begins, bits, scales, out,
    count, inputs, outputs, per_split,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    ALONG: tl.constexpr, BYTES: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """``states @ shared.T`` for a shared factor of integer codes: each stored row has bits and a scale of its own.

    Args:
        states: (count, inputs).
        codes: bytes of the stored rows, row ``r`` from byte ``begins[r]`` on, with ``bits[r]`` bits for each value.
        scales: of the stored rows, float32.
        out: (splits, count, outputs); each split of ``per_split`` inputs is stored apart.
        ALONG: stored rows are outputs and run along the inputs; otherwise they are inputs.
        BYTES: all values have 8 bits.
    """
    m = tl.program_id(0) * M + tl.arange(0, M)
    n = tl.program_id(1) * N + tl.arange(0, N)
    split = tl.program_id(2)
    total = tl.zeros((M, N), tl.float32)
    for k0 in range(split * per_split, tl.minimum(inputs, (split + 1) * per_split), K):
        k = k0 + tl.arange(0, K)
        at = m.to(tl.int64)[:, None] * inputs + k[None, :]
        x = tl.load(states + at, mask=(m < count)[:, None] & (k < inputs)[None, :], other=0.0)
        if ALONG:
            row, row_inside, entry, entry_inside = n, n < outputs, k, k < inputs
        else:
            row, row_inside, entry, entry_inside = k, k < inputs, n, n < outputs
        inside = row_inside[:, None] & entry_inside[None, :]
        begin = tl.load(begins + row, mask=row_inside, other=0)[:, None]
        if BYTES:
            middle = 127.5
            code = tl.load(codes + begin + entry[None, :], mask=inside, other=0)
        else:
            width = tl.load(bits + row, mask=row_inside, other=0)[:, None]
            middle = ((1 << width) - 1).to(tl.float32) * 0.5
            code = code_at(codes, begin, width, entry[None, :], inside)
        # At most 8 bits without trailing zeros: exact in bf16.
        weight = rounded(tl.where(inside, code.to(tl.float32) - middle, 0.0), TYPE)
        if ALONG:
            total = dot(rounded(x, TYPE), tl.trans(weight), total)
        else:
            x = x.to(tl.float32) * tl.load(scales + k, mask=k < inputs, other=0.0)[None, :]
            total = dot(rounded(x, TYPE), weight, total)
    if ALONG:
        total *= tl.load(scales + n, mask=n < outputs, other=0.0)[None, :]
    at = (split.to(tl.int64) * count + m)[:, None] * outputs + n[None, :]
    tl.store(out + at, rounded(total, out.dtype.element_ty), mask=(m < count)[:, None] & (n < outputs)[None, :])


@triton.jit(do_not_specialize=["slots"])
def over_rows_kernel(
    states, out, index, order, block_expert, block_begin, block_end,
    signs, widths, row_begins, live_begins, live_places, codes, grids, amplitudes,
    slots, experts, top_k, length, words, row_bytes,
    M: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, STEPS: tl.constexpr, SPLITS: tl.constexpr, SCAN: tl.constexpr,
    PLANES: tl.constexpr, BITS: tl.constexpr, WIDE: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Planes whose stored rows are inputs (``side="input"``): sums down the rows, without the scales of the outputs.

    The rows of an expert follow each other plane after plane, so they are one loop, whatever its widths are. Each step has sums
    of its own, so a program takes only so many ``STEPS`` as there are registers.

    Args:
        states: float32 (tokens, length), one coordinate for each direction.
        out: float32 (SPLITS, slots, 16 · words), outputs in word order. Every split sums its part of the rows.
        widths, signs, codes, grids: of :class:`~moebius.formats.planes.Planes`; codes and grids those of the directions.
        row_begins, live_begins, live_places: where the rows, the direction codes and the grid of each expert are.
        amplitudes: float32 (planes + 1, 7).
    """
    expert, slot, real = members(index, order, block_expert, block_begin, block_end, slots, experts, M, SCAN)
    if expert >= experts:
        return
    groups = 16 // STEPS
    first_step = tl.program_id(1) % groups * STEPS
    q = tl.program_id(1) // groups * Q + tl.arange(0, Q)
    split = tl.program_id(2)
    token = (slot // top_k).to(tl.int64)
    rows = 0
    for p in tl.static_range(PLANES):
        rows += tl.load(widths + expert * PLANES + p).to(tl.int32)
    first_row, first_live = tl.load(row_begins + expert).to(tl.int64), tl.load(live_begins + expert)
    matrix = tl.load(live_places + expert)
    per_split = tl.cdiv(tl.cdiv(rows, SPLITS), K) * K
    stop = tl.minimum(rows, (split + 1) * per_split)
    totals = ()
    for _i in tl.static_range(STEPS):
        totals = totals + (tl.zeros((Q, M), tl.float32),)  # noqa: RUF005 (the compiler knows sums of tuples only)
    for begin in range(split * per_split, stop, K):
        row = begin + tl.arange(0, K)
        inside = row < stop
        # Which plane of which direction a row is, and how many planes that direction has.
        direction, plane, passed = row, tl.zeros_like(row), 0
        for p in tl.static_range(PLANES):
            direction = tl.where(row >= passed, row - passed, direction)
            plane = tl.where(row >= passed, p, plane)
            passed += tl.load(widths + expert * PLANES + p).to(tl.int32)
        planes = tl.zeros_like(row)
        for p in tl.static_range(PLANES):
            planes += (direction < tl.load(widths + expert * PLANES + p).to(tl.int32)).to(tl.int32)
        factor = grid_scale(codes, grids, 0, first_live + direction, matrix, rows > 0, inside, BITS)
        factor *= tl.load(amplitudes + planes * 7 + plane, mask=inside, other=0.0)
        # Both in one layout, so that what is computed for a row is computed once: loaded the other way around, x costs twice.
        x = tl.load(states + token[:, None] * length + direction[None, :], mask=real[:, None] & inside[None, :], other=0.0)
        x = tl.trans(rounded(x * factor[None, :], TYPE))
        there = inside[None, :] & (q < words)[:, None]
        rest = load_words(signs, (first_row + row)[None, :], q[:, None], there, words, row_bytes, WIDE)
        if STEPS < 16:
            rest = rest << first_step.to(tl.uint16)
        sums = ()
        for i in tl.static_range(STEPS):
            ones, rest = next_signs(rest, TYPE)
            sums = sums + (dot(ones, x, totals[i]),)  # noqa: RUF005
        totals = sums
    at = out + (split * slots + slot).to(tl.int64)[None, :] * (16 * words) + first_step * words + q[:, None]
    for i in tl.static_range(STEPS):
        tl.store(at + i * words, totals[i], mask=real[None, :] & (q < words)[:, None])


@triton.jit
def _along_rows(
    total, signs, rows, row_inside, words, row_bytes, states, real,
    Q: tl.constexpr, WIDE: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Add the products of sign rows with states in word order: (rows, M). ``states`` points to the first position of each."""
    for q0 in range(0, words, Q):
        q = q0 + tl.arange(0, Q)
        there = row_inside[:, None] & (q < words)[None, :]
        rest = load_words(signs, rows[:, None], q[None, :], there, words, row_bytes, WIDE)
        inside = (q < words)[:, None] & real[None, :]
        for i in tl.static_range(16):
            x = tl.load(states[None, :] + (i * words + q)[:, None], mask=inside, other=0.0)
            ones, rest = next_signs(rest, TYPE)
            total = dot(ones, x, total)
    return total


@triton.jit(do_not_specialize=["slots"])
def along_planes_kernel(
    states, out, index, order, block_expert, block_begin, block_end,
    signs, widths, row_begins, live_begins, live_places, codes, grids, amplitudes,
    slots, experts, directions, words, row_bytes,
    M: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, SCAN: tl.constexpr,
    PLANES: tl.constexpr, BITS: tl.constexpr, WIDE: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Planes whose stored rows are outputs (``side="output"``): a dot product along each row.

    Args:
        states: TYPE (slots, 16 · words), in word order, scales of the entries included.
        out: float32 (slots, directions).
        The rest: as in :func:`over_rows_kernel`.
    """
    expert, slot, real = members(index, order, block_expert, block_begin, block_end, slots, experts, M, SCAN)
    if expert >= experts:
        return
    first = tl.program_id(1) * N
    direction = first + tl.arange(0, N)
    row = tl.load(row_begins + expert).to(tl.int64) + direction
    x = states + slot.to(tl.int64) * (16 * words)
    planes = tl.zeros_like(direction)
    for p in tl.static_range(PLANES):
        planes += (direction < tl.load(widths + expert * PLANES + p).to(tl.int32)).to(tl.int32)
    total = tl.zeros((N, M), tl.float32)
    for p in range(PLANES):  # not unrolled: the loop inside it is long
        width = tl.load(widths + expert * PLANES + p).to(tl.int32)
        if first < width:
            inside = direction < width
            part = tl.zeros((N, M), tl.float32)
            part = _along_rows(part, signs, row, inside, words, row_bytes, x, real, Q, WIDE, TYPE)
            total += part * tl.load(amplitudes + planes * 7 + p, mask=inside, other=0.0)[:, None]
        row += width
    place, matrix = tl.load(live_begins + expert) + direction, tl.load(live_places + expert)
    live = tl.load(widths + expert * PLANES) > 0
    total *= grid_scale(codes, grids, 0, place, matrix, live, planes > 0, BITS)[:, None]
    at = out + slot.to(tl.int64)[None, :] * directions + direction[:, None]
    tl.store(at, total, mask=(direction < directions)[:, None] & real[None, :])


@triton.jit(do_not_specialize=["slots"])
def along_signs_kernel(
    states, out, index, order, block_expert, block_begin, block_end,
    signs, salient_signs, row_scales,
    slots, experts, rows, words, row_bytes, salient_words, salient_bytes,
    M: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, SCAN: tl.constexpr,
    SALIENT: tl.constexpr, WIDE: tl.constexpr, SALIENT_WIDE: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """:class:`~moebius.formats.signs.Signs`: a dot product along each row, and one along its salient columns.

    Args:
        states: TYPE (slots, 16 · (words + salient_words)): all columns in word order, then the salient ones in a word order
            of their own, column scales included.
        out: float32 (slots, rows).
    """
    expert, slot, real = members(index, order, block_expert, block_begin, block_end, slots, experts, M, SCAN)
    if expert >= experts:
        return
    n = tl.program_id(1) * N + tl.arange(0, N)
    inside = n < rows
    row = expert.to(tl.int64) * rows + n
    x = states + slot.to(tl.int64) * (16 * (words + salient_words))
    total = tl.zeros((N, M), tl.float32)
    total = _along_rows(total, signs, row, inside, words, row_bytes, x, real, Q, WIDE, TYPE)
    if SALIENT:
        x += 16 * words
        total = _along_rows(total, salient_signs, row, inside, salient_words, salient_bytes, x, real, Q, SALIENT_WIDE, TYPE)
    total *= tl.load(row_scales + row, mask=inside, other=0.0).to(tl.float32)[:, None]
    tl.store(out + slot.to(tl.int64)[None, :] * rows + n[:, None], total, mask=inside[:, None] & real[None, :])


@triton.jit
def _state(
    states, bias, codes, grids, matrix, live, slot, slots, row, channel, expert, channels, words, code_bytes, inside,
    SPLITS: tl.constexpr, BITS: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """A channel of the states of a slot, float32: as :func:`over_rows_kernel` leaves it (``SPLITS``), or as it is (0)."""
    if SPLITS:
        position = (15 - channel % 16) * words + channel // 16
        value = tl.zeros_like(channel).to(tl.float32)
        for split in tl.static_range(SPLITS):
            at = (split * slots + slot).to(tl.int64) * (16 * words)
            value += tl.load(states + at + position, mask=inside, other=0.0)
        # An expert without planes has no scales; its states are zero.
        value *= grid_scale(codes, grids, matrix * code_bytes, channel, matrix, live, inside, BITS)
    else:
        value = tl.load(states + row.to(tl.int64) * channels + channel, mask=inside, other=0.0).to(tl.float32)
    if BIASED:
        value += tl.load(bias + expert * channels + channel, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    """The activations that :data:`moebius.kernels.routed_experts.activations.ACTIVATIONS` names."""
    if ACTIVATION == "silu":
        x = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # tanh(u) = 1 - 2 / (1 + exp(2 u))
        x = x * (1.0 - 1.0 / (1.0 + tl.exp(1.5957691216057308 * (x + 0.044715 * x * x * x))))
    elif ACTIVATION == "relu_squared":
        x = tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    return x


@triton.jit(do_not_specialize=["slots"])
def prepare_kernel(
    states, out, index, bias, up_widths, up_places, up_codes, up_grids,
    scales, places, grids, widths, picked, picked_scales,
    slots, experts, top_k, channels, up_words, up_bytes, entries, words, code_bytes, salient, salient_words,
    SPLITS: tl.constexpr, UP_PLANES: tl.constexpr, UP_BITS: tl.constexpr, BIASED: tl.constexpr,
    PER_TOKEN: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    READER: tl.constexpr, PLANES: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """States of every slot the way the next product reads them: activated, scaled by expert and entry, in word order.

    Args:
        states: what the product before left: (SPLITS, slots, 16 · up_words) sums in word order, or (rows, channels) with a row
            for each slot, or for each token (``PER_TOKEN``).
        out: (slots, width), written to the last position; zeros where there is no entry and for padding slots.
        up_widths, up_places, up_codes, up_grids: scales of the planes that left the sums.
        READER: ``"planes"``: word order, times the scales of entries in ``scales`` (codes), ``grids`` and ``places``;
            ``"signs"``: word order, times ``scales`` (numbers), then the ``picked`` columns times ``picked_scales``;
            ``"plain"``: entries in order.
    """
    slot = tl.program_id(0)
    position = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    chosen = tl.load(index + slot)
    real = (chosen >= 0) & (chosen < experts)
    expert = tl.where(real, chosen, 0)
    row = slot
    if PER_TOKEN:
        row = slot // top_k
    # Which entry a position holds, and its scale.
    if READER == "plain":
        width, entry = entries, position
    else:
        width, entry = 16 * words, 16 * (position % words) + 15 - position // words
    exists = block_where(real, position)
    inside = exists & (position < width) & (entry < entries)
    scale = tl.full((BLOCK,), 1.0, tl.float32)
    if READER == "planes":
        matrix = tl.load(places + expert)
        live = tl.load(widths + expert * PLANES) > 0
        scale = grid_scale(scales, grids, matrix * code_bytes, entry, matrix, real & live, inside, BITS)
    elif READER == "signs":
        scale = tl.load(scales + expert * entries + entry, mask=inside, other=0.0).to(tl.float32)
        if picked is not None:
            second = position - width
            choice = 16 * (second % salient_words) + 15 - second // salient_words
            again = exists & (second >= 0) & (second < 16 * salient_words) & (choice < salient)
            entry = tl.where(second >= 0, tl.load(picked + expert * salient + choice, mask=again, other=0), entry)
            more = tl.load(picked_scales + expert * salient + choice, mask=again, other=0.0).to(tl.float32)
            scale = tl.where(second >= 0, more, scale)
            inside = tl.where(second >= 0, again, inside)
            width += 16 * salient_words
    # The value of the entry.
    up_matrix, up_live = 0, True
    if SPLITS:
        up_matrix = tl.load(up_places + expert)
        up_live = real & (tl.load(up_widths + expert * UP_PLANES) > 0)
    value = _state(
        states, bias, up_codes, up_grids, up_matrix, up_live, slot, slots, row, entry, expert, channels, up_words, up_bytes,
        inside, SPLITS, UP_BITS, BIASED,
    )  # fmt: skip
    value = _activated(value, ACTIVATION)
    if GATED:
        value *= _state(
            states, bias, up_codes, up_grids, up_matrix, up_live, slot, slots, row, channels // 2 + entry, expert, channels,
            up_words, up_bytes, inside, SPLITS, UP_BITS, BIASED,
        )  # fmt: skip
    value = tl.where(inside, value * scale, 0.0)
    tl.store(out + slot.to(tl.int64) * width + position, rounded(value, out.dtype.element_ty), mask=position < width)


@triton.jit
def weighted_sum_kernel(outputs, out, index, weights, experts, top_k, width, BLOCK: tl.constexpr):
    """Sum of the outputs of a token's slots, each times its routing weight; padding adds nothing, whatever its row holds.

    Args:
        outputs: float32 (tokens · top_k, width).
        out: (tokens, width).
    """
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in range(top_k):
        slot = token * top_k + choice
        expert = tl.load(index + slot)
        inside = (column < width) & block_where((expert >= 0) & (expert < experts), column)
        part = tl.load(outputs + slot.to(tl.int64) * width + column, mask=inside, other=0.0)
        total += part * tl.load(weights + slot).to(tl.float32)
    tl.store(out + token.to(tl.int64) * width + column, rounded(total, out.dtype.element_ty), mask=column < width)


@triton.jit(do_not_specialize=["splits"])
def sum_kernel(parts, out, splits, size, BLOCK: tl.constexpr):
    """Sum of float32 (splits, size), in order."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    at = parts + place
    for _split in range(splits):
        total += tl.load(at, mask=place < size, other=0.0)
        at += size
    tl.store(out + place, rounded(total, out.dtype.element_ty), mask=place < size)
