"""A small dose of ``make fuzz``."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.fuzz.mutate import run
from tests.packed import save_packed_tiny


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_packed_tiny("olmoe", tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize(("kind", "count"), [("number", 25), ("tensor", 75)])
def test_changed_numbers_and_tensors_are_refused_or_run(packed: Path, kind: str, count: int) -> None:
    results = run(packed, count, seed=0, kinds=(kind,))
    assert [result for result in results if result[2] not in ("refused", "ran")] == []


def test_changed_bytes_do_not_end_the_process(packed: Path) -> None:
    assert [result for result in run(packed, 25, seed=0, kinds=("bytes",)) if "killed" in result[2]] == []
