"""`moebius` from checkpoint to transformers: one budget for the whole model, two passes, the same bytes after a stop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.tiny import save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from moebius.calibrate.tokens import calibration_windows
from moebius.checkpoint.writer import CheckpointWriter
from moebius.errors import CalibrationError
from moebius.evaluate.evaluation import evaluate_model
from moebius.evaluate.size import packed_checkpoint_size
from moebius.pipeline import quantize_model
from moebius.pipeline.refine import refine
from moebius.recipe import CalibrationSettings, Recipe
from moebius.reference_model import reference_path
from moebius.types import MoeModel

CALIBRATION = CalibrationSettings(windows=4, window_length=32)

REFINED = {"refine": True, "refine_steps": 30}
TRAINED = {"codes", "entry_codes", "entry_grids", "direction_codes", "direction_grids"}


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


def test_what_matters_most_wants_more_than_four_planes(tmp_path: Path) -> None:
    """At three bits, on held-out windows: nearer than four planes allow, and than what BitsMoE makes of as many bits."""
    calibration = CalibrationSettings(windows=16, window_length=64)
    held_out = calibration_windows(replace(calibration, split="held-out"), AutoTokenizer.from_pretrained(reference_path()))
    original = AutoModelForCausalLM.from_pretrained(reference_path(), dtype=torch.float32)
    recipes = {
        "default": Recipe.make("moebius", 3),
        "four": Recipe.make("moebius", 3, planes=4),
        "bitsmoe": Recipe.make("bitsmoe", 3),
    }
    divergence = {}
    for name, recipe in recipes.items():
        quantize_model(reference_path(), tmp_path / name, recipe, calibration)
        assert packed_checkpoint_size(tmp_path / name).bits_per_expert_weight <= 3
        packed = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        divergence[name] = evaluate_model(packed, held_out, reference=original).kl
    assert 2 * divergence["default"] < min(divergence["four"], divergence["bitsmoe"])


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


def test_refined_logits_are_nearer_in_as_many_bytes(tmp_path: Path) -> None:
    """On held-out windows, not those that it was trained on; and twice the same bytes."""
    calibration = CalibrationSettings(windows=16, window_length=64)
    held_out = calibration_windows(replace(calibration, split="held-out"), AutoTokenizer.from_pretrained(reference_path()))
    original = AutoModelForCausalLM.from_pretrained(reference_path(), dtype=torch.float32)
    divergence, size = {}, {}
    for name, options in {"plain": {}, "refined": REFINED, "again": REFINED}.items():
        recipe = Recipe.make("moebius", 0.5, **options)
        report = quantize_model(reference_path(), tmp_path / name, recipe, calibration)
        packed = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        divergence[name] = evaluate_model(packed, held_out, reference=original).kl
        size[name] = sum(path.stat().st_size for path in (tmp_path / name).glob("*.safetensors"))
        assert ("refine" in report) == (name != "plain")
    assert divergence["refined"] < 0.97 * divergence["plain"]
    assert size["refined"] == size["plain"]
    assert files_of(tmp_path / "refined") == files_of(tmp_path / "again")


def test_refinement_leaves_everything_but_scales_and_bases_alone(tmp_path: Path) -> None:
    for name, options in {"plain": {}, "refined": REFINED}.items():
        quantize_model(reference_path(), tmp_path / name, Recipe.make("moebius", 1, **options), CALIBRATION)
    plain, refined = (
        {key: t for file in (tmp_path / name).glob("*.safetensors") for key, t in load_file(file).items()}
        for name in ("plain", "refined")
    )
    changed = {name.rpartition(".")[2] for name in plain if not torch.equal(plain[name], refined[name])}
    assert {"codes", "entry_codes", "direction_codes"} <= changed <= TRAINED


def test_a_refinement_that_was_stopped_is_done_again(olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe.make("moebius", 2, **REFINED)
    quantize_model(olmoe, tmp_path / "whole", recipe, CALIBRATION)
    write = CheckpointWriter.write_layer

    def stop_at_the_second(self: CheckpointWriter, name: str, *rest: object) -> None:
        if self.entries():
            raise KeyboardInterrupt
        write(self, name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "write_layer", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            quantize_model(olmoe, tmp_path / "resumed", recipe, CALIBRATION)
    packed_again: list[str] = []
    keep_layer = CheckpointWriter.keep_layer
    monkeypatch.setattr(
        CheckpointWriter, "keep_layer", lambda self, name, *rest: (packed_again.append(name), keep_layer(self, name, *rest))
    )
    quantize_model(olmoe, tmp_path / "resumed", recipe, CALIBRATION)
    assert packed_again == []
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "resumed")


def test_a_divergence_that_is_not_finite_stops_the_refinement(
    olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moebius.pipeline.refine._backward", lambda *given: float("nan"))
    with pytest.raises(CalibrationError, match="divergence of nan at step 1, wanted a finite number"):
        quantize_model(olmoe, tmp_path / "packed", Recipe.make("moebius", 2, **REFINED), CALIBRATION)


@pytest.mark.parametrize("architecture", ["gpt_oss", "nemotron_h", "qwen2_moe"])
def test_other_architectures_can_be_refined(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def types(moe: MoeModel) -> list[torch.dtype]:
        return [parameter.dtype for parameter in moe.model.parameters()]

    def watched(moe: MoeModel, *given: Any, **options: Any) -> Any:
        before = types(moe)
        result = refine(moe, *given, **options)
        assert types(moe) == before and torch.bfloat16 in before
        return result

    monkeypatch.setattr("moebius.pipeline.job.refine", watched)
    save_tiny(architecture, tmp_path / "source")
    recipe = Recipe.make("moebius", 2, refine=True, refine_steps=12)
    report = quantize_model(tmp_path / "source", tmp_path / "packed", recipe, CALIBRATION)
    losses = report["refine"]["nats_per_token"]
    assert losses[-1] < losses[0]


def test_layers_that_the_budget_gives_nothing_are_named_and_put_out_zeros(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tiny("qwen3_moe", tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():  # nobody would miss what they put out
        model.model.layers[1].mlp.experts.down_proj *= 1e-3
    model.save_pretrained(source)
    report = quantize_model(source, tmp_path / "packed", Recipe.make("moebius", 0.5), CALIBRATION)
    named = [record.message for record in caplog.records if "gave nothing" in record.message]
    assert [entry.get("zero") for entry in report["layers"]] == [None, ["gate_up", "down"]]
    assert len(named) == 1 and "model.layers.1.mlp.experts (gate_up and down)" in named[0] and "layers.0" not in named[0]
    for backend in ("reference", ""):
        monkeypatch.setenv("MOEBIUS_KERNEL", backend)
        packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
        with torch.no_grad():
            assert packed(torch.arange(2, 42).view(2, 20)).logits.isfinite().all()
            experts, given = packed.model.layers[1].mlp.experts, torch.randn(3, 48, dtype=packed.dtype)
            assert not experts(given, torch.tensor([[0, 1]] * 3), torch.full((3, 2), 0.5)).any()
