"""Packed linear layers: every backend against the definition, and the bounds against real mistakes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.kernels.test_agreement import SIZES, disagreement, needs_build
from torch import Generator, Tensor

from moebius import native
from moebius.errors import KernelError
from moebius.formats.integers import Integers
from moebius.kernels import choice
from moebius.kernels.packed_linear import cpu, prepare, reference


@pytest.fixture(params=["default", *native.levels()])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every set of instructions of this machine, and the one that is picked."""
    before = native.level() if native.levels() else ""
    if request.param != "default":
        native.use_level(request.param)
    yield request.param
    if before:
        native.use_level(before)


def integers(rows: int, columns: int, bits: int, group: int, seed: int = 0) -> Integers:
    """Random codes; scales of both signs, and some that are zero."""
    generator = Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (1, rows, columns), generator=generator)
    scales = torch.randn(1, rows, -(-columns // group), generator=generator) * 2.0**-bits
    scales[:, 1::7] = 0
    return Integers.pack(codes, scales, None, bits=bits, group_size=group)


def states(count: int, columns: int) -> Tensor:
    return torch.randn(count, columns, generator=Generator().manual_seed(count))


@pytest.mark.parametrize(("rows", "columns"), [(r, c) for i, r in enumerate(SIZES) for c in (SIZES[i], SIZES[i - 2], 2100)])
@pytest.mark.parametrize(("bits", "group"), [(8, 0), (4, 128), (4, 64), (4, 32), (3, 128)])
@pytest.mark.parametrize("count", [0, 1, 3, 9])
def test_every_level_agrees(rows: int, columns: int, bits: int, group: int, count: int, level: str) -> None:
    weight, inputs = integers(rows, columns, bits, group or columns), states(count, columns)
    got = prepare(weight)(inputs)
    # Many inputs of codes of eight bits are rounded to bytes where there are instructions for that.
    bounds = (0.02, 0.1) if bits == 8 and count > 8 and native.has_tiles() else ()
    if count:
        assert disagreement(got, reference.packed_linear(inputs, weight), *bounds) is None
    else:
        assert got.shape == (0, rows)


@needs_build
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 20])
def test_inputs_of_other_types_and_layouts(dtype: torch.dtype, count: int) -> None:
    weight, wide = integers(65, 200, 4, 128), states(count, 400).to(dtype)
    got = prepare(weight)(wide[:, ::2])
    assert got.dtype == dtype
    if count == 1:  # as with whole inputs, but for the rounding at the end
        assert torch.equal(got, prepare(weight)(wide[:, ::2].float()).to(dtype))
    wanted = reference.packed_linear(wide[:, ::2].double(), weight)
    assert float((got.double() - wanted).norm() / wanted.norm()) < 0.01


@needs_build
@pytest.mark.parametrize("count", [2, 20])
def test_long_matrices_are_unpacked_some_rows_at_a_time(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_UNPACKED_WEIGHTS", 24 * 130)
    weight, inputs = integers(65, 130, 4, 64), states(count, 130)
    assert disagreement(prepare(weight)(inputs), reference.packed_linear(inputs, weight)) is None


@needs_build
def test_levels_give_the_same_bits() -> None:
    weight, inputs = integers(100, 1000, 4, 128), states(4, 1000)
    results = []
    best = native.level()
    for name in native.levels():
        native.use_level(name)
        results.append(prepare(weight)(inputs))
    native.use_level(best)
    assert all(torch.equal(result, results[0]) for result in results)


@needs_build
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("columns", [1, 64, 1000, 2048, 5000])
def test_sums_over_groups_are_exact(columns: int, group: int, level: str) -> None:
    """Values of one row that is not rounded (whole numbers below 2^13) against sums in 64 bits."""
    generator = Generator().manual_seed(columns)
    codes = torch.randint(0, 16, (1, 9, columns), generator=generator)
    values = torch.randint(-2000, 2001, (1, columns), generator=generator)
    values[0, 0] = 8191  # the largest digit: the step is then one
    groups = -(-columns // group)
    for g in range(groups):
        scales = torch.zeros(1, 9, groups)
        scales[..., g] = 1
        got = prepare(Integers.pack(codes, scales, None, bits=4, group_size=group if groups > 1 else columns))(values.float())
        mine = slice(g * group, (g + 1) * group)
        wanted = ((2 * codes[0, :, mine] - 15) * values[:, mine]).sum(1)
        assert torch.equal((2 * got[0]).round().long(), wanted)


@needs_build
def test_mistakes_are_seen() -> None:
    weight, inputs = integers(63, 128, 4, 64), states(3, 128)
    wanted = reference.packed_linear(inputs, weight)
    assert weight.codes is not None and weight.scales is not None
    flipped = weight.codes.clone()
    flipped[0, 0, 0] ^= 0x8
    assert disagreement(prepare(weight.replace(codes=flipped))(inputs), wanted)
    assert disagreement(1.01 * prepare(weight)(inputs), wanted)
    unwritten = prepare(weight)(inputs)
    unwritten[1] = torch.nan
    assert disagreement(unwritten, wanted)
    moved = prepare(weight.replace(scales=weight.scales.roll(1, dims=2)))(inputs)
    assert disagreement(moved, wanted)


@needs_build
@pytest.mark.parametrize("count", [5, 20])
def test_every_output_is_written(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    new_empty, blank = Tensor.new_empty, list[int]()

    def filled(self: Tensor, *size: int, **options: Any) -> Tensor:
        blank.append(count)
        return new_empty(self, *size, **options).fill_(torch.nan)

    monkeypatch.setattr(Tensor, "new_empty", filled)
    weight = integers(65, 129, 4, 128)
    assert prepare(weight)(states(count, 129)).isfinite().all()
    assert blank


def test_what_the_kernels_do_not_read_goes_to_the_reference(caplog: pytest.LogCaptureFixture) -> None:
    codes = torch.randint(0, 16, (1, 8, 96), generator=Generator().manual_seed(0))
    weight = Integers.pack(codes, torch.ones(1, 8, 6), None, bits=4, group_size=16)
    choice.tell_once.cache_clear()
    with caplog.at_level("INFO", "moebius.kernels"):
        got = prepare(weight)(states(2, 96))
    assert torch.equal(got, reference.packed_linear(states(2, 96), weight))
    assert "reference" in caplog.text and ("every 16 columns" in caplog.text or "not there" in caplog.text)


def test_a_kernel_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = integers(8, 64, 8, 64), states(1, 64)
    exact = reference.packed_linear(inputs, weight)
    for name in ("reference", "triton"):  # Triton has no packed linears
        monkeypatch.setenv(choice.VARIABLE, name)
        assert torch.equal(prepare(weight)(inputs), exact)
    monkeypatch.setenv(choice.VARIABLE, "cpu")
    monkeypatch.setattr(native, "missing", lambda: "nothing was compiled")
    with pytest.raises(KernelError, match=r"MOEBIUS_KERNEL=cpu .*nothing was compiled"):
        prepare(weight)
