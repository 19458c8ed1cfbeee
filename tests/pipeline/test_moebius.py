"""`moebius` from checkpoint to transformers: one budget for the whole model, two passes, the same bytes after a stop."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.tiny import save_tiny

from moebius.checkpoint.writer import CheckpointWriter
from moebius.evaluate.size import packed_checkpoint_size
from moebius.pipeline import quantize_model
from moebius.recipe import CalibrationSettings, Recipe
from moebius.reference_model import reference_path

CALIBRATION = CalibrationSettings(windows=4, window_length=32)


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "olmoe"
    save_tiny("olmoe", folder)
    return folder


@pytest.mark.parametrize("bits", [0.3, 1.0, 2.7])
def test_the_bytes_are_those_that_were_asked_for(bits: float, tmp_path: Path) -> None:
    quantize_model(reference_path(), tmp_path / "packed", Recipe.make("moebius", bits), CALIBRATION)
    stored = packed_checkpoint_size(tmp_path / "packed").bits_per_expert_weight
    assert 0.99 * bits < stored <= bits


@pytest.mark.parametrize("stop_in", ["survey", "quantize"])
def test_a_stopped_run_resumes_and_writes_the_same_bytes(
    olmoe: Path, tmp_path: Path, stop_in: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.make("moebius", 2)
    quantize_model(olmoe, tmp_path / "whole", recipe, CALIBRATION)
    kept: list[str] = []
    keep, write = CheckpointWriter.keep, CheckpointWriter.write_layer

    def counted(self: CheckpointWriter, name: str, *rest: object) -> None:
        if stop_in == "survey" and len(kept) == 3:  # one layer whole, one in half
            raise KeyboardInterrupt
        kept.append(name)
        keep(self, name, *rest)

    def stop_at_the_second(self: CheckpointWriter, name: str, *rest: object) -> None:
        if list(self.entries()):
            raise KeyboardInterrupt
        write(self, name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "keep", counted)
        patch.setattr(CheckpointWriter, "write_layer", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            quantize_model(olmoe, tmp_path / "resumed", recipe, CALIBRATION)
    assert not (tmp_path / "resumed").exists()
    again: list[str] = []
    monkeypatch.setattr(CheckpointWriter, "keep", lambda self, name, *rest: (again.append(name), keep(self, name, *rest)))
    quantize_model(olmoe, tmp_path / "resumed", recipe, CALIBRATION)
    assert (again == []) == (stop_in == "quantize") and kept[0] not in again
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "resumed")
    assert not (tmp_path / ".resumed.partial").exists()
