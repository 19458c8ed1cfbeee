"""A checkpoint of trellis codes: as large as asked, loads, computes what its matrices say, and is the same every time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.tiny import save_tiny
from transformers import AutoModelForCausalLM

import moebius
from moebius.kernels import choice


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("bits", [1.5, 2.0, 3.0])
def test_a_checkpoint_keeps_its_budget_and_runs(bits: float, tmp_path: Path) -> None:
    original = save_tiny("olmoe", tmp_path / "model")
    recipe = moebius.Recipe.make("moebius", bits, codes="trellis")
    calibration = moebius.CalibrationSettings(windows=4, window_length=32)
    for out in ("one", "two"):
        moebius.quantize_model(original, tmp_path / out, recipe, calibration)
    stored, again = (all_tensors(tmp_path / out) for out in ("one", "two"))
    assert stored.keys() == again.keys() and all(torch.equal(stored[name], again[name]) for name in stored)
    assert any(name.endswith("factor.codes") for name in stored)
    experts = {name: tensor for name, tensor in all_tensors(original).items() if ".experts." in name}
    size = 8 * sum(t.numel() * t.element_size() for name, t in stored.items() if ".experts." in name)
    weights = sum(t.numel() for t in experts.values())
    assert 0.9 * bits < size / weights <= bits
    ids = torch.arange(16).unsqueeze(0)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype=torch.float32)
    plain = moebius.dequantize(AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype=torch.float32))
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, plain(ids).logits, rtol=0.05, atol=0.05)


def test_it_says_that_it_runs_the_slow_way(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    original = save_tiny("olmoe", tmp_path / "model")
    calibration = moebius.CalibrationSettings(windows=2, window_length=16)
    for codes in ("planes", "trellis"):
        recipe = moebius.Recipe.make("moebius", 2, codes=codes)
        moebius.quantize_model(original, tmp_path / codes, recipe, calibration)
    ids = torch.arange(8).unsqueeze(0)
    told = {}
    for codes in ("planes", "trellis"):
        choice.tell_once.cache_clear()
        caplog.clear()
        model = AutoModelForCausalLM.from_pretrained(tmp_path / codes, dtype=torch.float32)
        with torch.no_grad():
            model(ids)
            model(ids)
        told[codes] = [r.getMessage() for r in caplog.records if r.name == "moebius.kernels" and r.levelname == "WARNING"]
    assert told["planes"] == []
    assert len(told["trellis"]) == 1 and "slow" in told["trellis"][0]
