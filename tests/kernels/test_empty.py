"""Factors that a budget gave nothing: zeros, in every format and from every backend, and no division by nothing."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch
from tests.kernels.test_agreement import EXPERTS, Layer, gated, graded, moebius_layer, planes, signs
from tests.kernels.test_borders import dense_layer, matrix
from torch import Generator, Tensor

from moebius import native
from moebius.formats import Packed, PackedProjection
from moebius.formats.codebook import Codebook
from moebius.formats.dense import Dense
from moebius.formats.graded import Graded
from moebius.formats.grouped_signs import GroupedSigns
from moebius.formats.integers import Integers
from moebius.formats.planes import Planes
from moebius.formats.signs import Signs
from moebius.formats.spectral import Spectral
from moebius.formats.trellis import Trellis
from moebius.kernels import choice, packed_linear
from moebius.kernels.cpu_factors import kernel_of
from moebius.kernels.decoder_layer import DecoderLayer, GatedMlp, Matrix, RoutedExperts
from moebius.kernels.routed_experts import PackedExperts, prepare

needs_build = pytest.mark.skipif(not native.levels(), reason="the compiled kernels are not there")
BACKENDS = ["reference", *(f"cpu {level}" for level in native.levels()), "triton"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name, *level = request.param.split()
    if name == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not there")
    monkeypatch.setenv(choice.VARIABLE, name)
    before = native.level() if level else ""
    for one in level:
        native.use_level(one)
    yield name
    if level:
        native.use_level(before)


def blank(packed: Packed) -> Packed:
    return packed.replace(**{name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in packed.expected().items()})


def of_every_format(batch: int, rows: int, columns: int) -> list[Packed]:
    """Matrices with no rows or no columns in every format, and those that have both but nothing stored."""
    shape = batch, rows, columns
    found: list[Packed] = [
        Planes(*shape, "input", 2),
        Planes(*shape, "output", 0),
        Spectral(*shape),
        Spectral(*shape, True, row_scaled=True),
        Trellis(*shape),
    ]
    if not rows * columns:
        found += [
            Codebook(*shape, 4, 4),
            Codebook(*shape, 4, 4, min(2, shape[2]), True),
            Dense(*shape),
            Graded(*shape, "input", f"8:{rows}" if rows else ""),
            Graded(*shape, "output", f"8:{columns}" if columns else ""),
            GroupedSigns(*shape),
            GroupedSigns(*shape, column_scaled=True),
            Integers(*shape),
            Integers(*shape, 3, 4, True),
            Signs(*shape),
        ]
    return [blank(packed) for packed in found]


SHAPES = [(0, 8), (8, 0), (0, 0), (8, 8)]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_nothing_unpacks_to_zeros(rows: int, columns: int) -> None:
    for packed in of_every_format(3, rows, columns):
        assert packed.is_zero() == (isinstance(packed, (Planes, Trellis)) or not rows * columns)
        for index, count in ((None, 3), (torch.tensor([2, 0]), 2), (torch.zeros(0, dtype=torch.int64), 0)):
            got = packed.unpack(index)
            assert got.shape == (count, rows, columns) and not got.any(), packed
        out = torch.full((3, rows, columns), torch.nan)
        packed.unpack_to(out)
        assert not out.any(), packed


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("count", [0, 1, 40])
def test_nothing_multiplies_to_zeros(rows: int, columns: int, count: int) -> None:
    for packed in of_every_format(1, rows, columns):
        inputs = torch.randn(count, columns)
        for got in (packed_linear.prepare(packed)(inputs), packed_linear.reference.packed_linear(inputs, packed)):
            assert got.shape == (count, rows) and not got.any(), packed
        if native.levels():
            got = kernel_of(packed).packed(inputs)
            assert got.shape == (count, rows) and not got.any(), packed


def empty_layers() -> dict[str, Layer]:
    """What a budget leaves of a layer where it gives one projection nothing, or both, or an expert or a plane of it."""
    generator = Generator().manual_seed(0)
    gate_up, down = moebius_layer(generator, 16, 31, 20, 2)

    def none_up(factor: Packed, kept: int) -> PackedProjection:
        return PackedProjection(factor, right=graded(generator, "input", kept, 16))

    def none_down(factor: Packed, kept: int) -> PackedProjection:
        return PackedProjection(factor, left=graded(generator, "output", kept, 16))

    no_directions = (
        none_up(planes(generator, "input", 0, 62, 1), 0),
        none_down(planes(generator, "output", 0, 31, 1), 0),
    )
    no_planes = (
        none_up(planes(generator, "input", 20, 62, 0), 20),
        none_down(planes(generator, "output", 20, 31, 0), 20),
    )
    no_widths = (
        none_up(blank(Planes(EXPERTS, 62, 20, "input", 0)), 20),
        none_down(blank(Planes(EXPERTS, 20, 31, "output", 0)), 20),
    )
    plain = PackedProjection(signs(generator, 62, 16, 0)), PackedProjection(signs(generator, 16, 31, 0))
    found: dict[str, Layer] = {}
    for name, (up, downwards) in (("directions", no_directions), ("planes", no_planes), ("widths", no_widths)):
        found |= {f"gate_up without {name}": (up, down), f"down without {name}": (gate_up, downwards)}
        found |= {f"neither with {name}": (up, downwards), f"signs behind no {name}": (up, plain[1])}
        found |= {f"signs before no {name}": (plain[0], downwards)}
    return found


@pytest.mark.parametrize("which", empty_layers())
@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_experts_of_nothing_put_out_zeros(which: str, tokens: int, backend: str) -> None:
    if backend == "triton" and (tokens != 1 or "signs" in which):
        pytest.skip("its interpreter is slow")
    layer = empty_layers()[which]
    assert any(projection.is_zero() for projection in layer)
    run = prepare(PackedExperts(*layer, gated))
    for dtype in (torch.float32,) if backend == "triton" else (torch.float32, torch.bfloat16):
        states = torch.randn(tokens, 16, dtype=dtype)
        got = run(states, torch.randint(0, EXPERTS, (tokens, 2)), torch.rand(tokens, 2, dtype=dtype))
        assert got.shape == (tokens, 16) and got.dtype == dtype and not got.any()


@pytest.mark.parametrize("format_name", ["dense", "integers", "signs", "graded"])
def test_experts_of_any_format_put_out_zeros(format_name: str) -> None:
    """Whatever backend takes them."""
    for up in of_every_format(EXPERTS, 62, 0):
        if up.name == format_name:
            shared = graded(Generator().manual_seed(0), "input", 0, 16)
            down = PackedProjection(signs(Generator().manual_seed(0), 16, 31, 0))
            got = prepare(PackedExperts(PackedProjection(up, right=shared), down, gated))(
                torch.randn(4, 16), torch.tensor([[0, 1]] * 4), torch.rand(4, 2)
            )
            assert got.shape == (4, 16) and not got.any()


def test_biases_remain(backend: str) -> None:
    bias = torch.randn(EXPERTS, 16)
    for which, layer in empty_layers().items():
        if backend == "triton" and which != "gate_up without planes":
            continue
        run = prepare(PackedExperts(*layer, gated, None, bias))
        index, weights = torch.tensor([[0, 3], [2, 2]]), torch.tensor([[0.5, 0.25], [0.5, 0.5]])
        wanted = (bias[index] * weights.unsqueeze(2)).sum(1)
        assert torch.allclose(run(torch.randn(2, 16), index, weights), wanted, atol=1e-6)


@needs_build
@pytest.mark.parametrize("which", empty_layers())
@pytest.mark.parametrize("texts", [1, 5])
def test_decoder_layers_with_such_experts_add_nothing(which: str, texts: int) -> None:
    layer = dense_layer(16, 24)
    experts = prepare(PackedExperts(*empty_layers()[which], gated))
    routed = RoutedExperts(matrix(EXPERTS, 16), 2, True, experts, None)
    without = DecoderLayer(torch.ones(16), torch.ones(16), 1e-5, layer.attention, routed)
    silent = GatedMlp(matrix(24, 16), matrix(24, 16), Matrix(torch.zeros(16, 24)))
    wanted = DecoderLayer(torch.ones(16), torch.ones(16), 1e-5, layer.attention, silent)
    results: list[Tensor] = []
    for one in (without, wanted):
        states = torch.linspace(-1, 1, texts * 16).view(texts, 16).contiguous()
        one.step(states, torch.ones(1, 4), torch.zeros(1, 4), torch.zeros(texts, 2, 1, 4), torch.zeros(texts, 2, 1, 4))
        results.append(states)
    assert results[0].isfinite().all() and torch.equal(*results)
