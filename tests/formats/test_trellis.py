"""Trellis codes: what they stand for, what they cost, and that damage is refused."""

from __future__ import annotations

import pytest
import torch

from moebius.errors import CheckpointError
from moebius.formats.base import from_tensors
from moebius.formats.logarithmic import decode, encode
from moebius.formats.trellis import Trellis, fixed_bytes, table

RATES = torch.tensor([[0, 1, 2, 3, 4], [4, 0, 0, 2, 1]])
ROWS = 13


def example() -> tuple[Trellis, torch.Tensor]:
    """Packed codes, and the matrices they stand for, entry by entry."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (2, ROWS, 5), generator=generator) % (2 ** RATES.unsqueeze(1))
    rows = encode(torch.rand(2, ROWS, generator=generator) + 0.1, 8)
    columns = encode(torch.rand(2, 5, generator=generator) + 0.1, 8, RATES > 0)
    wanted = torch.zeros(2, ROWS, 5)
    for matrix in range(2):
        for column in range(5):
            rate = int(RATES[matrix, column])
            for row in range(ROWS if rate else 0):
                bits = "".join(f"{int(codes[matrix, (row - back) % ROWS, column]):0{rate}b}" for back in range(8, -1, -1))
                wanted[matrix, row, column] = table(rate)[int(bits[-8:], 2)]
    wanted *= decode(*rows).unsqueeze(2) * decode(*columns).unsqueeze(1)
    return Trellis.pack(codes.to(torch.uint8), RATES, rows, columns), wanted


def test_codes_stand_for_the_levels_of_the_last_eight_bits_around_the_end() -> None:
    packed, wanted = example()
    torch.testing.assert_close(packed.unpack(), wanted)
    torch.testing.assert_close(packed.unpack(torch.tensor([1])), wanted[1:])


def test_stored_bits_are_the_bytes_of_the_tensors_and_come_back() -> None:
    packed, wanted = example()
    assert packed.stored_bits() == 8 * (fixed_bytes(2, ROWS, 5) + int(RATES.sum()) * 2)
    packed.check("here")
    again = from_tensors(packed.spec(), packed.tensors())
    torch.testing.assert_close(again.unpack(), wanted)


def test_missing_codes_are_refused() -> None:
    packed, _ = example()
    assert packed.codes is not None
    with pytest.raises(CheckpointError, match="codes"):
        packed.replace(codes=packed.codes[1:]).check("here")


def test_rates_that_are_not_those_of_the_codes_are_refused() -> None:
    packed, _ = example()
    assert packed.rates is not None
    with pytest.raises(CheckpointError, match=r"here\.rates"):
        packed.replace(rates=packed.rates ^ 1).check("here")


def test_a_skeleton_has_the_tensors_of_what_is_packed() -> None:
    packed, _ = example()
    skeleton = Trellis.skeleton(RATES, ROWS)
    assert skeleton.spec() == packed.spec() and skeleton.stored_bits() == packed.stored_bits()
