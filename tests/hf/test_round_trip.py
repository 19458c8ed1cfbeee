"""Packed checkpoints through transformers: loaded, generated with, saved, loaded again, dequantized."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.packed import save_packed_tiny
from tests.tiny import ARCHITECTURES
from transformers import AutoModelForCausalLM, MixtralForCausalLM, PreTrainedModel
from transformers.core_model_loading import Transpose, WeightConverter

import moebius
from moebius.checkpoint.manifest import verify
from moebius.errors import UnsupportedModelError
from moebius.models.load import describe
from moebius.runtime.packed_experts import PackedExpertsMixin


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)


def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids).logits


CASES = [(name, torch.float32) for name in ARCHITECTURES]
CASES += [(name, torch.bfloat16) for name in ("olmoe", "gpt_oss", "nemotron_h", "jamba")]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_round_trip(name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEBIUS_KERNEL", "reference")  # dequantized weights are compared with, and they are what it multiplies
    packed = save_packed_tiny(name, tmp_path, everything=True)
    assert verify(packed, hashes=True) > 0
    model = load(packed, dtype)
    wanted = logits(model)
    assert wanted.isfinite().all() and wanted.float().std() > 0.1
    assert model.dtype == dtype
    assert any(isinstance(module, PackedExpertsMixin) for module in model.modules())
    # What was packed is in memory as it is in the file, whatever dtype the model was asked for.
    state = model.state_dict()
    for module in json.loads((packed / "config.json").read_text())["quantization_config"]["modules"]:
        kept = {key.rpartition(".")[2]: t.dtype for key, t in state.items() if key.startswith(f"{module}.")}
        assert kept.pop("bias", dtype) == dtype
        assert kept.pop("e_score_correction_bias", None) in (None, torch.float32, dtype)
        assert {t for k, t in kept.items() if k != "e_score_correction_bias"} <= {torch.uint8, torch.float16, torch.float32}

    generated = model.generate(torch.tensor([[5, 6, 7]]), attention_mask=torch.ones(1, 3), max_new_tokens=4, do_sample=False)
    assert generated.shape == (1, 7)

    model.save_pretrained(tmp_path / "again")
    assert verify(tmp_path / "again", hashes=True) == len(model.state_dict()) - tied(model)
    assert torch.equal(logits(load(tmp_path / "again", dtype)), wanted), "a second load gives identical logits"

    plain = moebius.dequantize(model)
    close = 1e-5 if dtype == torch.float32 else 0.15
    got = logits(plain)
    assert (got - wanted).float().norm() < close * wanted.float().norm()
    assert not any("Packed" in type(module).__name__ for module in plain.modules())
    plain.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    ordinary = load(tmp_path / "plain", dtype)
    assert describe(ordinary).moe_layers
    assert torch.equal(logits(ordinary), got)


def tied(model: PreTrainedModel) -> int:
    return len(model.all_tied_weights_keys)


def test_tied_embeddings(tmp_path: Path) -> None:
    packed = save_packed_tiny("olmoe", tmp_path, tie_word_embeddings=True)
    model = load(packed)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_packed_tiny("mixtral", tmp_path_factory.mktemp("hf"))


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_map(packed: Path, device_map: Any) -> None:
    assert torch.equal(logits(load(packed, device_map=device_map)), logits(load(packed)))


def test_experts_implementation_does_not_matter(packed: Path) -> None:
    assert torch.equal(logits(load(packed, experts_implementation="eager")), logits(load(packed)))


def test_router_logits_are_recorded_with_a_packed_router(tmp_path: Path) -> None:
    model = load(save_packed_tiny("olmoe", tmp_path, everything=True))
    with torch.no_grad():
        outputs = model(torch.arange(6)[None], output_router_logits=True)
    assert [tuple(t.shape) for t in outputs.router_logits] == [(6, 8)] * 2


def test_copies_save_the_manifest_too(packed: Path, tmp_path: Path) -> None:
    model = copy.deepcopy(load(packed))
    model.save_pretrained(tmp_path / "copy", max_shard_size="50KB")
    assert verify(tmp_path / "copy", hashes=True) > 0
    assert len(list((tmp_path / "copy").glob("*.safetensors"))) > 1
    assert torch.equal(logits(load(tmp_path / "copy")), logits(load(packed)))


def test_memory_is_packed(packed: Path) -> None:
    """The model in memory takes what the files hold: no dense expert is kept anywhere."""
    stored = sum(p.stat().st_size for p in packed.glob("*.safetensors"))
    assert load(packed, torch.bfloat16).get_memory_footprint() < stored


def test_dequantize_refuses_a_plain_model(packed: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="not packed by Moebius"):
        moebius.dequantize(load(packed.parent / "source"))


@pytest.mark.parametrize(
    "program",
    [
        "import moebius, sys; assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys(); import transformers",
        "import transformers, moebius",
        "import moebius.hf.quantizer; moebius.register(); moebius.register()",
    ],
)
def test_registration_in_any_order(program: str) -> None:
    check = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m; print(m['moebius'].__name__)"
    done = subprocess.run([sys.executable, "-c", f"{program}\n{check}"], capture_output=True, text=True, check=False)
    assert done.stdout == "MoebiusQuantizer\n", done.stderr


def test_converters_for_fused_experts_leave_packed_tensors_alone(packed: Path) -> None:
    model = load(packed)
    fused = WeightConverter("mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj", [Transpose(1, 2)])
    other = WeightConverter("self_attn.qkv", "self_attn.fused", [Transpose(0, 1)])
    transforms = model.hf_quantizer.update_weight_conversions([fused, other], model)
    assert transforms == [fused, other] and not fused.was_used()
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert fused.rename_source_key(f"{name}.factor.signs") == (f"{name}.factor.signs", None)
    assert fused.rename_source_key(name) == (name, "mlp.experts.gate_up_proj")
    assert other.rename_source_key("self_attn.qkv") == ("self_attn.fused", "self_attn.qkv")


def test_modules_kept_in_float32_do_not_cast_packed_tensors(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MixtralForCausalLM, "_keep_in_fp32_modules_strict", {"experts", "input_layernorm"})
    model = load(packed, torch.bfloat16)
    assert model.model.layers[0].input_layernorm.weight.dtype == torch.float32
    assert model.state_dict()["model.layers.0.mlp.experts.down_proj.factor.scales"].dtype == torch.float16
