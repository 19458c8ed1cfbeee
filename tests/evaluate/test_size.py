"""Bits are counted when they are stored, and the paper's average is what its formula says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moebius.checkpoint.manifest import is_packed
from moebius.errors import CheckpointError
from moebius.evaluate.size import ModelSize, ModuleSize, experts_per_token, packed_checkpoint_size, packed_module
from moebius.formats import PackedProjection
from moebius.formats.dense import Dense
from moebius.formats.integers import Integers
from moebius.formats.signs import Signs

EXPERTS, OUT, IN = 8, 24, 40


def packed_projection() -> PackedProjection:
    generator = torch.Generator().manual_seed(0)
    factor = Signs.pack(
        torch.rand(EXPERTS, OUT, IN, generator=generator) < 0.5,
        torch.rand(EXPERTS, OUT, generator=generator),
        torch.rand(EXPERTS, IN, generator=generator),
    )
    return PackedProjection(factor=factor, left=Dense.pack(torch.rand(1, OUT, OUT, generator=generator)))


def packed_folder(folder: Path, projection: PackedProjection) -> Path:
    name = "model.layers.0.mlp.experts.down_proj"
    router = Integers.pack(
        torch.zeros(1, EXPERTS, IN, dtype=torch.int64), torch.ones(1, EXPERTS, 1), None, bits=4, group_size=128
    )
    tensors = {f"{name}.{k}": t for k, t in projection.tensors().items()}
    tensors |= {f"model.layers.0.mlp.gate.{k}": t for k, t in router.tensors().items()}
    tensors["model.embed.weight"] = torch.zeros(100, IN, dtype=torch.bfloat16)
    tensors["model.layers.0.mlp.gate.e_score_correction_bias"] = torch.zeros(EXPERTS)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    modules = {name: projection.spec(), "model.layers.0.mlp.gate": router.spec()}
    config = {
        "num_experts_per_tok": 2,
        "quantization_config": {"quant_method": "moebius", "format_version": 1, "modules": modules},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_size_of_a_packed_checkpoint_is_what_its_files_hold(tmp_path: Path) -> None:
    projection = packed_projection()
    size = packed_checkpoint_size(packed_folder(tmp_path, projection))
    assert size.expert_weights == EXPERTS * OUT * IN
    # signs, row scales, column scales; the shared factor in 16 bit.
    signs, rows, columns, left = EXPERTS * OUT * 5 * 8, EXPERTS * OUT * 16, EXPERTS * IN * 16, OUT * OUT * 16
    assert size.expert_bits == signs + rows + columns + left
    assert size.bits_per_expert_weight == size.expert_bits / size.expert_weights
    router = EXPERTS * IN * 4 + EXPERTS * 16
    assert size.other_weights == 100 * IN + EXPERTS
    assert size.bits == size.expert_bits + router + 16 * 100 * IN + 32 * EXPERTS
    assert size.weights == size.expert_weights + EXPERTS * IN + 100 * IN + EXPERTS
    assert size.file_bytes == (tmp_path / "model.safetensors").stat().st_size
    assert size.folder_bytes == size.file_bytes + (tmp_path / "config.json").stat().st_size
    # Nothing in the file but the header and the bits that were counted.
    header = 8 + int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    assert 8 * (size.file_bytes - header) == size.bits
    assert [m.kind for m in size.modules] == ["experts", "other"]


def test_activated_average_is_equation_46() -> None:
    # Full rank r = O: an 8-bit O×O shared factor and O×I expert factors of exactly one bit.
    module = ModuleSize("m", "experts", "", (EXPERTS, OUT, IN), 8 * OUT * OUT + EXPERTS * OUT * IN, 8 * OUT * OUT)
    size = ModelSize((module,), 0, 0, top_k=2)
    assert size.activated_bits_per_weight == pytest.approx(OUT / (2 * IN) * 8 + 1)
    static = OUT / (EXPERTS * IN) * 8 + 1  # Eq. 45
    assert size.bits_per_expert_weight == pytest.approx(static)
    assert ModelSize((module,), 0, 0, top_k=None).activated_bits_per_weight is None


def test_all_experts_active_is_the_stored_average() -> None:
    module = packed_module("m", packed_projection())
    size = ModelSize((module,), 0, 0, top_k=EXPERTS)
    assert size.activated_bits_per_weight == pytest.approx(size.bits_per_expert_weight)


def test_files_that_hold_other_bits_than_the_config_says_are_refused(tmp_path: Path) -> None:
    folder = packed_folder(tmp_path, packed_projection())
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["modules"]["model.layers.0.mlp.experts.down_proj"]["left"]["rows"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"left\.values: got .* wanted .* as config\.json says"):
        packed_checkpoint_size(folder)


def test_an_unpacked_checkpoint_is_not_taken_for_a_packed_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": null}')
    assert not is_packed(tmp_path)
    assert not is_packed(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="did not pack"):
        packed_checkpoint_size(tmp_path)


def test_top_k_is_found_under_its_names() -> None:
    assert experts_per_token({"num_experts_per_tok": 4}) == 4
    assert experts_per_token({"text_config": {"moe_k": 6}}) == 6
    assert experts_per_token({"hidden_size": 6, "top_k": 50}) is None  # `top_k` of old configs is that of sampling
