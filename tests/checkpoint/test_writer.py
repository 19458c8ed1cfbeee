"""Writing packed checkpoints: resumable, the same bytes every time, every bit counted, nothing half-made."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.packed import packed_layers, write_packed
from tests.tiny import save_tiny

from moebius.checkpoint import shards, writer
from moebius.checkpoint.manifest import MANIFEST_NAME, verify, write_manifest
from moebius.checkpoint.names import expert_tensor_names
from moebius.checkpoint.reader import SourceCheckpoint
from moebius.checkpoint.shards import read_folder
from moebius.checkpoint.writer import CheckpointWriter
from moebius.errors import CheckpointError, OutputError
from moebius.formats.projection import PackedProjection, projection_from_tensors
from moebius.models.load import skeleton

KEY = {"test": 1}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen2_moe", tmp_path_factory.mktemp("writer") / "source")


@pytest.fixture(scope="module")
def packed(source: Path) -> Path:
    return write_packed(source, source.parent / "packed", everything=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_same_bytes_twice(source: Path, packed: Path, tmp_path: Path) -> None:
    assert contents(write_packed(source, tmp_path / "again", everything=True)) == contents(packed)
    assert [p.name for p in tmp_path.iterdir()] == ["again"], "no work folder is left"


def test_stored_bits_are_the_bytes_in_the_files(source: Path, packed: Path) -> None:
    layers = packed_layers(source, everything=True)
    stored = read_folder(packed)
    for modules in layers.values():
        for path, made in modules.items():
            mine = [t for name, t in stored.items() if name.startswith(f"{path}.")]
            assert 8 * sum(t.end - t.begin for t in mine) == made.stored_bits()
    claimed = sum(made.stored_bits() for modules in layers.values() for made in modules.values())
    shard_bytes = sum(t.end - t.begin for t in stored.values() if t.file.name.startswith("packed-"))
    assert 8 * shard_bytes == claimed


def test_packed_tensors_come_back(source: Path, packed: Path) -> None:
    stored = read_folder(packed)
    modules = json.loads((packed / "config.json").read_text())["quantization_config"]["modules"]
    for layer in packed_layers(source, everything=True).values():
        for path, made in layer.items():
            if not isinstance(made, PackedProjection):
                continue
            tensors = {n.removeprefix(f"{path}."): t.load() for n, t in stored.items() if n.startswith(f"{path}.")}
            assert torch.equal(projection_from_tensors(modules[path], tensors).unpack(), made.unpack())


def test_the_rest_is_copied_bit_for_bit(source: Path, packed: Path) -> None:
    before, after = load_file(source / "model.safetensors"), load_file(packed / "rest-00000.safetensors")
    checkpoint, model = SourceCheckpoint.open(source), skeleton(source).model
    modules = json.loads((packed / "config.json").read_text())["quantization_config"]["modules"]
    assert after.keys() == before.keys() - expert_tensor_names(checkpoint, model, modules)
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor.view(torch.int16), before[name].view(torch.int16))
    assert (packed / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert (packed / "report.json").read_text() == "{}\n"
    config = json.loads((packed / "config.json").read_text())
    del config["quantization_config"]
    assert config == json.loads((source / "config.json").read_text())


def test_rest_shards_are_bounded(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "REST_SHARD_BYTES", 20_000)
    out = write_packed(source, tmp_path / "out")
    files = sorted(out.glob("rest-*.safetensors"))
    assert len(files) > 2
    for file in files:
        tensors = shards.read_shard(file).values()
        assert len(tensors) == 1 or sum(t.end - t.begin for t in tensors) <= 20_000
    assert verify(out, hashes=True) == len(read_folder(out))


class Killed(BaseException):
    """What a killed process does not get to handle."""


@pytest.mark.parametrize("after", [1, 2, 3, 4, 7, 12])
def test_resumed_after_a_kill(after: int, source: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped at any write, the second run ends with the bytes of a run that was never stopped."""
    count = 0

    def fsync(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count == after:
            raise Killed

    out = tmp_path / "out"
    monkeypatch.setattr(shards.os, "fsync", fsync)
    with pytest.raises(Killed):
        write_packed(source, out, everything=True)
    assert not out.exists()
    finished = CheckpointWriter(out)
    finished.begin(KEY)
    kept = len(finished.entries())
    assert kept == min((after - 2) // 2 if after > 1 else 0, len(packed_layers(source, everything=True)))
    monkeypatch.undo()
    assert contents(write_packed(source, out, everything=True)) == contents(packed)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_finished_layers_are_not_written_again(source: Path, tmp_path: Path) -> None:
    layers = packed_layers(source, everything=False)
    (name, first), *_ = layers.items()
    one = CheckpointWriter(tmp_path / "out")
    one.begin(KEY)
    one.write_layer(name, first, {"tokens": [1, 2]})
    shard = tmp_path / ".out.partial" / "checkpoint" / f"packed-{name}.safetensors"
    written = shard.stat().st_mtime_ns
    two = CheckpointWriter(tmp_path / "out")
    two.begin(dict(KEY))
    assert two.entries() == {name: {"tokens": [1, 2]}}
    assert two.modules() == {path: made.spec() for path, made in first.items()}
    two.write_layer(name, first)
    assert shard.stat().st_mtime_ns == written
    three = CheckpointWriter(tmp_path / "out")
    three.begin({"test": 2})
    assert three.entries() == {} and not shard.exists(), "another key starts over"


def test_a_damaged_unfinished_layer_is_forgotten(source: Path, tmp_path: Path) -> None:
    (name, first), *_ = packed_layers(source, everything=False).items()
    one = CheckpointWriter(tmp_path / "out")
    one.begin(KEY)
    one.write_layer(name, first)
    os.truncate(tmp_path / ".out.partial" / "checkpoint" / f"packed-{name}.safetensors", 100)
    two = CheckpointWriter(tmp_path / "out")
    two.begin(KEY)
    assert two.entries() == {}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk(number: int, source: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = packed_layers(source, everything=False)
    count = 0

    def fsync(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count == 4:  # run.json, shard and record of the first layer, shard of the second
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(shards.os, "fsync", fsync)
    out = tmp_path / "out"
    work = CheckpointWriter(out)
    work.begin(KEY)
    first, second = layers.items()
    work.write_layer(*first)
    with pytest.raises(OutputError, match=r"disk is full.*same command again to resume"):
        work.write_layer(*second)
    kept = [p.name for p in (tmp_path / ".out.partial" / "checkpoint").iterdir()]
    assert kept == [f"packed-{first[0]}.safetensors"], "the unfinished shard is gone, the finished one stays"
    assert work.entries().keys() == {first[0]}


def test_output_that_is_in_the_way(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="is a file"):
        CheckpointWriter(tmp_path / "file")
    with pytest.raises(OutputError, match="cannot be written"):
        CheckpointWriter(tmp_path / "file" / "out")
    with pytest.raises(OutputError, match="is not empty"):
        CheckpointWriter(tmp_path)
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert verify(write_packed(source, tmp_path / "empty")) > 0
    assert verify(write_packed(source, tmp_path / "deep" / "er")) > 0


def test_output_filled_meanwhile(source: Path, tmp_path: Path) -> None:
    checkpoint, work = SourceCheckpoint.open(source), CheckpointWriter(tmp_path / "out")
    work.begin(KEY)
    work.copy_rest(checkpoint, [])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    with pytest.raises(OutputError, match="filled by something else"):
        work.finish(checkpoint, {}, {})
    assert (tmp_path / "out" / "precious").read_text() == "mine"


def test_verify_hashes_finds_one_changed_bit(packed: Path, tmp_path: Path) -> None:
    for path in packed.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    count = verify(tmp_path, hashes=True)
    assert count == len(json.loads((tmp_path / MANIFEST_NAME).read_text())["tensors"])
    target = read_folder(tmp_path)["model.layers.0.mlp.experts.gate_up_proj.factor.signs"]
    content = bytearray(target.file.read_bytes())
    content[target.begin] ^= 1
    target.file.write_bytes(content)
    assert verify(tmp_path) == count, "headers alone do not show it"
    with pytest.raises(CheckpointError, match=r"^model\.layers\.0\.mlp\.experts\.gate_up_proj\.factor\.signs: the bytes"):
        verify(tmp_path, hashes=True)
    write_manifest(tmp_path)
    assert verify(tmp_path, hashes=True) == count
