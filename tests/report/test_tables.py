"""Tables in both faces, and how numbers are written."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from moebius.report.comparison import ComparisonRow, comparison_table, samples_markdown, verdict
from moebius.report.tables import TextTable, number, percent, size

ORIGINAL = ComparisonRow("original", None, 16.0, 20_000_000, 21.3, completions=["x = 1"])
PACKED = ComparisonRow(
    label="mobie [gain|true]",
    recipe={"method": "mobie"},
    bits_per_expert_weight=1.7712,
    file_bytes=3_456_789,
    perplexity=28.75,
    kl=0.12345,
    top1_agreement=0.701,
    routing_similarity=[0.9, 0.8],
    seconds=31.26,
    peak_memory_bytes=812_000_000,
    completions=["y = 2"],
)


def test_markdown_has_a_row_per_row_and_keeps_pipes_inside_cells() -> None:
    lines = comparison_table([ORIGINAL, PACKED]).markdown().splitlines()
    assert len(lines) == 4
    assert lines[1] == "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    assert lines[2] == "| original | 16.00 | 20.0 MB | 21.30 | – | – | – | – | – |"
    assert lines[3] == "| mobie [gain\\|true] | 1.77 | 3.46 MB | 28.75 | 0.1235 | 70.1 % | 0.8500 | 31.3 | 812 MB |"


def rated(method: str, bits: float, kl: float) -> ComparisonRow:
    return ComparisonRow(f"{method}@{bits:g}", {"method": method}, bits, 1, 20.0, kl=kl)


def test_a_method_is_behind_where_another_is_nearer_in_no_fewer_bits() -> None:
    mine = [rated("moebius", 2.0, 0.02), rated("moebius", 3.0, 0.01)]
    fewer, equal, near, far = (rated("rtn", bits, kl) for bits, kl in ((1.5, 0.001), (2.0, 0.03), (3.5, 0.009), (2.9, 0.02)))
    assert verdict([ORIGINAL, equal, *mine]) == "KL at equal bits: moebius is ahead of all 1 others"
    assert verdict([ORIGINAL, fewer, *mine]).endswith("ahead of all 0 others"), "it has no row of as few bits"
    assert verdict([ORIGINAL, equal, near, far, *mine]) == (
        "KL at equal bits: rtn@3.5 (3.500 bits, KL 0.00900) beats moebius@3 (3.000 bits, KL 0.01000);"
        " rtn@2.9 (2.900 bits, KL 0.02000) beats moebius@2 (2.000 bits, KL 0.02000); moebius is ahead of the other 1 of 3"
    )


def test_terminal_shows_every_cell_and_takes_brackets_as_text() -> None:
    console = Console(file=io.StringIO(), width=140)
    console.print(comparison_table([ORIGINAL, PACKED], title="a model", note="64 windows").rich())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for cell in ("a model", "64 windows", "mobie [gain|true]", "28.75", "70.1 %", "0.8500"):
        assert cell in text


def test_rows_survive_json() -> None:
    assert ComparisonRow.from_dict(PACKED.to_dict()) == PACKED
    assert PACKED.to_dict()["mean_routing_similarity"] == pytest.approx(0.85)


def test_samples_show_prompt_and_completion_of_every_model() -> None:
    text = samples_markdown([ORIGINAL, PACKED], ["import os\n"])
    assert text.count("```text") == 2
    assert "import os\nx = 1" in text and "import os\ny = 2" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (57_249_000, "57.2 MB"), (123_456_789, "123 MB"), (2.5e13, "25.00 TB")],
)
def test_sizes(value: int, text: str) -> None:
    assert size(int(value)) == text


def test_what_is_not_there_is_a_dash() -> None:
    assert [number(None, 2), percent(None), size(None)] == ["–", "–", "–"]
    assert number(12345.678, 1) == "12,345.7"


def test_columns_of_words_are_set_left() -> None:
    table = TextTable("", ("a", "b", "c"), (("x", "y", "1"),), text_columns=2)
    assert table.markdown().splitlines()[1] == "| --- | --- | ---: |"
