"""Nested planes and graded bases: what bits mean, what they cost, and that damage is refused."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import pytest
import torch

from moebius.errors import CheckpointError, ShapeError
from moebius.formats.base import empty_like_spec, from_tensors
from moebius.formats.graded import ROUNDING_NOISE, Graded
from moebius.formats.logarithmic import decode, encode, rounded
from moebius.formats.planes import AMPLITUDES, DISTORTION, Planes, pack_signs

DIRECTIONS, ENTRIES = 11, 19
WIDTHS = torch.tensor([[7, 3, 1], [0, 0, 0], [11, 11, 2], [4, 0, 0]])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def example_planes(side: str, scale_bits: int = 6) -> tuple[Planes, torch.Tensor]:
    """Packed planes, and the matrices they stand for by the formula, as (matrix, direction, entry)."""
    positive = torch.rand(len(WIDTHS), 3, DIRECTIONS, ENTRIES, generator=generator()) > 0.5
    live = torch.arange(DIRECTIONS) < WIDTHS[:, :1]
    entry_codes, entry_grids = encode(torch.rand(len(WIDTHS), ENTRIES, generator=generator(1)) + 0.1, scale_bits)
    direction_scales = torch.rand(len(WIDTHS), DIRECTIONS, generator=generator(2)) + 0.01
    direction_codes, direction_grids = encode(direction_scales, scale_bits, live)
    packed = Planes.pack(
        torch.cat([pack_signs(positive[e : e + 1], WIDTHS[e : e + 1]) for e in range(len(WIDTHS))]),
        WIDTHS,
        entry_codes,
        entry_grids,
        direction_codes,
        direction_grids,
        side=side,
        directions=DIRECTIONS,
        entries=ENTRIES,
        scale_bits=scale_bits,
    )
    entry_scales, direction_scales = decode(entry_codes, entry_grids), decode(direction_codes, direction_grids)
    want = torch.zeros(len(WIDTHS), DIRECTIONS, ENTRIES)
    for matrix, direction in itertools.product(range(len(WIDTHS)), range(DIRECTIONS)):
        planes = int((WIDTHS[matrix] > direction).sum())
        for plane in range(planes):
            sign = 2.0 * positive[matrix, plane, direction] - 1
            want[matrix, direction] += AMPLITUDES[planes][plane] * sign * direction_scales[matrix, direction]
    return packed, want * entry_scales.unsqueeze(1)


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("scale_bits", [5, 8])
def test_planes_mean_what_the_formula_says(side: str, scale_bits: int) -> None:
    packed, want = example_planes(side, scale_bits)
    got = packed.unpack().mT if side == "input" else packed.unpack()
    assert torch.allclose(got, want, atol=1e-6)
    index = torch.tensor([2, 1, 0, 2])
    assert torch.equal(packed.unpack(index), packed.unpack()[index])
    assert packed.counts(index).tolist() == [[int((WIDTHS[e] > k).sum()) for k in range(DIRECTIONS)] for e in index]


@pytest.mark.parametrize("side", ["input", "output"])
def test_planes_survive_spec_and_tensors_and_cost_what_they_say(side: str) -> None:
    packed, _ = example_planes(side)
    packed.check("layer")
    spec = json.loads(json.dumps(packed.spec()))
    again = from_tensors(spec, packed.tensors())
    assert torch.equal(again.unpack(), packed.unpack())
    assert packed.stored_bits() == 8 * sum(t.untyped_storage().nbytes() for t in packed.tensors().values())
    skeleton = Planes.skeleton(WIDTHS, side=side, directions=DIRECTIONS, entries=ENTRIES, scale_bits=6)
    assert skeleton.spec() == packed.spec()
    assert skeleton.stored_bits() == empty_like_spec(spec).stored_bits() == packed.stored_bits()
    # Experts without planes store no scales: 39 rows of 3 bytes, 12 widths, 3 rows of 19 codes, 22 codes, 6 grids.
    assert packed.stored_bits() == 8 * (39 * 3 + 12 * 2 + 3 * 15 + 17 + 6 * 4)


def test_planes_may_be_none_at_all() -> None:
    none = torch.zeros(3, 0, dtype=torch.int64)
    packed = Planes.skeleton(none, side="input", directions=5, entries=7, scale_bits=5, device="cpu")
    packed.check("layer")
    assert packed.unpack().shape == (3, 7, 5)
    assert not packed.unpack().any()


def test_damaged_planes_are_refused() -> None:
    for packed in (example_planes("input")[0], example_graded("output")[0]):
        for name, tensor in packed.tensors().items():
            with pytest.raises(CheckpointError, match=f"layer.{name}: missing"):
                dataclasses.replace(packed, **{name: None}).check("layer")
            with pytest.raises(CheckpointError, match=f"layer.{name}: got"):
                dataclasses.replace(packed, **{name: tensor[..., :-1]}).check("layer")
            if tensor.is_floating_point():
                with pytest.raises(CheckpointError, match="NaN"):
                    dataclasses.replace(packed, **{name: tensor * torch.nan}).check("layer")


def gaussian_levels(planes: int) -> torch.Tensor:
    """All levels, ascending."""
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=planes)), dtype=torch.float64)
    return (signs @ torch.tensor(AMPLITUDES[planes], dtype=torch.float64)).sort().values


def moments_of_cells(levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Probability of the cell of each level under a Gaussian, and its first moment."""
    infinity = torch.tensor([math.inf], dtype=torch.float64)
    edges = torch.cat([-infinity, (levels[1:] + levels[:-1]) / 2, infinity])
    cumulative = torch.special.ndtr(edges)
    density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
    return cumulative.diff(), -density.diff()


@pytest.mark.parametrize("planes", AMPLITUDES)
def test_the_distortions_are_those_of_a_gaussian(planes: int) -> None:
    levels = gaussian_levels(planes)
    probability, first = moments_of_cells(levels)
    error = 1 - 2 * (levels * first).sum() + (levels.square() * probability).sum()
    assert error.item() == pytest.approx(DISTORTION[planes], abs=1e-7)
    # No small change of an amplitude helps: the gradient with respect to them is zero; from five on, to their common factor.
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=planes)), dtype=torch.float64)
    order = (signs @ torch.tensor(AMPLITUDES[planes], dtype=torch.float64)).argsort()
    gradient = 2 * (signs[order] * (levels * probability - first).unsqueeze(1)).sum(0)
    amplitudes = torch.tensor(AMPLITUDES[planes], dtype=torch.float64)
    if planes > 4:
        assert torch.allclose(amplitudes[:-1], 2 * amplitudes[1:], rtol=1e-12)
        gradient = gradient @ amplitudes
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("planes", [1, 2])
def test_one_and_two_planes_are_the_lloyd_max_levels(planes: int) -> None:
    """Each level is the mean of its cell, which no nesting spoils here; with three planes it is a near miss."""
    levels = gaussian_levels(planes)
    probability, first = moments_of_cells(levels)
    assert torch.allclose(levels, first / probability, atol=1e-7)
    three = gaussian_levels(3)
    probability, first = moments_of_cells(three)
    assert 1e-3 < (three - first / probability).abs().max() < 0.2


def example_graded(side: str) -> tuple[Graded, torch.Tensor]:
    bits = [8, 8, 6, 4, 4, 3]
    codes = torch.stack([torch.randint(0, 2**b, (1, ENTRIES), generator=generator(b)) for b in bits], 1)
    scale_codes, grid = encode(torch.rand(1, len(bits), generator=generator()) + 0.1, 8)
    centre = (2.0 ** torch.tensor(bits) - 1).view(1, -1, 1) / 2
    want = (codes - centre) * decode(scale_codes, grid).unsqueeze(2)
    return Graded.pack(codes, scale_codes, grid, side=side, bits=bits), want


@pytest.mark.parametrize("side", ["input", "output"])
def test_graded_directions_mean_scale_times_centred_code(side: str) -> None:
    packed, want = example_graded(side)
    packed.check("layer")
    assert packed.grades == "8:2 6:1 4:2 3:1"
    got = packed.unpack() if side == "input" else packed.unpack().mT
    assert torch.allclose(got, want)
    again = from_tensors(json.loads(json.dumps(packed.spec())), packed.tensors())
    assert torch.equal(again.unpack(), packed.unpack())
    assert packed.stored_bits() == 8 * (2 * 19 + 15 + 2 * 10 + 8 + 6 + 4)
    skeleton = Graded.skeleton(side=side, bits=[8, 8, 6, 4, 4, 3], entries=ENTRIES)
    assert skeleton.spec() == packed.spec() and skeleton.stored_bits() == packed.stored_bits()


@pytest.mark.parametrize("grades", ["8:2", "9:6", "nonsense", "8:6 4:1"])
def test_grades_that_do_not_add_up_are_refused(grades: str) -> None:
    with pytest.raises(ShapeError, match="wanted BITS:COUNT pairs that add up to 6"):
        dataclasses.replace(example_graded("input")[0], grades=grades).check("layer")


@pytest.mark.parametrize("bits", ROUNDING_NOISE)
def test_rounding_noise_is_that_of_a_gaussian(bits: int) -> None:
    values = torch.randn(1, 200_000, generator=generator(), dtype=torch.float64)
    levels = 2**bits - 1
    errors = []
    for clip in torch.linspace(1.5, 5.5, 60):
        scale = 2 * clip / levels
        errors.append(((values / scale + levels / 2).round().clamp(0, levels) - levels / 2) * scale - values)
    assert min(e.square().mean().item() for e in errors) == pytest.approx(ROUNDING_NOISE[bits], rel=0.25)


@pytest.mark.parametrize("bits", [3, 5, 8])
def test_logarithmic_codes_err_by_half_a_step(bits: int) -> None:
    scales = torch.exp(1.5 * torch.randn(5, 40, generator=generator()))  # further apart, the small ones are next to zero
    codes, grid = encode(scales, bits)
    step = grid[:, 1].float().unsqueeze(1)
    # fp16 rounds the first point of the grid too.
    assert ((decode(codes, grid) / scales).log().abs() <= step / 2 + grid[:, :1].float().abs() * 2**-10 + 1e-3).all()
    assert torch.equal(rounded(scales, bits), decode(codes, grid))


def test_what_is_not_used_does_not_widen_the_grid() -> None:
    scales = torch.tensor([[1.0, 1.1, 1.2, 1e-20]])
    used = torch.tensor([[True, True, True, False]])
    assert (rounded(scales, 5, used)[:, :3] / scales[:, :3] - 1).abs().max() < 0.01
    codes, grid = encode(scales, 5, torch.zeros_like(used))
    assert grid.isfinite().all() and decode(codes, grid).isfinite().all()
    assert encode(scales[:, :0], 5)[1].tolist() == [[0.0, 0.0]]


def test_zeros_stay_out_of_the_span_of_a_grid() -> None:
    scales = torch.rand(3, 24, generator=torch.Generator().manual_seed(0)) + 0.5
    dead = scales.clone()
    dead[:, ::3] = 0
    dead[1, 1] = 1e-9
    live = dead > 1e-3
    alone = decode(*encode(scales, 5, live))
    assert torch.equal(decode(*encode(dead, 5))[live], alone[live])
    # A dead neuron takes the smallest scale there is, and nothing is larger or not finite.
    assert bool((decode(*encode(dead, 5))[~live] <= alone.amin(1).max()).all())
    assert decode(*encode(torch.zeros(2, 4), 5)).isfinite().all()
    assert encode(torch.zeros(2, 0), 5)[1].isfinite().all()
