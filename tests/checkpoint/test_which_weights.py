"""Which files and which tensors are the weights: transformers' own rule, and what is quantized already is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import save_tiny, tiny_model
from transformers import AutoModelForCausalLM

import moebius
from moebius.checkpoint.names import tied_copies
from moebius.checkpoint.reader import SourceCheckpoint
from moebius.errors import CheckpointError, MoebiusError, UnsupportedModelError
from moebius.evaluate.plan import checkpoint_size, plan_model
from moebius.models.load import skeleton
from moebius.recipe import CalibrationSettings, Recipe

RTN = Recipe.make("rtn", 8)
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("olmoe", tmp_path_factory.mktemp("weights") / "olmoe")


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


def quantize(source: Path, out: Path) -> Path:
    moebius.quantize_model(source, out, RTN, CalibrationSettings())
    return out


def configure(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config = {name: value for name, value in {**config, **fields}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def rewrite(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_one_file_goes_before_an_index(copy: Path, tmp_path: Path) -> None:
    """As transformers has it; the index and its shards are another model's."""
    tiny_model("olmoe", seed=7).to(torch.bfloat16).save_pretrained(tmp_path / "old", max_shard_size="40KB")
    for path in (tmp_path / "old").glob("*.safetensors*"):
        shutil.copy(path, copy)
    loaded = AutoModelForCausalLM.from_pretrained(copy).state_dict()
    checkpoint = SourceCheckpoint.open(copy)
    assert [path.name for path in checkpoint.files] == ["model.safetensors"]
    assert torch.equal(checkpoint.load("lm_head.weight"), loaded["lm_head.weight"])
    (copy / "model.safetensors").unlink()
    assert len(SourceCheckpoint.open(copy).files) > 1


def test_weights_that_the_config_names(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "other.safetensors")
    configure(copy, transformers_weights="other.safetensors")
    assert SourceCheckpoint.open(copy).files == (copy / "other.safetensors",)
    for wrong in ("../olmoe/model.safetensors", "model.bin", 3, "gone.safetensors"):
        configure(copy, transformers_weights=wrong)
        with pytest.raises(CheckpointError, match="names the weights"):
            SourceCheckpoint.open(copy)


@pytest.mark.parametrize("file", ["../olmoe/model.safetensors", "/etc/passwd", "a\0.safetensors", 3, None, "x.bin"])
def test_shards_outside_the_folder(copy: Path, file: Any) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": file}}))
    with pytest.raises(CheckpointError, match="names the shard"):
        SourceCheckpoint.open(copy)


def test_scales_that_only_the_index_remembers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_model("olmoe").to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="40KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = "model.layers.0.mlp.experts.0.gate_proj.weight"
    content["weight_map"][f"{name}_scale_inv"] = content["weight_map"][name]
    index.write_text(json.dumps(content))
    assert SourceCheckpoint.open(tmp_path).names() == sorted(content["weight_map"].keys() - {f"{name}_scale_inv"})
    assert f"{name}_scale_inv" in caplog.text
    content["weight_map"]["model.layers.9.mlp.gate.weight"] = content["weight_map"][name]
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"layers\.9\.mlp\.gate\.weight is not in it"):
        SourceCheckpoint.open(tmp_path)


ATTENTION, EXPERT = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.experts.3.up_proj.weight"


def float8(tensors: Tensors, name: str, dtype: torch.dtype, keep_scale: bool) -> None:
    scale = tensors[name].float().abs().max() / 448
    codes = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
    tensors[name] = codes if dtype == torch.float8_e4m3fn else codes.to(dtype) if dtype.is_floating_point else codes.view(dtype)
    if keep_scale:
        tensors[f"{name}_scale_inv"] = scale.reshape(1, 1)


STRIPPED: dict[str, Callable[[Tensors], object]] = {
    "float8, scales gone": lambda t: float8(t, EXPERT, torch.float8_e4m3fn, False),
    "float8 in attention, scales gone": lambda t: float8(t, ATTENTION, torch.float8_e4m3fn, False),
    "float8 as bytes": lambda t: float8(t, EXPERT, torch.uint8, True),
    "float8 codes as bfloat16": lambda t: float8(t, EXPERT, torch.bfloat16, True),
    "mxfp4": lambda t: t.update({"model.layers.0.mlp.experts.gate_up_proj_blocks": torch.zeros(8, 4, 4, dtype=torch.uint8)}),
    "gptq": lambda t: t.update({"model.layers.0.self_attn.q_proj.qweight": torch.zeros(6, 48, dtype=torch.int32)}),
    "int8": lambda t: t.update({ATTENTION: t[ATTENTION].to(torch.int8)}),
}


@pytest.mark.parametrize("how", STRIPPED)
def test_codes_without_a_config(copy: Path, tmp_path: Path, how: str) -> None:
    rewrite(copy, STRIPPED[how])
    refuses: list[Callable[[], object]] = [
        lambda: quantize(copy, tmp_path / "out"),
        lambda: plan_model(copy, RTN, CalibrationSettings()),
        lambda: checkpoint_size(copy),
    ]
    for refused in refuses:
        with pytest.raises(UnsupportedModelError, match="dequantize it first"):
            refused()
    assert not (tmp_path / "out").exists()


LEFT_OVER: list[dict[str, Any]] = [
    {"quantization_config": {"quant_method": "gptq"}},
    {"draft_config": {"quantization_config": {"quant_method": "awq"}}},
]


@pytest.mark.parametrize("fields", LEFT_OVER)
def test_configs_are_believed_where_there_are_no_tensors(copy: Path, fields: dict[str, Any]) -> None:
    before = plan_model(copy, RTN, CalibrationSettings()).to_dict()
    configure(copy, **fields)
    assert plan_model(copy, RTN, CalibrationSettings()).to_dict() == before, "its weights are of 16 bit"
    with pytest.raises(MoebiusError, match="is quantized already") as caught:
        plan_model(copy / "config.json", RTN, CalibrationSettings())
    assert "\n" not in str(caught.value)


def test_masks_and_unused_scales_are_no_codes(copy: Path) -> None:
    mask, scale = torch.ones(4, 4, dtype=torch.uint8), torch.ones(1, 1)
    rewrite(copy, lambda t: t.update({"model.mask.bias": mask, f"{EXPERT}_scale_inv": scale}))
    assert f"{EXPERT}_scale_inv" in SourceCheckpoint.open(copy).names()


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_the_stored_dtype_decides(copy: Path, original: Path, tmp_path: Path, dtype: str | None) -> None:
    """Weights of bfloat16 that float16 does not hold, under a config that says float16 or nothing."""
    for folder in (copy, shutil.copytree(original, tmp_path / "honest")):
        rewrite(folder, lambda t: t[EXPERT].mul_(2.0**20))
    wanted = quantize(tmp_path / "honest", tmp_path / "wanted")
    honest = checkpoint_size(copy), plan_model(copy, RTN, CalibrationSettings()).before
    configure(copy, dtype=dtype, torch_dtype=None)
    for got, before in zip((checkpoint_size(copy), plan_model(copy, RTN, CalibrationSettings()).before), honest, strict=True):
        assert (got.expert_bits, got.other_bits) == (before.expert_bits, before.other_bits)
        assert got.bits_per_expert_weight == 16
    found = quantize(copy, tmp_path / "found")
    for path in wanted.glob("packed-*.safetensors"):
        assert (found / path.name).read_bytes() == path.read_bytes()
    assert json.loads((found / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(found).dtype == torch.bfloat16


def test_infinities_are_legal_where_they_are_copied(copy: Path, tmp_path: Path) -> None:
    rewrite(copy, lambda t: t["lm_head.weight"][0].fill_(float("-inf")))
    out = quantize(copy, tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(out).lm_head.weight[0, 0] == -float("inf")
    recipe = Recipe.make("rtn", 8, rest="int8")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight holds 48 values"):
        moebius.quantize_model(copy, tmp_path / "rest", recipe, CalibrationSettings())
    rewrite(copy, lambda t: t["lm_head.weight"][0].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight holds 48 values"):
        quantize(copy, tmp_path / "nan")


def test_a_tied_head_is_copied_once(tmp_path: Path) -> None:
    folder = save_tiny("olmoe", tmp_path / "tied", tie_word_embeddings=True)
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    out = quantize(folder, tmp_path / "out")
    names = {n for path in out.glob("*.safetensors") for n in load_file(path)}
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    assert AutoModelForCausalLM.from_pretrained(out).lm_head.weight.std() > 0
    rewrite(folder, lambda t: t["lm_head.weight"].add_(1))
    assert tied_copies(SourceCheckpoint.open(folder), skeleton(folder).model) == set(), "another matrix is no copy"
