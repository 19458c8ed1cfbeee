"""Writing packed checkpoints: resumable, the same bytes every time, every bit counted, nothing half-made."""

from __future__ import annotations

import errno
import json
import os
import shutil
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


def test_finished_layers_are_not_written_again(source: Path, tmp_path: Path) -> None:
    layers = packed_layers(source, everything=False)
    (name, first), *_ = layers.items()
    with CheckpointWriter(tmp_path / "out") as one:
        one.begin(KEY)
        one.write_layer(name, first, {"tokens": [1, 2]})
    shard = tmp_path / ".out.partial" / "checkpoint" / f"packed-{name}.safetensors"
    written = shard.stat().st_mtime_ns
    with CheckpointWriter(tmp_path / "out") as two:
        two.begin(dict(KEY))
        assert two.entries() == {name: {"tokens": [1, 2]}}
        assert two.modules() == {path: made.spec() for path, made in first.items()}
        two.write_layer(name, first)
        assert shard.stat().st_mtime_ns == written


def test_work_of_other_settings_is_refused_and_kept(source: Path, tmp_path: Path) -> None:
    (name, first), *_ = packed_layers(source, everything=False).items()
    with CheckpointWriter(tmp_path / "out") as one:
        one.begin({"recipe": {"bits": 1.0, "gain": True}, "source": "a"})
        one.write_layer(name, first)
    before = contents(tmp_path)
    with (
        CheckpointWriter(tmp_path / "out") as two,
        pytest.raises(OutputError, match=r"recipe\.bits was 1\.0, is 2\.0\).*start over"),
    ):
        two.begin({"recipe": {"bits": 2.0, "gain": True}, "source": "a"})
    assert contents(tmp_path) == before


def test_a_second_run_is_refused_while_the_first_is_at_work(source: Path, tmp_path: Path) -> None:
    (name, first), *_ = packed_layers(source, everything=False).items()
    with CheckpointWriter(tmp_path / "out") as one:
        one.begin(KEY)
        with CheckpointWriter(tmp_path / "out") as two, pytest.raises(OutputError, match="another run is at work"):
            two.begin(KEY)
        one.write_layer(name, first)
    with CheckpointWriter(tmp_path / "out") as three:
        three.begin(KEY)
        assert list(three.entries()) == [name]


def test_work_in_which_nothing_was_finished_goes_away(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out") as work:
        work.begin(KEY)
    assert list(tmp_path.iterdir()) == []


def damaged(data: bytes, how: str) -> bytes | None:
    return {"half": data[: len(data) // 2], "empty": b"", "flip": data[:-9] + bytes([data[-9] ^ 4]) + data[-8:], "gone": None}[
        how
    ]


@pytest.mark.parametrize("how", ["half", "empty", "flip", "head", "gone"])
def test_damage_to_any_file_costs_its_part_alone(how: str, source: Path, packed: Path, tmp_path: Path) -> None:
    layers = packed_layers(source, everything=True)
    out = tmp_path / "out"

    def fill() -> None:
        with CheckpointWriter(out) as work:
            work.begin(KEY)
            for name, modules in layers.items():
                work.write_layer(name, modules, {"name": name})
            work.keep("seen", {"values": torch.arange(5.0)})

    fill()
    whole = contents(tmp_path)
    for name in (n for n in whole if not n.endswith("lock")):
        path, data = tmp_path / name, whole[name]
        hurt = data[:20] + bytes([data[20] ^ 1]) + data[21:] if how == "head" else damaged(data, how)
        path.unlink() if hurt is None else path.write_bytes(hurt)
        with CheckpointWriter(out) as work:
            work.begin(KEY)
            stem = Path(name).stem.removeprefix("packed-")
            assert work.entries().keys() == layers.keys() - {stem}, name
            assert (work.kept("seen") is None) == (stem == "seen")
        fill()
        assert contents(tmp_path) == whole, name
    write_packed(source, out, everything=True)
    assert contents(out) == contents(packed)


@pytest.mark.parametrize("kind", ["link", "current", "mount", "home"])
def test_outputs_of_every_kind(kind: str, source: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tmp_path / "real"
    real.mkdir()
    out: Path = real
    if kind == "link":
        out = tmp_path / "link"
        out.symlink_to(real)
    if kind == "current":
        monkeypatch.chdir(real)
        out = Path()
    if kind == "mount":
        monkeypatch.setattr(Path, "is_mount", lambda path: path == real)
    if kind == "home":
        monkeypatch.setenv("HOME", str(tmp_path))
        out = Path("~/real")
    inode = real.stat().st_ino
    write_packed(source, out, everything=True)
    assert contents(real) == contents(packed)
    assert [p.name for p in tmp_path.iterdir() if not p.is_symlink()] == ["real"]
    assert kind in ("link", "home") or real.stat().st_ino == inode, "what is mounted or stood in cannot give way"


def test_a_move_into_the_current_folder_that_was_killed_is_finished(
    source: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rename, moved = Path.rename, []

    def killed(self: Path, target: Path) -> Path:
        moved.append(target)
        if len(moved) == 3:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            write_packed(source, Path(), everything=True)
    assert not (tmp_path / "config.json").exists()
    write_packed(source, Path(), everything=True)
    assert contents(tmp_path) == contents(packed)


def test_a_disk_that_is_too_small_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"wanted about 1000000\.00 GB"):
        CheckpointWriter(tmp_path / "out").require_room(10**15)


def test_a_source_that_changes_meanwhile_is_noticed(source: Path, tmp_path: Path) -> None:
    copied = tmp_path / "source"
    shutil.copytree(source, copied)
    checkpoint = SourceCheckpoint.open(copied)
    os.utime(copied / "model.safetensors", ns=(1, 1))
    with CheckpointWriter(tmp_path / "out") as work, pytest.raises(CheckpointError, match="changed while it was read"):
        work.begin(KEY)
        work.copy_rest(checkpoint, [])
        work.finish(checkpoint, {}, {})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk(number: int, source: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = packed_layers(source, everything=False)
    count, full = 0, -1

    def fsync(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count == full:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(shards.os, "fsync", fsync)
    out = tmp_path / "out"
    work = CheckpointWriter(out)
    work.begin(KEY)
    first, second = layers.items()
    work.write_layer(*first)
    full = count + 1
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
