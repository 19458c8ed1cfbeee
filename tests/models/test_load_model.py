"""Models are loaded, their parts named, and what cannot be used is refused with one clear line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from tests.tiny import ARCHITECTURES, save_tiny, tiny_model
from torch import nn
from transformers import JetMoeConfig, LlamaConfig, LlamaForCausalLM

from moebius.errors import CheckpointError, CoverageError, ModelNotFoundError, UnsupportedModelError
from moebius.models.load import check_coverage, describe, load_moe_model, skeleton
from moebius.types import MoeModel

_GATED = ("gate_proj", "up_proj", "down_proj")

#: Experts, router, shared experts and dense MLPs, as the sources of transformers have them.
WANTED: dict[str, tuple[list[str], str, list[str], list[str]]] = {
    "olmoe": (["0.mlp", "1.mlp"], "gate", [], []),
    "qwen2_moe": (["0.mlp", "2.mlp"], "gate", [f"{i}.mlp.shared_expert.{n}" for i in (0, 2) for n in _GATED], ["1.mlp"]),
    "qwen3_moe": (["0.mlp", "1.mlp"], "gate", [], []),
    "qwen3_next": (["0.mlp", "1.mlp"], "gate", [f"{i}.mlp.shared_expert.{n}" for i in (0, 1) for n in _GATED], []),
    "deepseek_v2": (["1.mlp", "2.mlp"], "gate", [f"{i}.mlp.shared_experts.{n}" for i in (1, 2) for n in _GATED], ["0.mlp"]),
    "gpt_oss": (["0.mlp", "1.mlp"], "router", [], []),
    "mixtral": (["0.mlp", "1.mlp"], "gate", [], []),
    "ernie4_5_moe": (["1.mlp", "2.mlp"], "gate", [f"{i}.mlp.shared_experts.{n}" for i in (1, 2) for n in _GATED], ["0.mlp"]),
    "nemotron_h": (
        ["1.mixer", "4.mixer"],
        "gate",
        [f"{i}.mixer.shared_experts.{n}" for i in (1, 4) for n in _GATED[1:]],
        ["3.mixer"],
    ),
    "jamba": (["1.feed_forward", "3.feed_forward"], "router", [], ["0.feed_forward", "2.feed_forward"]),
}


def expert_matrices(moe: MoeModel) -> list[str]:
    names = [(layer, n) for layer in moe.moe_layers for n in (layer.layout.gate_up_name, layer.layout.down_name)]
    return [f"{layer.name}.{n}" for layer, n in names]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parts_are_named(name: str) -> None:
    model = tiny_model(name)
    for moe in (describe(model), skeleton(model.config)):
        blocks, router, shared, dense = WANTED[name]
        assert moe.decoder_name == "model.layers"
        assert moe.decoder is moe.model.get_submodule("model.layers")
        assert [layer.name for layer in moe.moe_layers] == [f"model.layers.{b}.experts" for b in blocks]
        assert [layer.router_name for layer in moe.moe_layers] == [f"model.layers.{b}.{router}" for b in blocks]
        assert [layer.decoder_layer for layer in moe.moe_layers] == [int(b[0]) for b in blocks]
        assert moe.shared_experts == tuple(f"model.layers.{path}" for path in shared)
        linears = _GATED[1:] if name == "nemotron_h" else _GATED
        assert moe.dense_mlps == tuple(f"model.layers.{block}.{n}" for block in dense for n in linears)
        for layer in moe.moe_layers:
            assert layer.router is not None
            assert layer.router.get_parameter("weight").shape == (8, 48)


def test_skeleton_takes_no_memory(tmp_path: Path) -> None:
    folder = save_tiny("gpt_oss", tmp_path)
    for source in (folder, folder / "config.json", str(folder)):
        assert {p.device.type for p in skeleton(source).model.parameters()} == {"meta"}


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "nemotron_h"])
def test_saved_model_loads_as_it_was(name: str, tmp_path: Path) -> None:
    moe = load_moe_model(save_tiny(name, tmp_path, dtype=torch.float32))
    ids = torch.arange(32).view(2, 16)
    with torch.no_grad():
        assert torch.equal(moe.model(input_ids=ids).logits, tiny_model(name)(input_ids=ids).logits)
    assert not moe.model.training
    bf16 = load_moe_model(save_tiny(name, tmp_path / "bf16"))
    assert bf16.moe_layers[0].experts.get_parameter("down_proj").dtype == torch.bfloat16


def test_dense_model_is_refused() -> None:
    config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM is a dense model"):
        describe(LlamaForCausalLM(config))


def test_experts_without_flags_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"looks like experts, but its class lacks transformers' flags"):
        skeleton(JetMoeConfig(num_hidden_layers=1))


def test_missing_folder(tmp_path: Path) -> None:
    for source in (tmp_path / "nothing", str(tmp_path / "nothing"), "./nothing"):
        with pytest.raises(ModelNotFoundError, match="no such file or folder"):
            load_moe_model(source)
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        load_moe_model(tmp_path)


def test_unknown_hub_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match="neither a folder here nor a model that can be fetched") as caught:
        load_moe_model("moebius-tests/no-such-model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        ("{", CheckpointError, "not a JSON object"),
        ("[]", CheckpointError, "not a JSON object"),
        ("{}", CheckpointError, "no model_type"),
        ('{"model_type": "no_such_type"}', UnsupportedModelError, "cannot read its config"),
        ('{"model_type": "vit"}', UnsupportedModelError, "not a causal language model"),
    ],
)
def test_bad_config(text: str, error: type[Exception], match: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(error, match=match) as caught:
        load_moe_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_broken_weights(tmp_path: Path) -> None:
    folder = save_tiny("olmoe", tmp_path)
    shard = folder / "model.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="cannot read its weights"):
        load_moe_model(folder)
    shard.unlink()
    with pytest.raises(CheckpointError, match="cannot read its weights"):
        load_moe_model(folder)


def test_missing_tensor(tmp_path: Path) -> None:
    folder = save_tiny("olmoe", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"tensors are missing, such as model\.layers\.2"):
        load_moe_model(folder)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_coverage(name: str) -> None:
    moe = describe(tiny_model(name))
    matrices = expert_matrices(moe)
    check_coverage(moe, matrices)
    for left_out in matrices:
        with pytest.raises(CoverageError, match=f"1 expert parameters were not quantized: {re.escape(left_out)}"):
            check_coverage(moe, [n for n in matrices if n != left_out])


def test_coverage_finds_experts_by_any_name() -> None:
    """A matrix per expert that no flag speaks of, and a whole second tower, are both found."""
    moe = describe(tiny_model("olmoe"))
    matrices = expert_matrices(moe)
    block = moe.model.get_submodule("model.layers.0.mlp")
    block.register_parameter("lora", nn.Parameter(torch.zeros(8, 4, 4)))
    with pytest.raises(CoverageError, match=r"model\.layers\.0\.mlp\.lora"):
        check_coverage(moe, matrices)
    del block.lora
    moe.model.add_module("head", tiny_model("olmoe").get_submodule("model.layers.0.mlp"))
    with pytest.raises(CoverageError, match=r"2 expert parameters .*: head\.experts\.gate_up_proj, head\.experts\.down_proj"):
        check_coverage(moe, matrices)
    again = describe(moe.model)
    assert [layer.name for layer in again.moe_layers] == [layer.name for layer in moe.moe_layers]
