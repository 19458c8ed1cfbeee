"""Codebooks, grouped signs and spectral directions: packing loses nothing and costs what the spec says."""

from __future__ import annotations

import pytest
import torch

from moebius.errors import CheckpointError
from moebius.formats.base import Packed, empty_like_spec, from_tensors
from moebius.formats.bits import pack, unpack
from moebius.formats.codebook import Codebook
from moebius.formats.grouped_signs import GroupedSigns
from moebius.formats.integers import Integers
from moebius.formats.spectral import Spectral

G = torch.Generator().manual_seed(0)


def half(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=G).half().float()


@pytest.mark.parametrize("bits", [9, 12, 16])
def test_wide_codes_are_packed_without_loss(bits: int) -> None:
    values = torch.randint(0, 2**bits, (3, 2, 7), generator=G)
    packed = pack(values, bits)
    assert packed.shape == (3, 2, -(-7 * bits // 8))
    assert torch.equal(unpack(packed, bits, 7).long(), values)


@pytest.mark.parametrize("bits", [4, 8, 9, 12])
def test_codebooks_mean_scale_times_shared_part_plus_entries(bits: int) -> None:
    books, codes = half(3, 2**bits, 4), torch.randint(0, 2**bits, (3, 5, 4), generator=G)
    loadings, directions, scales = half(3, 5, 2), half(2, 14), half(3, 5)
    packed = Codebook.pack(codes, books, 14).with_shared(loadings, directions).with_row_scales(scales)
    entries = torch.stack([books[e][codes[e]].reshape(5, 16)[:, :14] for e in range(3)])
    wanted = scales.unsqueeze(2) * (loadings @ directions + entries)
    assert torch.allclose(packed.unpack(), wanted, atol=1e-5)
    assert packed.stored_bits() == 8 * 3 * 5 * -(-4 * bits // 8) + 16 * (3 * 2**bits * 4 + 3 * 5 * 2 + 2 * 14 + 3 * 5)


@pytest.mark.parametrize("rows", [8, 10])
def test_codebooks_along_the_columns_and_with_scales_of_columns(rows: int) -> None:
    """With 10 rows the last vector of a column reaches beyond its end."""
    books, codes, scales = half(2, 16, 4), torch.randint(0, 16, (2, 5, -(-rows // 4)), generator=G), half(2, 5)
    packed = Codebook.pack(codes, books, rows, transposed=True)
    wanted = torch.stack([books[e][codes[e]].reshape(5, -1)[:, :rows].T for e in range(2)])
    assert torch.equal(packed.unpack(), wanted)
    assert torch.equal(packed.unpack(torch.tensor([1])), wanted[1:])
    assert packed.stored_bits() == 8 * 2 * 5 * -(-codes.shape[2] * 4 // 8) + 16 * 2 * 16 * 4
    scaled = packed.with_column_scales(scales)
    assert torch.allclose(scaled.unpack(), wanted * scales.unsqueeze(1))
    assert scaled.stored_bits() == packed.stored_bits() + 16 * 2 * 5
    for each in (packed, scaled):
        again = from_tensors(each.spec(), each.tensors())
        again.check("matrix")
        assert torch.equal(again.unpack(), each.unpack())


def test_integers_with_scales_of_columns() -> None:
    codes, scales, columns = torch.randint(0, 8, (2, 3, 10), generator=G), half(2, 3, 2), half(2, 10)
    plain = Integers.pack(codes, scales, torch.randint(0, 8, (2, 3, 2), generator=G), bits=3, group_size=6)
    scaled = plain.with_column_scales(columns)
    assert torch.allclose(scaled.unpack(), plain.unpack() * columns.unsqueeze(1))
    assert torch.equal(scaled.unpack(torch.tensor([1])), scaled.unpack()[1:])
    assert scaled.stored_bits() == plain.stored_bits() + 16 * 2 * 10
    again = from_tensors(scaled.spec(), scaled.tensors())
    again.check("matrix")
    assert torch.equal(again.unpack(), scaled.unpack())


def test_descriptions_of_earlier_checkpoints_stay_as_they_were() -> None:
    """What a format has learned since is not in the description of matrices that do not use it."""
    plain = Codebook.pack(torch.zeros(1, 2, 2, dtype=torch.int64), half(1, 16, 4), 8)
    fields = {"format", "batch", "rows", "columns", "code_bits", "length", "rank", "row_scaled"}
    assert plain.spec().keys() == fields
    assert plain.with_column_scales(half(1, 8)).spec().keys() == fields | {"column_scaled"}
    integers = Integers.pack(torch.zeros(1, 2, 2, dtype=torch.int64), half(1, 2, 1), None, bits=2, group_size=2)
    assert integers.spec().keys() == {"format", "batch", "rows", "columns", "bits", "group_size", "zero_points"}


@pytest.mark.parametrize("column_scaled", [True, False])
@pytest.mark.parametrize("salient", [0, 3])
def test_grouped_signs_follow_their_zones(salient: int, column_scaled: bool) -> None:
    batch, rows, columns, block = 2, 3, 10, 4
    mask = torch.zeros(batch, columns, dtype=torch.bool)
    mask[0, :salient], mask[1, columns - salient :] = True, True
    positive, large, second = (torch.rand(batch, rows, columns, generator=G) > 0.5 for _ in range(3))
    row_scales, salient_rows = half(batch, rows, 3, 2), half(batch, rows, 1, 2)
    column_scales = half(batch, 2, columns) if column_scaled else None
    packed = GroupedSigns.pack(
        positive, large, row_scales, column_scales, mask, second, salient_rows, block=block, salient_block=columns
    )
    got = packed.unpack()
    for b in range(batch):
        for i in range(rows):
            for j in range(columns):
                lower, upper = (1.0, 1.0) if column_scales is None else column_scales[b, :, j].tolist()
                sign = 1 if positive[b, i, j] else -1
                if mask[b, j]:
                    one, two = salient_rows[b, i, 0].tolist()
                    wanted = one * lower * sign + two * upper * (1 if second[b, i, j] else -1)
                else:
                    zone = int(large[b, i, j])
                    wanted = row_scales[b, i, j // block, zone].item() * (lower, upper)[zone] * sign
                assert got[b, i, j].item() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("transposed", [True, False])
def test_spectral_directions_have_their_own_widths(transposed: bool) -> None:
    directions, length, group = 9, 21, 8
    shape = (length, directions) if transposed else (directions, length)
    empty = Spectral(3, *shape, transposed, group, payload_bytes=2000)
    widths = torch.arange(27).view(3, 9) % 9
    codes = (torch.rand(3, directions, length, generator=G) * (2.0**widths).unsqueeze(2)).long()
    scales = half(3, directions, 3)
    packed = empty.fill(widths, codes, scales)
    spread = scales.repeat_interleave(group, dim=2)[..., :length]
    wanted = (codes - (2.0**widths - 1).unsqueeze(2) / 2) * spread * (widths > 0).unsqueeze(2)
    assert torch.allclose(packed.unpack(), wanted.mT if transposed else wanted)
    assert packed.stored_bits() == 8 * (2000 + 3 * 5)
    with pytest.raises(CheckpointError, match="wanted at most 100"):
        packed.replace(payload_bytes=100, payload=packed.payload[:100]).check("layer")


def packed_examples() -> list[Packed]:
    codes = torch.randint(0, 16, (3, 5, 3), generator=G)
    mask = torch.zeros(3, 10, dtype=torch.bool)
    mask[:, 2] = True
    planes = [torch.rand(3, 4, 10, generator=G) > 0.5 for _ in range(3)]
    grouped = GroupedSigns.pack(
        planes[0], planes[1], half(3, 4, 2, 2), None, mask, planes[2], half(3, 4, 2, 2), block=8, salient_block=8
    )
    spectral = Spectral(3, 4, 6, True, 4, 100, True).fill(
        torch.tensor([[1, 0, 2, 3, 8, 1]] * 3), torch.randint(0, 2, (3, 6, 4), generator=G), half(3, 6, 1), half(3, 4)
    )
    plain = Codebook.pack(codes, half(3, 16, 4), 11)
    upright = Codebook.pack(codes, half(3, 16, 4), 11, transposed=True)
    scaled = upright.with_column_scales(half(3, 5)).with_row_scales(half(3, 11)).with_shared(half(3, 11, 2), half(2, 5))
    integers = Integers.pack(codes, half(3, 5, 1), None, bits=4, group_size=3).with_column_scales(half(3, 3))
    return [plain, upright, scaled, integers, grouped, spectral]


@pytest.mark.parametrize("packed", packed_examples(), ids=lambda p: p.name)
def test_specs_rebuild_and_chosen_matrices_are_those_of_all(packed: Packed) -> None:
    packed.check("layer")
    assert empty_like_spec(packed.spec()).stored_bits() == packed.stored_bits()
    again, chosen = from_tensors(packed.spec(), packed.tensors()), torch.tensor([2, 0])
    assert torch.equal(again.unpack(chosen), packed.unpack()[chosen])
    assert torch.equal(again.unpack(torch.tensor([1])), packed.unpack()[1:2])
