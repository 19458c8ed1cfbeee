"""Recovery layer by layer: nearer to the original in as many bytes, the same every time, and on from where it was stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.tiny import save_tiny

from moebius.checkpoint.writer import CheckpointWriter
from moebius.errors import CalibrationError
from moebius.pipeline import blockwise, quantize_model
from moebius.pipeline.student import Training
from moebius.recipe import CalibrationSettings, Recipe

CALIBRATION = CalibrationSettings(windows=32, window_length=64)
RECOVERED = {"recover": True, "recover_steps": 24}
CONTINUOUS = {"codes", "entry_codes", "entry_grids", "direction_codes", "direction_grids"}


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("olmoe", tmp_path_factory.mktemp("source") / "olmoe")


def run(source: Path, out: Path, bits: float = 1, **options: Any) -> dict[str, Any]:
    return quantize_model(source, out, Recipe.make("moebius", bits, **options), CALIBRATION)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def changed(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    assert {name: t.shape for name, t in one.items()} == {name: t.shape for name, t in other.items()}
    return {name.rpartition(".")[2] for name in one if not torch.equal(one[name], other[name])}


@pytest.mark.parametrize("codes", ["planes", "trellis"])
def test_every_layer_comes_nearer_in_as_many_bytes_twice_the_same(codes: str, olmoe: Path, tmp_path: Path) -> None:
    for name, options in {"plain": {}, "recovered": RECOVERED, "again": RECOVERED}.items():
        report = run(olmoe, tmp_path / name, 1 if codes == "planes" else 2, codes=codes, **options)
        assert ("recover" in report) == (name != "plain")
    layers = [entry["name"] for entry in report["layers"]]
    assert list(report["recover"]) == layers and len(layers) > 1
    for before, after in report["recover"].values():
        assert after < 0.97 * before
    assert after < 0.9 * before
    found = {name: tensors(tmp_path / name) for name in ("plain", "recovered", "again")}
    assert changed(found["recovered"], found["again"]) == set()
    trained = {"row_codes", "column_codes", "grids"} if codes == "trellis" else {"signs", *CONTINUOUS}
    assert {"row_codes", "signs"} & trained <= changed(found["plain"], found["recovered"]) <= trained


def test_signs_stay_where_they_are_not_to_be_trained(olmoe: Path, tmp_path: Path) -> None:
    run(olmoe, tmp_path / "plain")
    run(olmoe, tmp_path / "recovered", recover_signs=False, **RECOVERED)
    different = changed(tensors(tmp_path / "plain"), tensors(tmp_path / "recovered"))
    assert {"codes", "entry_codes"} <= different <= CONTINUOUS


def test_what_was_stopped_goes_on_with_the_next_layer(olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(olmoe, tmp_path / "whole", **RECOVERED)
    keep = CheckpointWriter.keep_layer
    recovered: list[str] = []

    def watched(self: CheckpointWriter, name: str, *rest: Any, stage: str = "packed") -> None:
        if stage == "recovered":
            if stop and recovered:
                raise KeyboardInterrupt
            recovered.append(name)
        keep(self, name, *rest, stage=stage)

    monkeypatch.setattr(CheckpointWriter, "keep_layer", watched)
    stop = True
    with pytest.raises(KeyboardInterrupt):
        run(olmoe, tmp_path / "resumed", **RECOVERED)
    stop, first = False, list(recovered)
    run(olmoe, tmp_path / "resumed", **RECOVERED)
    assert len(first) == 1 and recovered.count(first[0]) == 1 and len(recovered) > 1
    assert changed(tensors(tmp_path / "whole"), tensors(tmp_path / "resumed")) == set()


def test_training_that_makes_it_worse_is_not_kept(olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    init = Training.__init__
    monkeypatch.setattr(Training, "__init__", lambda self, students: init(self, students, rate=50.0, sign_rate=50.0))
    run(olmoe, tmp_path / "plain")
    report = run(olmoe, tmp_path / "recovered", **RECOVERED)
    assert all(after == before for before, after in report["recover"].values())
    assert changed(tensors(tmp_path / "plain"), tensors(tmp_path / "recovered")) == set()


def test_logits_are_refined_after_the_layers_were(olmoe: Path, tmp_path: Path) -> None:
    run(olmoe, tmp_path / "recovered", **RECOVERED)
    report = run(olmoe, tmp_path / "both", refine=True, refine_steps=60, **RECOVERED)
    losses = report["refine"]["nats_per_token"]
    assert losses[-1] < losses[0]
    assert {"codes"} <= changed(tensors(tmp_path / "recovered"), tensors(tmp_path / "both")) <= CONTINUOUS


def test_minutes_end_it_before_its_steps_do(olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    step = Training.step
    monkeypatch.setattr(Training, "step", lambda self, number, share: (steps.append(number), step(self, number, share)))
    run(olmoe, tmp_path / "recovered", recover=True, recover_steps=100_000, recover_minutes=0.02)
    assert 0 < len(steps) < 1000


def test_an_error_that_is_not_finite_is_told(olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise._Block, "mean_error", lambda self, numbers: float("nan"))
    with pytest.raises(CalibrationError, match="error of the packed layer is nan, wanted a finite number"):
        run(olmoe, tmp_path / "packed", **RECOVERED)


@pytest.mark.parametrize("architecture", ["gpt_oss", "nemotron_h", "qwen2_moe"])
def test_other_architectures_recover(architecture: str, tmp_path: Path) -> None:
    source = save_tiny(architecture, tmp_path / "source")
    report = run(source, tmp_path / "packed", **RECOVERED)
    assert all(after <= before for before, after in report["recover"].values())
    assert any(after < 0.97 * before for before, after in report["recover"].values())
