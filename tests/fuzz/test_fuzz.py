"""A small dose of ``make fuzz``: one way after the other, one kind of change after the other."""

from __future__ import annotations

import os
import random
import shutil
import signal
from pathlib import Path

import pytest
from tests.fuzz.mutate import KINDS
from tests.fuzz.run import ALL_WAYS, GOOD, Fuzz
from tests.packed import save_every_format


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_every_format(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("kind", KINDS)
def test_changed_checkpoints_are_refused_or_run(packed: Path, kind: str) -> None:
    tried = Fuzz([packed], seed=1, kinds=[kind]).run(2 * len(ALL_WAYS))
    assert [t for t in tried if t.outcome not in GOOD] == []
    assert {t.way for t in tried} == set(ALL_WAYS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_changes_something_and_the_same_seed_the_same(packed: Path, kind: str, tmp_path: Path) -> None:
    def changed(seed: int, name: str) -> dict[str, bytes]:
        folder = Path(shutil.copytree(packed, tmp_path / name))
        KINDS[kind](folder, random.Random(seed))
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    before = {path.name: path.read_bytes() for path in packed.iterdir()}
    made = [changed(seed, str(seed)) for seed in range(4)]
    assert sum(files != before for files in made) >= 2
    assert changed(0, "again") == made[0]


def test_a_crash_and_a_bare_error_are_seen(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(folder: Path) -> None:

        os.kill(os.getpid(), signal.SIGKILL)

    def leave(folder: Path) -> str:
        raise SystemExit(7)

    monkeypatch.setitem(ALL_WAYS, "crash", crash)
    monkeypatch.setitem(ALL_WAYS, "leave", leave)
    assert [t.outcome for t in Fuzz([packed], kinds=["number"], ways=["crash"]).run(2)] == ["killed by SIGKILL"] * 2
    assert Fuzz([packed], kinds=["number"], ways=["leave"]).run(1)[0].outcome.startswith("ended the process")
