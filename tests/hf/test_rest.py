"""Models whose other linear layers are packed as well: written, loaded, run, unpacked again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.tiny import ARCHITECTURES, save_tiny
from transformers import AutoModelForCausalLM

from moebius.checkpoint.shards import read_folder
from moebius.hf.dequantize import dequantize
from moebius.kernels.choice import VARIABLE
from moebius.pipeline import quantize_model
from moebius.recipe import CalibrationSettings, Recipe
from moebius.runtime.packed_linear import PackedLinearMixin


def packed(name: str, folder: Path, rest: str) -> Path:
    source = save_tiny(name, folder / "source", dtype=torch.float32)
    quantize_model(source, folder / rest, Recipe.make("rtn", 8, rest=rest), CalibrationSettings())
    return folder / rest


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("rest", ["int8", "int4"])
def test_a_packed_model_computes_what_its_weights_say(
    name: str, rest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = packed(name, tmp_path, rest)
    ids = torch.randint(0, 250, (2, 12), generator=torch.Generator().manual_seed(0))
    monkeypatch.setenv(VARIABLE, "reference")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert any(isinstance(module, PackedLinearMixin) for module in model.modules())
    assert isinstance(model.lm_head, PackedLinearMixin)
    with torch.no_grad():
        got = model(ids).logits
        wanted = dequantize(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))(ids).logits
    assert torch.allclose(got, wanted, atol=1e-4 * float(wanted.abs().max()))


def test_the_kernels_stay_close_to_the_definition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, logits = packed("olmoe", tmp_path, "int8"), []
    ids = torch.randint(0, 250, (1, 3), generator=torch.Generator().manual_seed(0))
    for kernel in ("reference", ""):
        monkeypatch.setenv(VARIABLE, kernel)
        with torch.no_grad():
            logits.append(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits)
    assert float((logits[0] - logits[1]).norm() / logits[0].norm()) < 0.01


def test_no_weight_is_stored_twice(tmp_path: Path) -> None:
    folder = packed("olmoe", tmp_path, "int4")
    names = read_folder(folder).keys()
    assert "lm_head.codes" in names and not any(name.endswith("_proj.weight") or name == "lm_head.weight" for name in names)


def test_a_layer_that_was_loaded_anew_is_read_anew(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed("olmoe", tmp_path, "int8"), dtype=torch.float32)
    layer, inputs = model.lm_head, torch.ones(1, 48)
    before = layer(inputs)
    with torch.no_grad():
        layer.scales.mul_(2)
        assert torch.allclose(layer(inputs), 2 * before)
        layer.scales = layer.scales / 2
        assert torch.allclose(layer(inputs), before)


def test_gradients_pass_through_a_packed_layer(tmp_path: Path) -> None:
    layer = AutoModelForCausalLM.from_pretrained(packed("olmoe", tmp_path, "int8"), dtype=torch.float32).lm_head
    inputs = torch.randn(2, 48, generator=torch.Generator().manual_seed(0), requires_grad=True)
    layer(inputs).sum().backward()
    assert inputs.grad is not None and torch.allclose(inputs.grad[0], layer.weight.sum(0), atol=1e-4)
