"""Finding source checkpoints, and which of their tensors are experts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import ARCHITECTURES, save_tiny, tiny_model
from transformers.core_model_loading import Chunk, WeightConverter

from moebius.checkpoint import names
from moebius.checkpoint.names import expert_tensor_names
from moebius.checkpoint.reader import SourceCheckpoint
from moebius.checkpoint.shards import StoredTensor
from moebius.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError
from moebius.models.load import describe


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("olmoe", tmp_path_factory.mktemp("reader") / "olmoe")


def test_reads_every_tensor(olmoe: Path) -> None:
    checkpoint = SourceCheckpoint.open(str(olmoe))
    wanted = load_file(olmoe / "model.safetensors")
    assert checkpoint.folder == olmoe and checkpoint.files == (olmoe / "model.safetensors",)
    assert checkpoint.names() == sorted(wanted)
    assert all(torch.equal(checkpoint.load(name), tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_expert_tensors_of_every_architecture(name: str, tmp_path: Path) -> None:
    """Whatever a checkpoint calls them: the tensors named hold exactly the weights of the experts, and nothing else does."""
    checkpoint = SourceCheckpoint.open(save_tiny(name, tmp_path / name))
    moe = describe(tiny_model(name).to(torch.bfloat16))
    modules = [f"{layer.name}.{p}" for layer in moe.moe_layers for p in (layer.layout.gate_up_name, layer.layout.down_name)]
    stored = expert_tensor_names(checkpoint, moe.model, modules)

    def content(tensors: list[torch.Tensor]) -> list[int]:
        return torch.cat([t.reshape(-1) for t in tensors]).view(torch.int16).sort().values.tolist()

    assert content([checkpoint.load(n) for n in stored]) == content([moe.model.get_parameter(m) for m in modules])


def test_names_of_experts_and_linears(olmoe: Path) -> None:
    checkpoint, model = SourceCheckpoint.open(olmoe), tiny_model("olmoe")
    experts = "model.layers.1.mlp.experts"
    got = expert_tensor_names(checkpoint, model, [f"{experts}.down_proj", "model.layers.0.mlp.gate"])
    assert got == {f"{experts}.{e}.down_proj.weight" for e in range(8)} | {"model.layers.0.mlp.gate.weight"}
    with pytest.raises(CheckpointError, match=r"model\.layers\.9\.mlp\.gate\.weight"):
        expert_tensor_names(checkpoint, model, ["model.layers.9.mlp.gate"])


def test_a_tensor_that_holds_several_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = "model.layers.0.self_attn"
    parts = [f"self_attn.{part}_proj.weight" for part in "qkv"]
    fused = WeightConverter("self_attn.qkv.weight", parts, [Chunk(dim=0)])
    monkeypatch.setattr(names, "get_model_conversion_mapping", lambda model: [fused])
    model, stored = tiny_model("olmoe"), f"{attention}.qkv.weight"
    modules = [f"{attention}.{part}_proj" for part in "qkv"]
    assert names.parameters_of([stored], model) == {stored: {f"{module}.weight" for module in modules}}
    checkpoint = SourceCheckpoint(Path(), {}, {stored: StoredTensor(stored, "F32", (), Path(), 0, 4)})
    assert expert_tensor_names(checkpoint, model, modules) == {stored}
    with pytest.raises(UnsupportedModelError, match=rf"{stored}: holds {modules[1]}\.weight, which is packed"):
        expert_tensor_names(checkpoint, model, modules[1:2])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(olmoe: Path, tmp_path: Path, value: float) -> None:
    tensors = load_file(olmoe / "model.safetensors")
    name = "model.layers.1.mlp.experts.7.up_proj.weight"
    tensors[name][2, 3] = value
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((olmoe / "config.json").read_text())
    checkpoint = SourceCheckpoint.open(tmp_path)
    checkpoint.check_finite([n for n in checkpoint.names() if n != name])
    with pytest.raises(CheckpointError, match=f"{name} holds 1 values"):
        checkpoint.check_finite(checkpoint.names())


def test_fingerprint_sees_every_byte(olmoe: Path, tmp_path: Path) -> None:
    for path in olmoe.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    fingerprint = SourceCheckpoint.open(olmoe).fingerprint()
    assert SourceCheckpoint.open(tmp_path).fingerprint() == fingerprint
    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    content[-1000] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    assert SourceCheckpoint.open(tmp_path).fingerprint() != fingerprint


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "a/b/c", Path("owner/model")])
def test_nothing_there(source: str | Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no such file or folder"):
        SourceCheckpoint.open(source)


def test_hub_failure_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **options: object) -> str:
        raise ConnectionError("no route\nand a long story")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ModelNotFoundError, match=r"owner/model: .*\(no route\)$"):
        SourceCheckpoint.open("owner/model")


def test_not_a_source(olmoe: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        SourceCheckpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not a JSON object"):
        SourceCheckpoint.open(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "olmoe"}))
    with pytest.raises(CheckpointError, match="holds no weights"):
        SourceCheckpoint.open(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="wanted safetensors"):
        SourceCheckpoint.open(tmp_path)
