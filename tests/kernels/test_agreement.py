"""Every backend against the definition, over sizes, routings and scales that are easily got wrong.

Sums of integers have to be exact. What rounds its inputs has to be close to the definition over all elements (relative
Frobenius norm) and in each of them; that these bounds reject real mistakes is a test of its own.
"""

from __future__ import annotations

import ctypes
import mmap
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from tests.kernels import rounding
from torch import Generator, Tensor

from moebius import native
from moebius.errors import CheckpointError, KernelError
from moebius.formats import Packed, PackedProjection
from moebius.formats.bits import pack
from moebius.formats.dense import Dense
from moebius.formats.graded import Graded
from moebius.formats.integers import Integers
from moebius.formats.planes import Planes, pack_signs
from moebius.formats.signs import Signs
from moebius.kernels import choice, cpu_factors
from moebius.kernels.routed_experts import PackedExperts, cpu, prepare, reference

SIZES = (1, 31, 63, 65, 1000)
EXPERTS = 5
Layer = tuple[PackedProjection, PackedProjection]
#: Relative to the norm of all elements; in each element, to the root mean square of its token.
CLOSE, CLOSE_ELEMENT = 0.004, 0.02
#: The same where inputs are rounded to 8 bits: a gate far out magnifies that. Single products have tighter bounds below.
CLOSE_BYTES, CLOSE_BYTES_ELEMENT = 0.1, 0.4

#: The same beside the definition with inputs in bytes, for tokens that are too few to be rounded so by every matrix.
FEW_BYTES = 0.03, 0.15

needs_build = pytest.mark.skipif(not native.levels(), reason="the compiled kernels are not there")


def disagreement(got: Tensor, wanted: Tensor, close: float = CLOSE, close_element: float = CLOSE_ELEMENT) -> str | None:
    """What is wrong with a result, in words."""
    got, wanted = got.double(), wanted.double()
    if got.shape != wanted.shape:
        return f"shape {tuple(got.shape)}, wanted {tuple(wanted.shape)}"
    if not got.isfinite().all():
        return f"{int((~got.isfinite()).sum())} elements are not finite"
    difference, size = (got - wanted), wanted.norm()
    if difference.norm() > close * size:
        return f"relative norm of the difference {float(difference.norm() / size):.5f}"
    # A token with small outputs may err by a share of what the others have: a gate far out magnifies its errors.
    spread = wanted.square().mean(-1, keepdim=True).sqrt() + 0.1 * wanted.square().mean().sqrt()
    off = difference.abs() > close_element * spread
    if off.any():
        return f"{int(off.sum())} elements are off by up to {float(difference.abs()[off].max())}"
    return None


# Random layers


def bits(generator: Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator) > 0.5


def planes(generator: Generator, side: str, directions: int, entries: int, most: int) -> Planes:
    """Every number of planes up to ``most`` in each matrix but one, which has none at all."""
    widths = torch.randint(0, directions + 1, (EXPERTS, max(1, most)), generator=generator).sort(descending=True).values
    widths[1] = 0
    widths[0, 0] = directions
    if most == 0:
        widths[:] = 0
    covered = bits(generator, EXPERTS, max(1, most), directions, entries)
    codes = (torch.randint(0, 32, (EXPERTS, n), generator=generator) for n in (entries, directions))
    grids = torch.tensor([-1.0, 0.04]).expand(EXPERTS, 2)
    entry_codes, direction_codes = codes
    packed = Planes.pack(
        pack_signs(covered, widths),
        widths,
        entry_codes,
        grids,
        direction_codes,
        grids,
        side=side,
        directions=directions,
        entries=entries,
        scale_bits=5,
    )
    packed.check("random")
    return packed


def signs(generator: Generator, rows: int, columns: int, salient: int) -> Signs:
    """Scales of both signs, and some that are zero."""
    mask = torch.zeros(EXPERTS, columns, dtype=torch.bool)
    for matrix in mask:
        matrix[torch.randperm(columns, generator=generator)[:salient]] = True
    row_scales = torch.randn(EXPERTS, rows, generator=generator)
    row_scales[:, ::7] = 0
    column_scales = torch.randn(EXPERTS, columns, generator=generator)
    column_scales[:, 3::11] = 0
    return Signs.pack(
        bits(generator, EXPERTS, rows, columns),
        row_scales + 0.1 * (rows == 1),
        column_scales,
        salient_mask=mask,
        salient_positive=bits(generator, EXPERTS, rows, columns),
        salient_column_scales=torch.randn(EXPERTS, columns, generator=generator),
    )


def graded(generator: Generator, side: str, directions: int, entries: int) -> Graded:
    of = sorted((8, 6, 5, 4, 3)[k % 5] for k in range(directions))[::-1]
    rows = [torch.randint(0, 2**b, (entries,), generator=generator) for b in of]
    codes = torch.stack(rows).unsqueeze(0) if rows else torch.zeros(1, 0, entries, dtype=torch.int64)
    # A level is as large at 3 bits as at 8: the scale makes directions alike.
    scale_codes = torch.tensor([[min(255, int(b * 20)) for b in of]], dtype=torch.int64)
    return Graded.pack(codes, scale_codes, torch.tensor([[-1.0, -0.0173]]), side=side, bits=of)


def integers(generator: Generator, rows: int, columns: int) -> Integers:
    codes = torch.randint(0, 256, (1, rows, columns), generator=generator)
    scales = torch.randn(1, rows, 1, generator=generator) * 0.01
    scales[:, 3::11] = 0
    return Integers.pack(codes, scales, None, bits=8, group_size=columns)


def moebius_layer(
    generator: Generator, hidden: int, inner: int, kept: int, most: int
) -> tuple[PackedProjection, PackedProjection]:
    return (
        PackedProjection(planes(generator, "input", kept, 2 * inner, most), right=graded(generator, "input", kept, hidden)),
        PackedProjection(planes(generator, "output", kept, inner, most), left=graded(generator, "output", kept, hidden)),
    )


def mobie_layer(
    generator: Generator, hidden: int, inner: int, side: str, salient: int
) -> tuple[PackedProjection, PackedProjection]:
    def one(rows: int, columns: int, shared: str) -> PackedProjection:
        rank = min(rows, columns)
        if shared == "left":
            return PackedProjection(
                signs(generator, rank, columns, min(salient, columns)), left=integers(generator, rows, rank)
            )
        return PackedProjection(signs(generator, rows, rank, min(salient, rank)), right=integers(generator, rank, columns))

    return one(2 * inner, hidden, "right" if side == "hidden" else "left"), one(hidden, inner, "left")


def gated(states: Tensor) -> Tensor:
    gate, up = states.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


ROUTINGS: dict[str, Callable[[Generator, int], Tensor]] = {
    "one without tokens": lambda g, tokens: torch.rand(tokens, EXPERTS - 1, generator=g).topk(2).indices,
    "all on one": lambda g, tokens: torch.full((tokens, 1), 3),
    "padding": lambda g, tokens: torch.randint(0, EXPERTS + 2, (tokens, 3), generator=g) - 1,
    "int32, not contiguous": lambda g, tokens: torch.randint(0, EXPERTS, (3, tokens), generator=g).int().T,
}


def inputs(generator: Generator, layer: Layer, tokens: int, routing: str) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states that excite the channels about as much as those of a model do: far out, a gate magnifies any error."""
    weight = layer[0].unpack()
    index = ROUTINGS[routing](generator, tokens)
    weights = torch.rand(index.shape[::-1], generator=generator).T  # not contiguous either
    states = torch.randn(weight.shape[2], tokens, generator=generator).T
    return states / weight.square().sum(2).mean().sqrt().clamp_min(1e-6), index, weights


# Backends


@pytest.fixture(params=native.levels() or [pytest.param("none", marks=needs_build)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The CPU kernel at each set of instructions that this machine has, with two threads, writing to NaN."""
    before = native.level()
    native.use_level(request.param)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # what the kernel asks; PyTorch's own threads would spin
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **kind: empty(*shape, **kind).fill_(torch.nan))
    monkeypatch.setattr(cpu_factors, "_scratch", threading.local())
    monkeypatch.setenv("MOEBIUS_KERNEL", "cpu")
    yield request.param
    native.use_level(before)


def agree(layer: Layer, given: tuple[Tensor, Tensor, Tensor]) -> None:
    wrong = whole_layer_disagreement(prepare(PackedExperts(*layer, gated))(*given), layer, given)
    assert wrong is None, wrong


def whole_layer_disagreement(got: Tensor, layer: Layer, given: tuple[Tensor, Tensor, Tensor]) -> str | None:
    """With the definition of the layer; where inputs are rounded to bytes, with what it makes of these."""
    if not native.has_tiles():
        worst = 2 * CLOSE_ELEMENT if len(got) > 30 else CLOSE_ELEMENT  # the worst of many is worse
        return disagreement(got, reference.routed_experts(*given, PackedExperts(*layer, gated)), CLOSE, worst)
    # What was rounded finely before it is rounded to bytes may go to the next byte: few tokens meet some matrices so.
    few = len(got) <= rounding.FEW_OF_SHARED
    return disagreement(got, rounding.layer(*layer, gated, given), *(FEW_BYTES if few else (CLOSE, 3 * CLOSE_ELEMENT)))


def bounds() -> tuple[float, float]:
    return (CLOSE_BYTES, CLOSE_BYTES_ELEMENT) if native.has_tiles() else (CLOSE, CLOSE_ELEMENT)


@pytest.mark.parametrize(("hidden", "inner", "kept"), [(s, SIZES[-1 - i], SIZES[(i + 2) % 5]) for i, s in enumerate(SIZES)])
@pytest.mark.parametrize("most", range(8))
def test_nested_planes(hidden: int, inner: int, kept: int, most: int, backend: str) -> None:
    agree(*planes_case(hidden, inner, kept, most))


@cache
def planes_case(hidden: int, inner: int, kept: int, most: int) -> tuple[Layer, tuple[Tensor, Tensor, Tensor]]:
    """The same for every level: making it takes longer than testing it."""
    generator = Generator().manual_seed(most)
    kept = min(kept, 4 * max(hidden, inner), 4 * max(hidden, 2 * inner))  # more is refused
    layer = moebius_layer(generator, hidden, inner, kept, most)
    return layer, inputs(generator, layer, 3, "one without tokens")


@pytest.mark.parametrize(("hidden", "inner"), [(s, SIZES[(i + 3) % 5]) for i, s in enumerate(SIZES)])
@pytest.mark.parametrize(("side", "salient"), [("hidden", 5), ("output", 40), ("output", 0)])
def test_signs(hidden: int, inner: int, side: str, salient: int, backend: str) -> None:
    generator = Generator().manual_seed(hidden)
    layer = mobie_layer(generator, hidden, inner, side, salient)
    agree(layer, inputs(generator, layer, 3, "one without tokens"))


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("tokens", [0, 1, 7, 40, 600])  # the last are too many to be taken at once
@pytest.mark.parametrize("kind", ["planes", "hidden", "output"])
def test_routing(routing: str, tokens: int, kind: str, backend: str) -> None:
    generator = Generator().manual_seed(tokens)
    layer = moebius_layer(generator, 65, 31, 63, 3) if kind == "planes" else mobie_layer(generator, 65, 31, kind, 3)
    agree(layer, inputs(generator, layer, tokens, routing))


def test_half_precision(backend: str) -> None:
    generator = Generator().manual_seed(0)
    for layer in (moebius_layer(generator, 1000, 65, 331, 3), mobie_layer(generator, 1000, 65, "output", 50)):
        states, index, weights = inputs(generator, layer, 40, "one without tokens")
        wanted = reference.routed_experts(states.bfloat16().float(), index, weights, PackedExperts(*layer, gated))
        got = prepare(PackedExperts(*layer, gated))(states.bfloat16(), index, weights.bfloat16())
        assert got.dtype == torch.bfloat16
        assert 0 < (got - wanted).norm() < max(0.01, bounds()[0]) * wanted.norm()


def test_biases(backend: str) -> None:
    generator = Generator().manual_seed(0)
    layer = moebius_layer(generator, 65, 31, 63, 2)
    states, index, weights = inputs(generator, layer, 4, "padding")
    biases = torch.randn(EXPERTS, 62, generator=generator), torch.randn(EXPERTS, 65, generator=generator)
    wanted = reference.routed_experts(states, index, weights, PackedExperts(*layer, gated, *biases))
    assert disagreement(prepare(PackedExperts(*layer, gated, *biases))(states, index, weights), wanted, *bounds()) is None
    assert disagreement(prepare(PackedExperts(*layer, gated))(states, index, weights), wanted, *bounds()) is not None


@pytest.mark.parametrize("tokens", [15, 16])
def test_tokens_beyond_what_is_held_at_once(tokens: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_TOKENS_AT_ONCE", 5)
    generator = Generator().manual_seed(0)
    layer = moebius_layer(generator, 65, 31, 63, 2)
    given = inputs(generator, layer, tokens, "padding")
    bias = torch.randn(EXPERTS, 62, generator=generator)
    wanted = reference.routed_experts(*given, PackedExperts(*layer, gated, bias))
    assert disagreement(prepare(PackedExperts(*layer, gated, bias))(*given), wanted, *bounds()) is None


def test_outliers_and_zeros(backend: str) -> None:
    """One input a thousand times the others must not drown them, and no input is no reason for NaN."""
    generator = Generator().manual_seed(0)
    for layer in (moebius_layer(generator, 1000, 63, 1000, 2), mobie_layer(generator, 1000, 63, "hidden", 50)):
        states, index, weights = inputs(generator, layer, 2, "one without tokens")
        states[:, 5] = 300
        agree(layer, (states, index, weights))
        assert not prepare(PackedExperts(*layer, gated))(torch.zeros_like(states), index, weights).any()
        tiny = prepare(PackedExperts(*layer, gated))(states * 1e-30, index, weights)
        assert tiny.isfinite().all()


@pytest.mark.parametrize("tokens", [2, 40])
def test_what_is_not_finite_stays_so(tokens: int, backend: str) -> None:
    generator = Generator().manual_seed(0)
    for layer, value in product((moebius_layer(generator, 65, 31, 63, 2), mobie_layer(generator, 65, 31, "hidden", 2)), "ni"):
        states, index, weights = inputs(generator, layer, tokens, "all on one")
        states[1, 7] = torch.nan if value == "n" else torch.inf
        got = prepare(PackedExperts(*layer, gated))(states, index, weights)
        assert not got[1].isfinite().any()
        got[1] = 0
        assert got.isfinite().all()


@needs_build
def test_levels_give_the_same_bits() -> None:
    generator = Generator().manual_seed(0)
    before = native.level()
    for layer in (moebius_layer(generator, 1000, 65, 331, 4), mobie_layer(generator, 1000, 65, "output", 50)):
        states, index, weights = inputs(generator, layer, 2, "one without tokens")
        results = []
        for name in native.levels():
            native.use_level(name)
            results.append(cpu.prepare(PackedExperts(*layer, gated))(states, index, weights))
        native.use_level(before)
        assert all(torch.equal(result, results[0]) for result in results)


@needs_build
def test_threads_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Generator().manual_seed(0)
    layer = moebius_layer(generator, 1000, 1000, 1000, 2)
    states, index, weights = inputs(generator, layer, 3, "one without tokens")
    experts, results = cpu.prepare(PackedExperts(*layer, gated)), []
    for count in (1, 2, 5, 2, 1):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        results += [experts(states, index, weights) for _ in range(10)]
    assert all(torch.equal(result, results[0]) for result in results)


# Sums of integers


@pytest.fixture(params=native.levels() or [pytest.param("none", marks=needs_build)])
def level(request: pytest.FixtureRequest) -> Any:
    return native.extension().loops(request.param)


@pytest.mark.parametrize("width", [*SIZES, 64, 128, 2048])
@pytest.mark.parametrize("rows", [1, 15, 17, 33])
def test_sums_over_signs_are_exact(width: int, rows: int, level: Any) -> None:
    generator = Generator().manual_seed(width + rows)
    positive = bits(generator, rows, width)
    packed, started = pack(positive, 1), torch.randint(-99, 99, (2048,), generator=generator).int()
    across = torch.randint(-990, 991, (rows,), generator=generator).to(torch.int16)
    sums = started.clone()
    level.add_signs(packed, across, width, sums)
    wanted = started.long()
    wanted[:width] += (across.long().unsqueeze(1) * positive).sum(0)
    assert torch.equal(sums.long(), wanted)

    along = torch.zeros(-(-width // 64) * 64, dtype=torch.int16)
    along[:width] = torch.randint(-250, 251, (width,), generator=generator)
    sums = started.clone()
    level.dot_signs(packed, along, width, sums)
    wanted = started.long()
    wanted[:rows] += (along[:width].long() * positive).sum(1)
    assert torch.equal(sums.long(), wanted)


@pytest.mark.parametrize("width", [*SIZES, 64, 128, 2100])
@pytest.mark.parametrize("grade", range(1, 9))
@pytest.mark.parametrize("rows", [1, 7, 37])
def test_sums_over_codes_are_exact(width: int, grade: int, rows: int, level: Any) -> None:
    generator = Generator().manual_seed(width + rows)
    codes = torch.randint(0, 2**grade, (rows, width), generator=generator)
    packed = pack(codes, grade)
    along = torch.zeros(-(-width // 64) * 64, dtype=torch.int16)
    along[:width] = torch.randint(-8191, 8192, (width,), generator=generator)
    sums = torch.full((rows + 3,), 77, dtype=torch.int32)
    level.dot_codes(packed, grade, along, width, sums)
    assert torch.equal(sums[:rows].long(), (codes * along[:width].long()).sum(1)) and (sums[rows:] == 77).all()

    across = torch.randint(-8191, 8192, (rows,), generator=generator).to(torch.int16)
    for first in range(0, width, 64):
        lanes = min(100, width - first)
        sums = torch.full((lanes + 3,), 77, dtype=torch.int32)
        level.add_codes(packed, grade, across, width, first, lanes, sums)
        wanted = 77 + (codes[:, first : first + lanes] * across.long().unsqueeze(1)).sum(0)
        assert torch.equal(sums[:lanes].long(), wanted) and (sums[lanes:] == 77).all()


@pytest.fixture
def edge() -> Iterator[Callable[[Tensor], Tensor]]:
    """Puts bytes right before memory that may not be read: whoever reads beyond their end crashes."""
    if not sys.platform.startswith("linux"):
        pytest.skip("mprotect is called as Linux has it")
    page, pages = mmap.PAGESIZE, 64
    memory = mmap.mmap(-1, page * pages)
    all_bytes = torch.frombuffer(memory, dtype=torch.uint8)
    end, readable = all_bytes.data_ptr() + page * (pages - 1), page * (pages - 1)
    libc = ctypes.CDLL(None)
    assert libc.mprotect(ctypes.c_void_p(end), page, 0) == 0

    def place(data: Tensor) -> Tensor:
        placed = all_bytes[readable - data.numel() : readable].view(data.shape)
        return placed.copy_(data)

    yield place
    libc.mprotect(ctypes.c_void_p(end), page, mmap.PROT_READ | mmap.PROT_WRITE)


@pytest.mark.parametrize("width", SIZES)
@pytest.mark.parametrize("rows", [1, 5, 16, 20])
def test_nothing_is_read_beyond_the_end(width: int, rows: int, level: Any, edge: Callable[[Tensor], Tensor]) -> None:
    generator = Generator().manual_seed(width + rows)
    values = torch.full((-(-width // 64) * 64,), 3, dtype=torch.int16)
    values[width:] = 0
    positive = bits(generator, rows, width)
    sums = torch.zeros(max(rows, width), dtype=torch.int32)
    packed = edge(pack(positive, 1))
    across = torch.full((rows,), 3, dtype=torch.int16)
    level.dot_signs(packed, values, width, sums)
    assert torch.equal(sums[:rows], 3 * positive.sum(1).int())
    sums.zero_()
    level.add_signs(packed, across, width, sums)
    assert torch.equal(sums[:width], 3 * positive.sum(0).int())
    for grade in (3, 5, 6, 8):
        codes = torch.randint(0, 2**grade, (rows, width), generator=generator)
        packed = edge(pack(codes, grade))
        level.dot_codes(packed, grade, values, width, sums)
        assert torch.equal(sums[:rows], 3 * codes.sum(1).int())
        sums.zero_()
        level.add_codes(packed, grade, across, width, 0, width, sums)
        assert torch.equal(sums[:width], 3 * codes.sum(0).int())


@pytest.mark.parametrize("width", SIZES)
@pytest.mark.parametrize("side", ["input", "output"])
def test_unpacking_is_exact_but_for_bf16(width: int, side: str, backend: str) -> None:
    generator = Generator().manual_seed(width)
    for packed in (
        graded(generator, side, 41, width),
        planes(generator, side, 41, width, 7),
        signs(generator, width, width, 0),
    ):
        kernel = cpu_factors.kernel_of(packed)
        identity = torch.eye(packed.columns)
        for matrix in range(min(2, packed.batch)):
            wanted = packed.unpack(torch.tensor([matrix]))[0]
            got = kernel.dense(matrix, identity, torch.float32).mT
            within = 2**-8 if isinstance(packed, Planes) else 1e-6
            assert ((got - wanted).abs() <= within * wanted.abs()).all()


# Tiles


@pytest.fixture
def tiles() -> Iterator[None]:
    before = native.level()
    native.use_level(native.levels()[0])
    if not native.has_tiles():
        pytest.skip("this processor has no instructions for tiles")
    yield
    native.use_level(before)


def tile_case(packed: Packed, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of twelve tokens of some matrices, the matrix of each, and outputs in float64."""
    index = torch.tensor([0, 2, 1, 0, 0, 2, 2, 1, 1, 2, 2, 2]).clamp(max=packed.batch - 1)
    states = torch.randn(len(index), packed.columns, generator=generator)
    return states, index, torch.einsum("nc,nrc->nr", states.double(), packed.unpack(index).double())


@needs_build
@pytest.mark.parametrize("columns", SIZES)
@pytest.mark.parametrize("rows", SIZES)
def test_tiles_err_by_the_rounding_of_inputs_alone(rows: int, columns: int, tiles: None) -> None:
    """And by no factor: errors of rounding do not go along with what is wanted."""
    generator = Generator().manual_seed(rows + columns)
    for packed in (
        *(
            planes(generator, side, *shape, most)
            for most in range(1, 8)
            for side, shape in (("input", (columns, rows)), ("output", (rows, columns)))
        ),
        signs(generator, rows, columns, min(columns, 40)),
        graded(generator, "input", rows, columns),
        graded(generator, "output", columns, rows),
        integers(generator, rows, columns),
    ):
        states, index, wanted = tile_case(packed, generator)
        got = cpu_factors.kernel_of(packed).packed(states, index).double()
        size = torch.einsum("nc,nrc->nr", states.double().square(), packed.unpack(index).double().square()).sum().sqrt()
        assert (got - wanted).norm() <= 0.04 * size
        if rows * columns > 10000:
            assert abs((got * wanted).sum() / wanted.square().sum() - 1) < 0.003
            assert not abs((1.01 * got * wanted).sum() / wanted.square().sum() - 1) < 0.003


@needs_build
@pytest.mark.parametrize("columns", SIZES)
@pytest.mark.parametrize("rows", SIZES)
def test_tiles_are_exact_where_rounding_is(rows: int, columns: int, tiles: None) -> None:
    generator = Generator().manual_seed(rows * columns)
    for packed, scales in (
        ((p := planes(generator, "output", rows, columns, 1)), p.entry_scales()),
        ((p := planes(generator, "input", columns, rows, 1)), p.direction_scales()),
        ((p := signs(generator, rows, columns, 0)), p.column_scales),
        ((p := integers(generator, rows, columns)), torch.ones(1, columns)),
    ):
        _, index, _ = tile_case(packed, generator)
        assert scales is not None
        whole = torch.randint(-127, 128, (len(index), columns), generator=generator).float()
        scales = scales.float()[index]
        for begin in range(0, columns, 128):  # the largest of every tile, so that a step is one
            place = begin + (scales[:, begin : begin + 128] != 0).float().argmax(1, keepdim=True)
            whole.scatter_(1, place, 127.0)
        states = torch.where(scales == 0, 0, whole / scales)
        wanted = torch.einsum("nc,nrc->nr", states.double(), packed.unpack(index).double())
        got = cpu_factors.kernel_of(packed).packed(states, index)
        assert (got - wanted).norm() <= 1e-5 * wanted.norm(), type(packed)


# The tests themselves


def flipped(packed: Packed) -> Packed:
    """One sign of the first matrix is another."""
    assert isinstance(packed, Planes) and packed.signs is not None
    changed = packed.signs.clone()
    changed[0, 0] ^= 1
    return packed.replace(signs=changed)


def test_mistakes_are_seen() -> None:
    generator = Generator().manual_seed(0)
    gate_up, down = moebius_layer(generator, 65, 31, 63, 2)
    given = inputs(generator, (gate_up, down), 3, "all on one")
    given[1][:] = 0
    wanted = reference.routed_experts(*given, PackedExperts(gate_up, down, gated))
    assert disagreement(wanted, wanted) is None
    assert disagreement(wanted * 1.01, wanted) is not None
    for layer in (
        (PackedProjection(flipped(gate_up.factor), right=gate_up.right), down),
        (gate_up, PackedProjection(flipped(down.factor), left=down.left)),
    ):
        assert disagreement(reference.routed_experts(*given, PackedExperts(*layer, gated)), wanted) is not None
    unwritten = wanted.clone()
    unwritten[1] = torch.nan
    assert disagreement(unwritten, wanted) is not None
    unwritten[1] = 0
    assert disagreement(unwritten, wanted) is not None


def mistaken(layer: Layer, given: tuple[Tensor, Tensor, Tensor]) -> Iterator[tuple[str, Layer, tuple[Tensor, Tensor, Tensor]]]:
    """Layers and calls with something exchanged."""
    (gate_up, down), (states, index, weights) = layer, given
    other = weights.clone()
    other[5] = other[5].flip(0)
    yield "two routing weights", layer, (states, index, other)
    exchanged = torch.where(index == 2, 3, torch.where(index == 3, 2, index))
    yield "two experts", layer, (states, exchanged, weights)
    assert gate_up.right is not None and down.left is not None
    yield "a basis transposed", (replace(gate_up, right=transposed(gate_up.right)), down), given
    yield "another basis transposed", (gate_up, replace(down, left=transposed(down.left))), given
    yield "one sign in a hundred", (replace(gate_up, factor=some_flipped(gate_up.factor)), down), given


def transposed(packed: Packed) -> Packed:
    assert packed.rows == packed.columns
    return Dense.pack(packed.unpack().mT, torch.float32)


def some_flipped(packed: Packed) -> Packed:
    assert isinstance(packed, Planes) and packed.signs is not None
    changed = packed.signs.clone()
    changed[:, ::12] ^= 1
    return packed.replace(signs=changed)


@pytest.mark.parametrize("tokens", [6, 40])
def test_mistakes_in_whole_layers_are_seen(tokens: int, backend: str) -> None:
    """The bounds of every level reject them."""
    generator = Generator().manual_seed(0)
    layer = moebius_layer(generator, 63, 31, 63, 3)
    states, index, weights = inputs(generator, layer, tokens, "one without tokens")
    weights[5, 0] = 2 * weights[5, 1]
    given = states, index, weights
    agree(layer, given)
    for what, wrong, call in mistaken(layer, given):
        got = prepare(PackedExperts(*wrong, gated))(*call)
        assert whole_layer_disagreement(got, layer, given) is not None, what


# Damage, and what was picked


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="there is no C++ compiler")
def test_kernels_are_compiled_where_there_is_a_compiler() -> None:
    """A build that fails leaves a package that works, and skips most of the tests above: that must not go unseen."""
    assert "scalar" in native.levels()


@needs_build
def test_damaged_widths_are_refused() -> None:
    gate_up, down = moebius_layer(Generator().manual_seed(0), 65, 31, 63, 2)
    assert isinstance(gate_up.factor, Planes) and gate_up.factor.widths is not None
    for place, value in (((0, 0), 62), ((2, 0), 6000), ((2, 1), -5)):
        widths = gate_up.factor.widths.clone()
        widths[place] = value
        with pytest.raises(CheckpointError, match="widths"):
            cpu.prepare(
                PackedExperts(PackedProjection(gate_up.factor.replace(widths=widths), right=gate_up.right), down, gated)
            )


def test_a_kernel_can_be_forced(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    generator = Generator().manual_seed(0)
    layer = moebius_layer(generator, 65, 31, 63, 2)
    given = inputs(generator, layer, 3, "all on one")
    wanted = reference.routed_experts(*given, PackedExperts(*layer, gated))
    choice.tell_once.cache_clear()
    monkeypatch.setenv("MOEBIUS_KERNEL", "reference")
    with caplog.at_level("INFO", "moebius.kernels"):
        for _ in range(2):
            assert torch.equal(prepare(PackedExperts(*layer, gated))(*given), wanted)
    assert [record.message for record in caplog.records] == [
        "experts of planes and planes: reference kernels, because MOEBIUS_KERNEL asks for it"
    ]
    monkeypatch.setenv("MOEBIUS_KERNEL", "magic")
    with pytest.raises(KernelError, match="'magic', wanted one of triton, cpu, reference"):
        prepare(PackedExperts(*layer, gated))(*given)
    monkeypatch.setenv("MOEBIUS_KERNEL", "cpu")
    plain = PackedProjection(Dense.pack(torch.randn(EXPERTS, 62, 65)))
    with pytest.raises(KernelError, match="gate_up is stored as dense, wanted planes or signs"):
        prepare(PackedExperts(plain, layer[1], gated))


def test_triton_is_picked_on_a_gpu_or_when_asked_for(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("triton")
    generator = Generator().manual_seed(0)
    layer = moebius_layer(generator, 33, 16, 31, 2)
    given = inputs(generator, layer, 1, "all on one")
    wanted = reference.routed_experts(*given, PackedExperts(*layer, gated))
    choice.tell_once.cache_clear()
    with caplog.at_level("INFO", "moebius.kernels"):
        monkeypatch.delenv("MOEBIUS_KERNEL", raising=False)
        assert disagreement(prepare(PackedExperts(*layer, gated))(*given), wanted) is None
        monkeypatch.setenv("MOEBIUS_KERNEL", "triton")
        assert disagreement(prepare(PackedExperts(*layer, gated))(*given), wanted) is None
    first, second = (record.message for record in caplog.records)
    assert "triton: the layer is on the CPU" in first and "triton kernels, because MOEBIUS_KERNEL asks for it" in second


def test_without_a_build_the_reference_runs(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    generator = Generator().manual_seed(0)
    layer = moebius_layer(generator, 65, 31, 63, 2)
    given = inputs(generator, layer, 3, "all on one")
    monkeypatch.delenv("MOEBIUS_KERNEL", raising=False)
    monkeypatch.setattr(native, "_extension", None)
    monkeypatch.setattr(native, "_MISSING", "the compiled kernels are not there", raising=False)
    choice.tell_once.cache_clear()
    with caplog.at_level("INFO", "moebius.kernels"):
        got = prepare(PackedExperts(*layer, gated))(*given)
    assert torch.equal(got, reference.routed_experts(*given, PackedExperts(*layer, gated)))
    assert "the compiled kernels are not there" in caplog.text
    monkeypatch.setenv("MOEBIUS_KERNEL", "cpu")
    with pytest.raises(KernelError, match="the compiled kernels are not there"):
        prepare(PackedExperts(*layer, gated))(*given)
