"""Quantized sources are read as the 16-bit weights they stand for: results are those of weights dequantized beforehand."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import save_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moebius.checkpoint import reader
from moebius.checkpoint.dequantized import DequantizedTensor
from moebius.checkpoint.reader import SourceCheckpoint
from moebius.errors import CheckpointError, UnsupportedModelError
from moebius.evaluate.plan import checkpoint_size, plan_model
from moebius.hf.loading import load_model
from moebius.pipeline import quantize_model
from moebius.recipe import CalibrationSettings, Recipe

CALIBRATION = CalibrationSettings(windows=2, window_length=32)
Tensors = dict[str, Tensor]
Stored = Callable[[str, Tensor], tuple[Tensors, Tensor]]  # from name and weight to what is stored, and what it stands for


def blocks(rows: int, columns: int, codes: torch.dtype = torch.float8_e4m3fn) -> Stored:
    """A scale for so many rows and columns; the blocks at the edges may be smaller."""

    def stored(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        down, across = -(-weight.shape[0] // rows), -(-weight.shape[1] // columns)
        scales, quantized, wanted = torch.empty(down, across), torch.empty(weight.shape, dtype=codes), torch.empty(weight.shape)
        for i in range(down):
            for j in range(across):
                part = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
                scales[i, j] = weight[part].float().abs().max() / 448
                quantized[part] = (weight[part].float() / scales[i, j]).to(codes)
                wanted[part] = quantized[part].float() * scales[i, j]
        return {name: quantized, f"{name}_scale_inv": scales}, wanted

    return stored


def rows_of(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    """compressed-tensors: a scale per row."""
    scales = (weight.float().abs().amax(1, keepdim=True) / 448).to(torch.bfloat16)
    codes = (weight.float() / scales.float()).to(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale": scales}, codes.float() * scales.float()


def whole(shape: tuple[int, ...], end: str) -> Stored:
    def stored(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        scale = weight.float().abs().max() / 448
        codes = (weight.float() / scale).to(torch.float8_e4m3fn)
        scales = {name.removesuffix(".weight") + end: scale.reshape(shape)}
        return {name: codes, name.replace(".weight", ".input_scale"): torch.ones(1), **scales}, codes.float() * scale

    return stored


def exponents(dtype: torch.dtype) -> Stored:
    """MXFP8: a power of two for eight columns."""

    def stored(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        grouped = weight.float().unflatten(1, (-1, 8))
        powers = (grouped.abs().amax(2) / 448).log2().ceil()
        codes = (grouped / powers.exp2().unsqueeze(2)).to(torch.float8_e4m3fn)
        scales = (powers + 127).to(torch.uint8).view(dtype)
        return {name: codes.flatten(1), f"{name}_scale_inv": scales}, (codes.float() * powers.exp2().unsqueeze(2)).flatten(1)

    return stored


def int4(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    """compressed-tensors, pack-quantized: eight codes to a word."""
    grouped = weight.float().unflatten(1, (-1, 8))
    scales = (grouped.abs().amax(2) / 7).to(torch.bfloat16)
    codes = (grouped / scales.float().unsqueeze(2)).round().clamp(-8, 7) + 0.0  # no negative zero
    words = ((codes.long() + 8) << torch.arange(0, 32, 4)).sum(2)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).int()
    stored = {f"{name}_packed": words, f"{name}_scale": scales, f"{name}_shape": torch.tensor(weight.shape)}
    return stored, (codes * scales.float().unsqueeze(2)).flatten(1)


KINDS: dict[str, Stored] = {
    "blocks of 128": blocks(128, 128),
    "blocks of 16": blocks(8, 8),
    "float8 e5m2": blocks(128, 128, torch.float8_e5m2),
    "rows": rows_of,
    "whole, a number": whole((), ".weight_scale"),
    "whole, a vector": whole((1,), ".scale"),
    "whole, a matrix": whole((1, 1), ".qscale_weight"),
    "MXFP8, bytes": exponents(torch.uint8),
    "MXFP8, float8": exponents(torch.float8_e8m0fnu),
    "INT4": int4,
}


def configure(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def two_sources(folder: Path, how: Stored, **fields: Any) -> tuple[Path, Path]:
    """A quantized checkpoint, and its weights dequantized beforehand."""
    source, plain = (save_tiny("qwen3_moe", folder / name) for name in ("quantized", "plain"))
    stored, wanted = {}, {}
    for name, weight in load_file(source / "model.safetensors").items():
        if weight.ndim == 2 and name.endswith("_proj.weight"):
            tensors, value = how(name, weight)
            stored.update({key: tensor.contiguous() for key, tensor in tensors.items()})
            wanted[name] = value.to(torch.bfloat16)
        else:
            stored[name] = wanted[name] = weight.float() if name.endswith("mlp.gate.weight") else weight
    save_file(stored, source / "model.safetensors", {"format": "pt"})
    save_file(wanted, plain / "model.safetensors", {"format": "pt"})
    configure(source, **fields)
    return source, plain


def same_results(source: Path, plain: Path, out: Path, recipe: Recipe) -> dict[str, Any]:
    report = quantize_model(source, out / "a", recipe, CALIBRATION)
    quantize_model(plain, out / "b", recipe, CALIBRATION)
    names = {path.name for path in (out / "b").glob("*.safetensors")}
    assert {path.name for path in (out / "a").glob("*.safetensors")} == names
    for name in names:
        assert (out / "a" / name).read_bytes() == (out / "b" / name).read_bytes()
    configs = [json.loads((out / folder / "config.json").read_text()) for folder in "ab"]
    assert configs[0] == configs[1]
    assert AutoModelForCausalLM.from_pretrained(out / "a").dtype == torch.bfloat16
    return report


@pytest.mark.parametrize("kind", KINDS)
def test_the_result_is_that_of_weights_dequantized_beforehand(kind: str, tmp_path: Path) -> None:
    source, plain = two_sources(tmp_path, KINDS[kind], quantization_config={"quant_method": "fp8"})
    recipe = Recipe.make("moebius" if kind in ("blocks of 128", "INT4") else "rtn", 2)
    report = same_results(source, plain, tmp_path, recipe)
    assert sum(report["dequantized_from"].values()) == 2 * (4 + 3 * 8)
    wanted = load_file(plain / "model.safetensors")
    router = "model.layers.0.mlp.gate.weight"
    stored = {k: v for path in (tmp_path / "a").glob("*.safetensors") for k, v in load_file(path).items()}
    assert torch.equal(stored[router], wanted[router]) and stored[router].dtype == torch.float32


@pytest.mark.parametrize(
    "fields",
    [{}, {"draft_config": {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}}],
    ids=["no config", "nested config"],
)
def test_tensors_tell_and_no_config(fields: dict[str, Any], tmp_path: Path) -> None:
    source, plain = two_sources(tmp_path, blocks(128, 128))
    if fields:
        for folder in (source, plain):
            configure(folder, **fields)
    same_results(source, plain, tmp_path, Recipe.make("rtn", 4))
    assert "quantization_config" not in json.loads((tmp_path / "a" / "config.json").read_text()).get("draft_config", {})


def test_blocks_at_the_edges_are_smaller(tmp_path: Path) -> None:
    """300 x 200 in blocks of 128 has a third row of blocks of 44, and not three of 100."""
    weight = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    stored, wanted = blocks(128, 128)("x.weight", weight)
    assert stored["x.weight_scale_inv"].shape == (3, 2)
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "olmoe"}')
    assert torch.equal(SourceCheckpoint.open(tmp_path).load("x.weight"), wanted.to(torch.bfloat16))


def mxfp4_sources(folder: Path) -> tuple[Path, Path]:
    source, plain = (save_tiny("gpt_oss", folder / name, hidden_size=64, intermediate_size=96) for name in ("q", "p"))
    stored = load_file(source / "model.safetensors")
    wanted, generator = dict(stored), torch.Generator().manual_seed(0)
    for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = stored.pop(name).shape
        codes = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(119, 124, (experts, rows, columns // 32), generator=generator, dtype=torch.uint8)
        stored |= {f"{name}_blocks": codes, f"{name}_scales": scales}
        wanted[name] = convert_moe_packed_tensors(codes, scales)
    save_file(stored, source / "model.safetensors", {"format": "pt"})
    save_file(wanted, plain / "model.safetensors", {"format": "pt"})
    configure(source, quantization_config={"quant_method": "mxfp4"})
    return source, plain


def test_mxfp4_as_transformers_reads_it(tmp_path: Path) -> None:
    source, plain = mxfp4_sources(tmp_path)
    report = same_results(source, plain, tmp_path, Recipe.make("moebius", 2))
    assert report["dequantized_from"] == {"MXFP4": 4}
    for size in (checkpoint_size(source), plan_model(source, Recipe.make("rtn", 2), CALIBRATION).before):
        assert size.bits_per_expert_weight == 4.25
    assert checkpoint_size(plain).bits_per_expert_weight == 16


def test_a_config_left_over_is_told_and_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save_tiny("olmoe", tmp_path / "source")
    configure(folder, quantization_config={"quant_method": "mxfp4"})
    reader._say.cache_clear()
    with caplog.at_level(logging.WARNING):
        plan_model(folder, Recipe.make("rtn", 2), CALIBRATION)
        quantize_model(folder, tmp_path / "out", Recipe.make("rtn", 2), CALIBRATION)
    assert caplog.text.count("config.json says mxfp4, but the weights are not quantized: there is nothing to dequantize") == 1
    with pytest.raises(UnsupportedModelError, match=r"is quantized already \(mxfp4\); .*dequantize it first"):
        load_model(folder)  # transformers would go by the config


def test_scales_that_do_not_fit(tmp_path: Path) -> None:
    stored = {"x.weight": torch.zeros(30, 20).to(torch.float8_e4m3fn), "x.weight_scale_inv": torch.ones(4, 1)}
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "olmoe"}')
    with pytest.raises(CheckpointError, match=r"x\.weight is \(30, 20\), which its scales \(4, 1\) do not fit"):
        SourceCheckpoint.open(tmp_path)


def test_codes_that_are_not_read_are_refused(tmp_path: Path) -> None:
    stored, _ = int4("x.weight", torch.randn(8, 16))
    save_file({**stored, "x.weight_zero_point": torch.zeros(1, 2, dtype=torch.int32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "olmoe"}')
    with pytest.raises(UnsupportedModelError, match=r"x\.weight_packed is stored as I32, codes of a kind that is not read"):
        SourceCheckpoint.open(tmp_path)


def test_one_weight_in_memory_at_a_time(tmp_path: Path) -> None:
    source, _ = two_sources(tmp_path, blocks(128, 128))
    tensor = SourceCheckpoint.open(source).tensors["model.layers.0.self_attn.q_proj.weight"]
    assert isinstance(tensor, DequantizedTensor)
    assert tensor.end == 2 * 64 * 48 and tensor.stored_bytes == 64 * 48 + 4
    assert not any(isinstance(value, Tensor) for value in vars(tensor).values())
