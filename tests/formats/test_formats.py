"""Packing loses nothing, costs what it says, and damage is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius.errors import CheckpointError, ShapeError
from moebius.formats.base import Packed, concatenate, empty_like_spec, from_tensors
from moebius.formats.bits import pack, packed_width, unpack
from moebius.formats.dense import Dense
from moebius.formats.integers import Integers
from moebius.formats.projection import PackedProjection, empty_projection, projection_from_tensors
from moebius.formats.signs import Signs


def example_signs(batch: int, rows: int, columns: int, salient: int, seed: int = 0) -> Signs:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(batch, columns, dtype=torch.bool)
    mask.scatter_(1, torch.rand(batch, columns, generator=generator).argsort(1)[:, :salient], True)
    return Signs.pack(
        torch.rand(batch, rows, columns, generator=generator) > 0.5,
        torch.rand(batch, rows, generator=generator),
        torch.rand(batch, columns, generator=generator),
        salient_mask=mask,
        salient_positive=torch.rand(batch, rows, columns, generator=generator) > 0.5,
        salient_column_scales=torch.rand(batch, columns, generator=generator),
    )


def example_integers(bits: int, zero_points: bool, columns: int = 11, group_size: int = 4) -> Integers:
    generator = torch.Generator().manual_seed(bits)
    groups = -(-columns // group_size)
    codes = torch.randint(0, 2**bits, (3, 5, columns), generator=generator)
    zeros = torch.randint(0, 2**bits, (3, 5, groups), generator=generator) if zero_points else None
    return Integers.pack(codes, torch.rand(3, 5, groups, generator=generator), zeros, bits=bits, group_size=group_size)


def examples() -> list[Packed]:
    return [
        Dense.pack(torch.randn(2, 3, 5)),
        Dense.pack(torch.randn(2, 3, 5), torch.float32),
        *(example_integers(bits, zero_points) for bits in range(1, 9) for zero_points in (False, True)),
        example_signs(3, 5, 19, 4),
        example_signs(1, 2, 8, 8),
        example_signs(3, 5, 19, 0),
    ]


@settings(max_examples=200, deadline=None)
@given(bits=st.integers(1, 8), rows=st.integers(1, 4), columns=st.integers(1, 40), seed=st.integers(0, 1 << 30))
def test_unpack_is_the_inverse_of_pack(bits: int, rows: int, columns: int, seed: int) -> None:
    values = torch.randint(0, 2**bits, (2, rows, columns), generator=torch.Generator().manual_seed(seed))
    packed = pack(values, bits)
    assert packed.shape == (2, rows, (columns * bits + 7) // 8) == (2, rows, packed_width(columns, bits))
    assert torch.equal(unpack(packed, bits, columns).long(), values)


def test_the_first_value_sits_in_the_lowest_bits() -> None:
    assert pack(torch.tensor([[1, 0, 0, 0, 0, 0, 0, 0, 1]]), 1).tolist() == [[1, 1]]
    assert pack(torch.tensor([[5, 2, 7]]), 3).tolist() == [[0b11010101, 0b1]]


def test_a_value_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ShapeError, match="got a value of 4, wanted less than"):
        pack(torch.tensor([[4]]), 2)
    with pytest.raises(ShapeError, match="got rows of 3 bytes, wanted 2"):
        unpack(torch.zeros(1, 3, dtype=torch.uint8), 2, 8)


@settings(max_examples=50, deadline=None)
@given(
    bits=st.integers(1, 8),
    zero_points=st.booleans(),
    columns=st.integers(1, 20),
    group_size=st.integers(1, 20),
    seed=st.integers(0, 1 << 30),
)
def test_integers_mean_scale_times_code_minus_centre(
    bits: int, zero_points: bool, columns: int, group_size: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // group_size)
    codes = torch.randint(0, 2**bits, (2, 3, columns), generator=generator)
    scales = torch.rand(2, 3, groups, generator=generator).half().float()
    zeros = torch.randint(0, 2**bits, (2, 3, groups), generator=generator) if zero_points else None
    values = Integers.pack(codes, scales, zeros, bits=bits, group_size=group_size).unpack()
    for column in range(columns):
        group = column // group_size
        centre = (2**bits - 1) / 2 if zeros is None else zeros[:, :, group]
        assert torch.allclose(values[:, :, column], scales[:, :, group] * (codes[:, :, column] - centre))


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 20), data=st.data(), seed=st.integers(0, 1 << 30))
def test_signs_mean_row_scale_times_two_planes(rows: int, columns: int, data: st.DataObject, seed: int) -> None:
    salient = data.draw(st.integers(0, columns))
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.rand(2, 2, rows, columns, generator=generator) > 0.5
    row_scales = torch.rand(2, rows, generator=generator).half().float()
    first_scales, second_scales = torch.rand(2, 2, columns, generator=generator).half().float()
    mask = torch.zeros(2, columns, dtype=torch.bool)
    mask.scatter_(1, torch.rand(2, columns, generator=generator).argsort(1)[:, :salient], True)
    packed = Signs.pack(
        first, row_scales, first_scales, salient_mask=mask, salient_positive=second, salient_column_scales=second_scales
    )
    assert packed.salient == salient
    for expert in range(2):
        for column in range(columns):
            want = (2.0 * first[expert, :, column] - 1) * first_scales[expert, column]
            if mask[expert, column]:
                want = want + (2.0 * second[expert, :, column] - 1) * second_scales[expert, column]
            assert torch.allclose(packed.unpack()[expert, :, column], want * row_scales[expert], atol=1e-6)


def test_signs_want_as_many_salient_columns_in_every_matrix() -> None:
    mask = torch.tensor([[True, False], [True, True]])
    ones = torch.ones(2, 3, 2, dtype=torch.bool)
    with pytest.raises(ShapeError, match="same number in each"):
        Signs.pack(
            ones, torch.ones(2, 3), torch.ones(2, 2), salient_mask=mask, salient_positive=ones, salient_column_scales=ones[:, 0]
        )


@pytest.mark.parametrize("packed", examples(), ids=lambda p: str(p.spec()))
def test_every_format_survives_its_spec_and_tensors(packed: Packed) -> None:
    spec = json.loads(json.dumps(packed.spec()))
    again = from_tensors(spec, packed.tensors())
    again.check("layer")
    assert torch.equal(again.unpack(), packed.unpack())
    assert again.unpack().dtype == torch.float32
    assert packed.stored_bits() == 8 * sum(t.untyped_storage().nbytes() for t in packed.tensors().values())
    assert empty_like_spec(spec).stored_bits() == packed.stored_bits()


@pytest.mark.parametrize("packed", examples(), ids=lambda p: str(p.spec()))
def test_chosen_matrices_are_those_of_the_whole(packed: Packed) -> None:
    index = torch.tensor([packed.batch - 1, 0])
    assert torch.equal(packed.unpack(index), packed.unpack()[index])
    twice = concatenate([packed, packed])
    twice.check("layer")
    assert torch.equal(twice.unpack(), packed.unpack().repeat(2, 1, 1))


@pytest.mark.parametrize("packed", examples(), ids=lambda p: str(p.spec()))
def test_damage_is_refused(packed: Packed) -> None:
    for name, tensor in packed.tensors().items():
        with pytest.raises(CheckpointError, match=f"layer.{name}: missing"):
            packed.replace(**{name: None}).check("layer")
        with pytest.raises(CheckpointError, match=f"layer.{name}: got"):
            packed.replace(**{name: tensor[..., :-1]}).check("layer")
        with pytest.raises(CheckpointError, match=f"layer.{name}: got"):
            packed.replace(**{name: tensor.double()}).check("layer")
        if tensor.is_floating_point():
            for bad in (float("nan"), float("inf")):
                broken = tensor.clone()
                broken.view(-1)[-1] = bad
                with pytest.raises(CheckpointError, match=f"layer.{name}: holds NaN or Inf"):
                    packed.replace(**{name: broken}).check("layer")


def test_extra_tensors_and_fields_are_refused() -> None:
    symmetric = example_integers(4, False)
    with pytest.raises(CheckpointError, match=r"layer\.zeros: not part"):
        symmetric.replace(zeros=torch.zeros(3, 8, dtype=torch.uint8)).check("layer")
    with pytest.raises(ShapeError, match="unknown fields planes"):
        from_tensors({**symmetric.spec(), "planes": 2}, {})


def test_a_projection_multiplies_its_parts() -> None:
    factor, left, right = example_signs(3, 5, 19, 4), Dense.pack(torch.randn(1, 7, 5)), Dense.pack(torch.randn(1, 19, 6))
    projection = PackedProjection(factor, left, right)
    assert projection.shape == (3, 7, 6)
    assert torch.allclose(projection.unpack(), left.unpack() @ factor.unpack() @ right.unpack(), atol=1e-5)
    assert projection.stored_bits() == factor.stored_bits() + left.stored_bits() + right.stored_bits()
    assert projection.shared_bits() == left.stored_bits() + right.stored_bits()
    again = projection_from_tensors(projection.spec(), projection.tensors())
    again.check("layer")
    assert torch.equal(again.unpack(), projection.unpack())
    assert empty_projection(projection.spec()).stored_bits() == projection.stored_bits()
    with pytest.raises(CheckpointError, match=r"layer\.left\.values: missing"):
        dataclasses.replace(projection, left=left.replace(values=None)).check("layer")
