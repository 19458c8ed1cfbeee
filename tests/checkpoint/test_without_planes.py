"""Layers that the budget gives nothing: their packed parts are empty, and are no guards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tests.tiny import byte_tokenizer, tiny_model
from transformers import AutoModelForCausalLM

from moebius.checkpoint.manifest import verify
from moebius.pipeline import quantize_model
from moebius.recipe import CalibrationSettings, Recipe


def test_a_layer_without_planes_verifies_and_loads(tmp_path: Path) -> None:
    model: Any = tiny_model("olmoe")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj.mul_(1e-4)
    model.save_pretrained(tmp_path / "original")
    byte_tokenizer().save_pretrained(tmp_path / "original")
    calibration = CalibrationSettings(windows=2, window_length=32)
    quantize_model(tmp_path / "original", tmp_path / "packed", Recipe.make("moebius", 1.0), calibration)
    modules = json.loads((tmp_path / "packed/config.json").read_text())["quantization_config"]["modules"]
    assert modules["model.layers.1.mlp.experts.down_proj"]["factor"]["live"] == 0
    verify(tmp_path / "packed", hashes=True)
    AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
