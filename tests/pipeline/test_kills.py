"""A run that was killed anywhere and started again ends in the bytes of one that was never stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.kills import CALIBRATION, RECIPES, differing
from tests.tiny import save_tiny

from moebius.errors import CalibrationError, CheckpointError, OutputError
from moebius.pipeline import quantize_model, run
from moebius.recipe import Recipe


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("olmoe", tmp_path_factory.mktemp("kills") / "source")


@pytest.mark.parametrize("name", RECIPES)
def test_killed_anywhere_and_finished(name: str, source: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process has none of the others
    try:
        for point, files in differing(source, tmp_path, RECIPES[name], 7):
            assert files == [], f"killed at operation {point}"
    finally:
        torch.set_num_threads(before)


def test_threads_are_part_of_what_is_compared(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(run.CheckpointWriter, "copy_rest", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize_model(source, tmp_path / "out", Recipe.make("rtn"), CALIBRATION)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    with pytest.raises(OutputError, match=r"machine\.threads was \d+, is 77"):
        quantize_model(source, tmp_path / "out", Recipe.make("rtn"), CALIBRATION)


@pytest.mark.parametrize("trouble", ["tokenizer", "no tokenizer", "tokens", "text", "disk"])
def test_what_can_be_known_is_refused_before_the_weights_are_read(
    trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"vocab_size": 90, "eos_token_id": 5, "bos_token_id": 5} if trouble == "tokens" else {}
    source = save_tiny("olmoe", tmp_path / "source", **few)
    calibration = CALIBRATION
    if trouble == "tokenizer":
        path = source / "tokenizer.json"
        path.write_text(path.read_text().replace('"BPE"', '"Foo"'))
    if trouble == "no tokenizer":
        for path in source.glob("tokenizer*"):
            path.unlink()
    if trouble == "text":
        (tmp_path / "short.txt").write_text("too short")
        calibration = type(calibration)(text=str(tmp_path / "short.txt"))
    if trouble == "disk":
        monkeypatch.setattr("moebius.checkpoint.writer.shutil.disk_usage", lambda path: type("", (), {"free": 1000}))

    def reads(*_: object) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr(run.SourceCheckpoint, "check_finite", reads)
    with pytest.raises((CalibrationError, CheckpointError, OutputError)):
        quantize_model(source, tmp_path / "out", Recipe.make("moebius"), calibration)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".txt") == ["source"]
