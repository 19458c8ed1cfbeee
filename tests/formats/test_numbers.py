"""Every number of a format is checked against every other before memory is laid out by them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moebius.errors import CheckpointError, MoebiusError
from moebius.formats.base import empty_like_spec
from moebius.formats.dense import Dense
from moebius.formats.planes import Planes
from moebius.formats.projection import empty_projection

SHAPE = {"batch": 4, "rows": 16, "columns": 24}
SPECS: dict[str, dict[str, Any]] = {
    "codebook": {**SHAPE, "code_bits": 4, "length": 4, "rank": 2, "row_scaled": True},
    "dense": {**SHAPE, "dtype": "float16"},
    "graded": {**SHAPE, "side": "input", "grades": "8:6 4:10"},
    "grouped_signs": {**SHAPE, "block": 8, "salient_block": 8, "salient": 3, "column_scaled": True},
    "integers": {**SHAPE, "bits": 3, "group_size": 8, "zero_points": True},
    "planes": {**SHAPE, "side": "input", "planes": 2, "scale_bits": 5, "sign_rows": 60, "live": 40, "live_matrices": 4},
    "signs": {**SHAPE, "salient": 3},
    "spectral": {**SHAPE, "transposed": False, "group_size": 8, "payload_bytes": 500, "row_scaled": True},
}
EDITS: list[tuple[str, str, Any]] = [
    *[(kind, name, value) for kind in SPECS for name in SHAPE for value in (-1, 1.5, True, "4", 1 << 70)],
    *[(kind, "batch", 0) for kind in SPECS],
    *[("codebook", "code_bits", v) for v in (0, -1, 17, 10**9)],
    *[("codebook", "length", v) for v in (0, -4)],
    ("codebook", "rank", -1),
    *[("dense", "dtype", v) for v in ("int8", "nn", "", 16)],
    *[("graded", "grades", v) for v in ("", "8:6", "9:16", "0:16", "8:20 4:-4", "8:6 x:10", 3)],
    ("graded", "side", "top"),
    *[("grouped_signs", name, v) for name in ("block", "salient_block") for v in (0, -8, 1 << 40)],
    *[(kind, "salient", v) for kind in ("signs", "grouped_signs") for v in (-1, 25, 10**9)],
    *[("integers", "bits", v) for v in (0, 9, -1, 10**9)],
    *[("integers", "group_size", v) for v in (0, -8)],
    ("integers", "zero_points", 1),
    ("planes", "side", "left"),
    *[("planes", "planes", v) for v in (0, 8, -1)],
    *[("planes", "scale_bits", v) for v in (0, 9)],
    *[("planes", "live", v) for v in (-1, 3, 97, 10**9)],
    *[("planes", "live_matrices", v) for v in (-1, 5)],
    *[("planes", "sign_rows", v) for v in (-1, 39, 81)],
    *[("spectral", "group_size", v) for v in (0, -1)],
    ("spectral", "payload_bytes", -1),
]


@pytest.mark.parametrize("kind", SPECS)
def test_sound_descriptions_are_taken(kind: str) -> None:
    assert empty_like_spec({"format": kind, **SPECS[kind]}).batch == 4


@pytest.mark.parametrize(("kind", "name", "value"), EDITS)
def test_a_number_that_fits_no_matrix_is_refused(kind: str, name: str, value: Any) -> None:
    with pytest.raises(MoebiusError):
        empty_like_spec({"format": kind, **SPECS[kind], name: value})


def dense(batch: int, rows: int, columns: int) -> dict[str, Any]:
    return {"format": "dense", "batch": batch, "rows": rows, "columns": columns, "dtype": "float16"}


@pytest.mark.parametrize(
    "parts",
    [
        {"left": dense(1, 16, 9)},  # reads more than the factor gives
        {"left": dense(2, 16, 8)},
        {"right": dense(1, 0, 24)},  # a basis without rows
        {"right": dense(1, 5, 24)},  # fewer rows than the factor has columns
        {"right": dense(4, 6, 24)},
        {"bias": dense(4, 1, 9)},
        {"bias": dense(1, 1, 8)},
        {"factor": dense(4, 8, 10**6), "right": dense(1, 10**6, 24)},
        {"middle": dense(1, 8, 8)},
        {"left": "dense"},
    ],
)
def test_parts_that_do_not_meet_are_refused(parts: dict[str, Any]) -> None:
    with pytest.raises(MoebiusError):
        empty_projection({"factor": dense(4, 8, 6), **parts})


def planes(widths: list[list[int]]) -> Planes:
    blank = Planes.skeleton(torch.tensor(widths), side="input", directions=8, entries=8, scale_bits=5, device="cpu")
    return blank.replace(**{name: torch.zeros_like(t) for name, t in blank.tensors().items() if name != "widths"})


@pytest.mark.parametrize("widths", [[[9, 1], [2, 0]], [[2, 4], [4, 2]], [[7, -1], [4, 2]], [[6, 2], [3, 1]]])
def test_widths_that_point_beside_the_signs_are_refused(widths: list[list[int]]) -> None:
    sound = planes([[5, 2], [3, 2]])
    sound.check("here")
    with pytest.raises(CheckpointError, match=r"here\.widths"):
        sound.replace(widths=torch.tensor(widths, dtype=torch.int16)).check("here")


def test_a_grid_that_overflows_is_refused() -> None:
    sound = planes([[5, 2], [3, 2]])
    with pytest.raises(CheckpointError, match="entry_grids"):
        sound.replace(entry_grids=torch.tensor([[0.0, 0.0], [60000.0, 0.0]]).half()).check("here")


def test_scales_beyond_16_bit_are_refused() -> None:
    with pytest.raises(CheckpointError, match="holds NaN or Inf"):
        Dense.pack(torch.full((1, 2, 2), 1e6)).check("here")
