"""Shapes have the weights of the models they are named after, and random checkpoints of a shape are what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import tiny_config
from transformers import AutoModelForCausalLM, PretrainedConfig

import moebius  # noqa: F401  registers packed checkpoints
from moebius.checkpoint.manifest import verify
from moebius.errors import UnknownNameError
from moebius.evaluate.plan import checkpoint_size, plan_model
from moebius.evaluate.random_checkpoint import write_random_checkpoint
from moebius.evaluate.shapes import SHAPES, shape_config, with_layers
from moebius.evaluate.size import packed_checkpoint_size
from moebius.models.load import skeleton
from moebius.recipe import CalibrationSettings, Recipe

#: What the hub says of the published checkpoints.
PUBLISHED = {
    "olmoe-1b-7b": 6_919_161_856,
    "qwen1.5-moe": 14_315_784_192,
    "qwen3-30b-a3b": 30_532_122_624,
    "mixtral-8x7b": 46_702_792_704,
}
ARCHITECTURES = ("olmoe", "qwen2_moe", "qwen3_moe", "mixtral")


def tiny(name: str, **overrides: Any) -> PretrainedConfig:
    config = tiny_config(name, **overrides)
    config.dtype = torch.bfloat16
    return config


@pytest.mark.parametrize("name", SHAPES)
def test_weights_are_those_of_the_published_model(name: str) -> None:
    model = skeleton(shape_config(name)).model
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_unknown_shape() -> None:
    with pytest.raises(UnknownNameError, match=r"no shape named 'gpt-9'; known: olmoe-1b-7b, qwen1\.5-moe"):
        shape_config("gpt-9")


def test_fewer_layers_keep_what_is_said_of_each() -> None:
    config = shape_config("qwen1.5-moe")
    shorter = with_layers(config, 5)
    assert (config.num_hidden_layers, shorter.num_hidden_layers, len(shorter.layer_types)) == (24, 5, 5)
    assert len(skeleton(shorter).moe_layers) == 5


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("method", ["moebius", "mobie"])
def test_a_packed_one_loads_and_runs(tmp_path: Path, name: str, method: str) -> None:
    config, recipe = tiny(name), Recipe.make(method, None, rest="int8", shared_experts=4)
    write_random_checkpoint(config, tmp_path, recipe)
    verify(tmp_path, hashes=True)
    planned, got = plan_model(config, recipe, CalibrationSettings()).after, packed_checkpoint_size(tmp_path)
    assert got.bits == planned.bits and got.weights == planned.weights
    assert {m.name for m in got.modules} == {m.name for m in planned.modules}
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["recipe"]["method"] == method
    logits(tmp_path)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_original_loads_and_runs(tmp_path: Path, name: str) -> None:
    config = tiny(name)
    write_random_checkpoint(config, tmp_path)
    assert checkpoint_size(tmp_path).bits == plan_model(config, Recipe.make("rtn"), CalibrationSettings()).before.bits
    logits(tmp_path)


def test_tied_tables_are_stored_once(tmp_path: Path) -> None:
    write_random_checkpoint(tiny("olmoe", tie_word_embeddings=True), tmp_path)
    names = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    logits(tmp_path)


def test_the_seed_decides_the_bytes(tmp_path: Path) -> None:
    contents = []
    for number, seed in enumerate((1, 1, 2)):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_random_checkpoint(tiny("olmoe"), folder, Recipe.make("moebius"), seed=seed)
        contents.append([file.read_bytes() for file in sorted(folder.glob("*.safetensors"))])
    assert contents[0] == contents[1] != contents[2]


def logits(folder: Path) -> None:
    """That a checkpoint has every tensor of its model, and that its logits are finite and differ."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.inference_mode():
        got = model.eval()(torch.arange(40)[None]).logits
    assert got.isfinite().all()
    assert got.std() > 1e-3 and not torch.equal(got[0, 3], got[0, 4])
