"""The figure is a PNG of the promised size that shows what it was given."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from moebius.report.comparison import ComparisonRow

figures = pytest.importorskip("moebius.report.figures")


def rows(count: int, layers: int = 4, worst: float = 90.0) -> list[ComparisonRow]:
    packed = [
        ComparisonRow(
            f"recipe {i}",
            {},
            1 + 0.1 * i,
            10,
            worst - i,
            routing_similarity=[1 - 0.01 * (i + layer) for layer in range(layers)],
        )
        for i in range(count)
    ]
    return [ComparisonRow("original", None, 16.0, 100, 20.0), *packed]


@pytest.mark.parametrize(("count", "layers", "worst"), [(1, 1, 21.0), (4, 4, 90.0), (12, 48, 5000.0)])
def test_writes_a_png(tmp_path: Path, count: int, layers: int, worst: float) -> None:
    figures.comparison_figure(rows(count, layers, worst), tmp_path / "figure.png")
    data = (tmp_path / "figure.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (1840, 840)


def test_another_figure_for_other_rows(tmp_path: Path) -> None:
    for name, worst in (("a", 90.0), ("b", 60.0), ("c", 90.0)):
        figures.comparison_figure(rows(3, worst=worst), tmp_path / f"{name}.png")
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == c != b


def test_colours_are_told_apart_by_the_colour_blind() -> None:
    # Okabe and Ito 2008; sixteen recipes still differ by colour or marker.
    assert set(figures._COLORS) <= {"#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000"}
    looks = {(figures.look(i)["color"], figures.look(i)["marker"]) for i in range(16)}
    assert len(looks) == 16
