"""Methods from checkpoint to transformers, on a model without biases, one with biases of its own and one without gates."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from tests.tiny import save_tiny
from transformers import AutoModelForCausalLM

import moebius
from moebius.errors import UnsupportedModelError
from moebius.pipeline import quantize_model
from moebius.recipe import CalibrationSettings, Recipe

CALIBRATION = CalibrationSettings(windows=4, window_length=32)
IDS = torch.arange(2, 42).view(2, 20)


@pytest.mark.parametrize(
    ("architecture", "method", "bits"),
    [
        *itertools.product(["olmoe", "gpt_oss"], ["gptvq", "kbvq", "vptq", "nowag", "billm", "arb"], [1]),
        *itertools.product(["olmoe", "gpt_oss", "nemotron_h"], ["awq", "mxmoe"], [3]),
        *itertools.product(["olmoe", "gpt_oss"], ["moequant"], [3]),
        *itertools.product(["olmoe", "gpt_oss"], ["bitsmoe"], [8]),
        *itertools.product(["olmoe", "gpt_oss", "nemotron_h"], ["moebius"], [3]),
    ],
)
def test_packed_models_run_and_mean_what_their_plain_form_means(
    architecture: str, method: str, bits: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOEBIUS_KERNEL", "reference")  # the others round activations
    save_tiny(architecture, tmp_path / "source")
    quantize_model(tmp_path / "source", tmp_path / "packed", Recipe.make(method, bits), CALIBRATION)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    with torch.no_grad():
        before = packed(IDS).logits
        assert before.isfinite().all()
        if method == "kbvq" and architecture == "olmoe":
            with pytest.raises(UnsupportedModelError, match="bcos=variance"):
                moebius.dequantize(packed)
            return
        moebius.dequantize(packed)
        assert (before - packed(IDS).logits).norm() <= 1e-4 * before.norm()
