"""The whole path on tiny models: checkpoint in, packed checkpoint out, loaded by transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tests.tiny import ARCHITECTURES, save_tiny
from transformers import AutoModelForCausalLM

import moebius
from moebius.calibrate import states
from moebius.errors import CoverageError, OutputError
from moebius.pipeline import job, quantize_model, run
from moebius.pipeline.source import StreamedModel
from moebius.progress import Silent
from moebius.recipe import CalibrationSettings, Recipe

CALIBRATION = CalibrationSettings(windows=6, window_length=32)
IDS = torch.arange(2, 42).view(2, 20)


def quantize(source: Path, out: Path, method: str = "mobie", **options: object) -> dict:
    return quantize_model(source, out, Recipe.make(method, **options), CALIBRATION)


def logits_of(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Without guards, which hold nothing."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items() if t.numel()}


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "olmoe"
    save_tiny("olmoe", folder)
    return folder


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_becomes_a_packed_model_that_runs(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(architecture, tmp_path / "source")
    report = quantize(tmp_path / "source", tmp_path / "packed")
    # The kernels round the inputs of experts, to bytes where there are many: a hundredth, and these layers magnify it.
    for kernel, close in (("reference", 1e-4), ("", 5e-2)):
        monkeypatch.setenv("MOEBIUS_KERNEL", kernel)
        packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
        with torch.no_grad():
            before = packed(IDS).logits
            moebius.dequantize(packed)
            after = packed(IDS).logits
        assert before.isfinite().all()
        # Here and there a rounding makes a router choose another expert, and the position is another one from there on.
        near = (before - after).norm(dim=-1) <= close * after.norm(dim=-1)
        assert near.float().mean() >= (1.0 if kernel else 0.8)
    assert all(len(entry["tokens_per_expert"]) for entry in report["layers"])
    source, stored = stored_tensors(tmp_path / "source"), stored_tensors(tmp_path / "packed")
    untouched = source.keys() & stored.keys()
    assert untouched
    for name in untouched:
        assert torch.equal(source[name].view(torch.uint8), stored[name].view(torch.uint8)), name


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("rtn", {"bits": 1, "gain": True}),
        ("gptq", {"bits": 3}),
        ("mobie", {"side": "hidden", "gain": True}),
        ("mobie", {"cejd": False}),
    ],
)
def test_methods_shrink_the_experts_and_stay_close(olmoe: Path, tmp_path: Path, method: str, options: dict) -> None:
    quantize(olmoe, tmp_path / "packed", method, **options)
    original = AutoModelForCausalLM.from_pretrained(olmoe, dtype=torch.float32)
    packed = moebius.dequantize(AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32))
    for name, weight in original.named_parameters():
        if ".experts." in name:
            got = packed.get_parameter(name)
            # A sign says cos = 0.8 of a Gaussian; another expert's or a transposed matrix would say 0.
            cosine = torch.cosine_similarity(got.flatten(1), weight.flatten(1)).min()
            assert cosine > 0.6, name
    bytes_of = {f: sum(p.stat().st_size for p in f.glob("*.safetensors")) for f in (olmoe, tmp_path / "packed")}
    assert bytes_of[tmp_path / "packed"] < bytes_of[olmoe]


def test_two_runs_write_the_same_bytes(olmoe: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        quantize(olmoe, tmp_path / name)
    assert files_of(tmp_path / "first") == files_of(tmp_path / "second")


def test_a_stopped_run_resumes_and_writes_the_same_bytes(olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize(olmoe, tmp_path / "whole")
    written: list[str] = []
    write = run.CheckpointWriter.write_layer

    def stop_at_the_second(self: run.CheckpointWriter, name: str, *rest: object) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(name)
        write(self, name, *rest)

    monkeypatch.setattr(run.CheckpointWriter, "write_layer", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        quantize(olmoe, tmp_path / "resumed")
    assert not (tmp_path / "resumed").exists()

    seen: list[str] = []
    monkeypatch.setattr(
        run.CheckpointWriter, "write_layer", lambda self, name, *rest: (seen.append(name), write(self, name, *rest))
    )
    quantize(olmoe, tmp_path / "resumed")
    assert written[0] not in seen
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "resumed")
    assert not (tmp_path / ".resumed.partial").exists()


def test_shared_experts_dense_layers_and_router_on_request(tmp_path: Path) -> None:
    save_tiny("qwen2_moe", tmp_path / "source")
    quantize(tmp_path / "source", tmp_path / "packed", shared_experts=4, dense_layers=8, router="binary")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    kinds = {name.rsplit(".", 2)[-2] + "." + name.rsplit(".", 1)[-1]: spec for name, spec in config["modules"].items()}
    assert kinds["shared_expert.up_proj"]["bits"] == 4
    assert kinds["mlp.up_proj"]["bits"] == 8
    assert kinds["mlp.gate"]["format"] == "signs"
    assert logits_of(tmp_path / "packed").isfinite().all()


def test_the_router_is_not_touched_unless_asked(olmoe: Path, tmp_path: Path) -> None:
    quantize(olmoe, tmp_path / "packed")
    name = "model.layers.0.mlp.gate.weight"
    assert torch.equal(stored_tensors(olmoe)[name], stored_tensors(tmp_path / "packed")[name])


def test_the_coverage_gate_stops_a_run_that_forgets_a_layer(
    olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_model = run.open_model

    def forgets_the_last(checkpoint: run.SourceCheckpoint, device: str) -> StreamedModel:
        opened = open_model(checkpoint, device)
        return replace(opened, moe=replace(opened.moe, moe_layers=opened.moe.moe_layers[:-1]))

    monkeypatch.setattr(run, "open_model", forgets_the_last)
    with pytest.raises(CoverageError, match="gate_up_proj"):
        quantize(olmoe, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_a_full_output_folder_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep me")
    with pytest.raises(OutputError, match="not empty"):
        quantize(tmp_path / "there is no model here", tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep me"


def test_reported_bits_are_the_bytes_in_the_files(olmoe: Path, tmp_path: Path) -> None:
    report = quantize(olmoe, tmp_path / "packed")
    for entry in report["layers"]:
        stored = {n: t for n, t in stored_tensors(tmp_path / "packed").items() if n.startswith(entry["name"] + ".")}
        weights = sum(
            p.numel() for n, p in AutoModelForCausalLM.from_pretrained(olmoe).named_parameters() if n.startswith(entry["name"])
        )
        assert sum(8 * t.nbytes for t in stored.values()) == round(entry["bits"] * weights)


def test_progress_is_told_about_every_layer(olmoe: Path, tmp_path: Path) -> None:
    steps: list[tuple[str, str]] = []

    class Listener(Silent):
        def stage(self, name: str, total: int) -> None:
            self.name = name

        def advance(self, detail: str = "") -> None:
            steps.append((self.name, detail))

    quantize_model(olmoe, tmp_path / "packed", Recipe.make("mobie"), CALIBRATION, progress=Listener())
    backward = [detail for stage, detail in steps if stage == "calibration: backward"]
    assert backward == sorted(backward, reverse=True)
    assert len(backward) >= 2


def test_hidden_states_that_are_too_many_go_to_disk(olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize(olmoe, tmp_path / "memory")
    saved: list[Path] = []
    save = states.np.save
    monkeypatch.setattr(job, "STATES_IN_MEMORY", 1000)
    monkeypatch.setattr(states.np, "save", lambda file, values: (saved.append(Path(file.name)), save(file, values)))
    quantize(olmoe, tmp_path / "disk")
    assert saved and all(tmp_path in file.parents for file in saved)
    assert files_of(tmp_path / "memory") == files_of(tmp_path / "disk")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "memory"]


def test_headers_hold_no_time_or_place(olmoe: Path, tmp_path: Path) -> None:
    quantize(olmoe, tmp_path / "packed")
    for file in (tmp_path / "packed").glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            assert (shard.metadata() or {}).keys() <= {"format"}
