"""Routers are found by what they are, and --rest takes the language model's linear layers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.families import tiny
from tests.tiny import byte_tokenizer, tiny_model
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from moebius.methods.linear import packed_linears
from moebius.models.load import describe
from moebius.models.parts import router_module
from moebius.pipeline import quantize_model
from moebius.recipe import CalibrationSettings, Recipe


def test_all_of_a_router_with_layers_of_its_own_stays() -> None:
    moe = describe(tiny("zaya"))
    gate = "model.layers.1.mlp.gate"
    assert moe.moe_layers[1].router_name == f"{gate}.router_mlp.out_proj"
    assert router_module(moe.moe_layers[1]) == gate
    packed = packed_linears(moe, Recipe.make("rtn", 8, rest="int8"))
    assert packed
    assert not [name for name in packed if ".gate." in name]
    assert {"down_proj", "fc1", "fc2"} <= {n.split(".")[-1] for n, m in moe.model.named_modules() if f"{gate}." in n}


def test_a_gate_as_tall_as_the_router_is_not_taken_for_it() -> None:
    model = tiny("gemma4_text")
    layers = model.model.layers  # type: ignore[union-attr]
    experts = layers[0].experts.down_proj.shape[0]
    for layer in layers:
        layer.per_layer_input_gate = nn.Linear(32, experts, bias=False)
        layer.self_attn.gate = nn.Linear(32, experts, bias=False)
    moe = describe(model)
    assert [layer.router_name for layer in moe.moe_layers] == [f"model.layers.{i}.router.proj" for i in range(4)]
    assert "model.layers.0.per_layer_input_gate" in moe.linears
    assert "model.layers.0.self_attn.gate" in moe.linears


def test_a_router_by_another_name_is_found_by_its_height() -> None:
    model: Any = tiny_model("olmoe")
    for layer in model.model.layers:
        layer.mlp.chooser = layer.mlp.gate
        del layer.mlp.gate
    assert [layer.router_name for layer in describe(model).moe_layers] == [f"model.layers.{i}.mlp.chooser" for i in (0, 1)]


@pytest.mark.parametrize("inside", [True, False])
def test_towers_are_not_rounded(inside: bool) -> None:
    """Beside the language model or within the module that holds its layers."""
    model: Any = tiny_model("olmoe")
    alone = describe(model).linears
    tower = AutoModel.from_config(tiny_model("mixtral").config)
    assert isinstance(tower, PreTrainedModel)
    owner = model.model if inside else model
    owner.tower = tower
    if not inside:
        owner.projector = nn.Linear(8, 8)
    owner.tower.layers = tower.layers[:1]
    assert describe(model).linears == alone
    assert "lm_head" in alone


@pytest.mark.parametrize("name", ["afmoe", "zaya"])
def test_a_binary_router_loads_in_families_that_initialize_theirs(name: str, tmp_path: Path) -> None:
    original = tiny(name)
    router = describe(original).moe_layers[0].router_name
    assert router is not None
    original.save_pretrained(tmp_path / "original")
    byte_tokenizer().save_pretrained(tmp_path / "original")
    calibration = CalibrationSettings(windows=2, window_length=32)
    quantize_model(tmp_path / "original", tmp_path / "packed", Recipe.make("rtn", 8, router="binary"), calibration)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    weight = model.get_submodule(router).weight
    assert isinstance(weight, torch.Tensor)
    levels = weight.abs()
    assert levels.unique().numel() > 1  # scaled rows and columns, and not what a constructor has put there
    assert bool(levels.isfinite().all())
