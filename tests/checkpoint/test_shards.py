"""safetensors files: what is written is what safetensors reads, and damage is named before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moebius.checkpoint.shards import DTYPES, INDEX_NAME, MemoryTensor, read_folder, read_shard, write_shard
from moebius.errors import CheckpointError


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(), (3,), (2, 5), (0, 4), (1, 2, 3)]
    made = {}
    for number, (name, dtype) in enumerate(DTYPES.items()):
        values = torch.randint(0, 2, shapes[number % len(shapes)], generator=generator)
        made[f"t.{name}"] = values.to(torch.float32).to(dtype)
    return made


def test_written_files_are_safetensors(tmp_path: Path) -> None:
    wanted = tensors()
    entries = write_shard(tmp_path / "a.safetensors", [MemoryTensor(n, t) for n, t in wanted.items()])
    got = load_file(tmp_path / "a.safetensors")
    assert got.keys() == wanted.keys() == entries.keys()
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape
        assert torch.equal(got[name].float(), tensor.float())
        stored = read_shard(tmp_path / "a.safetensors")[name]
        assert torch.equal(stored.load().float(), tensor.float())
        assert stored.sha256() == entries[name]["sha256"]
        assert stored.begin % tensor.element_size() == 0
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_order_of_the_tensors_does_not_change_the_bytes(tmp_path: Path) -> None:
    sources = [MemoryTensor(n, t) for n, t in tensors().items()]
    write_shard(tmp_path / "a.safetensors", sources)
    write_shard(tmp_path / "b.safetensors", sources[::-1])
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_whole_cache_lines_start_on_one(tmp_path: Path) -> None:
    wanted = {"odd": torch.ones(3), "b": torch.ones(64, dtype=torch.uint8), "c": torch.ones(5, 32), "d": torch.ones(1)}
    write_shard(tmp_path / "a.safetensors", [MemoryTensor(n, t) for n, t in wanted.items()])
    begins = {name: stored.begin for name, stored in read_shard(tmp_path / "a.safetensors").items()}
    assert begins["b"] % 64 == begins["c"] % 64 == 0
    assert load_file(tmp_path / "a.safetensors")["c"].data_ptr() % 64 == 0


def test_copied_bit_for_bit(tmp_path: Path) -> None:
    weird = torch.tensor([0x7FC1, 0xFF81, 0x8000, 0x0001], dtype=torch.uint16).view(
        torch.bfloat16
    )  # NaNs with payload, -0, tiny
    save_file({"w": weird, "b": torch.arange(5)}, tmp_path / "a.safetensors")
    write_shard(tmp_path / "b.safetensors", list(read_shard(tmp_path / "a.safetensors").values()))
    assert load_file(tmp_path / "b.safetensors")["w"].view(torch.int16).tolist() == weird.view(torch.int16).tolist()


def sharded(folder: Path) -> None:
    save_file({"a": torch.ones(3), "b": torch.ones(4)}, folder / "one.safetensors")
    save_file({"c": torch.ones(5)}, folder / "two.safetensors")
    weight_map = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


def cut(folder: Path, length: int) -> None:
    with (folder / "two.safetensors").open("r+b") as file:
        file.truncate((folder / "two.safetensors").stat().st_size + length)


def rename_in_header(folder: Path, old: bytes, new: bytes) -> None:
    content = (folder / "two.safetensors").read_bytes()
    assert old in content and len(old) == len(new)
    (folder / "two.safetensors").write_bytes(content.replace(old, new))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda f: (f / "two.safetensors").unlink(), "shard two.safetensors is missing"),
    "truncated": (lambda f: cut(f, -1), "two.safetensors: got .* bytes, wanted .*truncated"),
    "truncated header": (lambda f: (f / "two.safetensors").write_bytes(b"\xff\0\0\0\0\0\0\0{"), "two.safetensors.*truncated"),
    "empty": (lambda f: (f / "two.safetensors").write_bytes(b""), "two.safetensors.*truncated"),
    "appended": (lambda f: cut(f, 8), "two.safetensors.*appended"),
    "header not JSON": (lambda f: rename_in_header(f, b'{"', b"{'"), "two.safetensors: its header cannot be read"),
    "shape that does not fit": (lambda f: rename_in_header(f, b"[5]", b"[6]"), "two.safetensors: c takes 20 bytes"),
    "unknown dtype": (lambda f: rename_in_header(f, b'"F32"', b'"F99"'), "two.safetensors: c has dtype F99"),
    "tensor not in shard": (lambda f: rename_in_header(f, b'"c"', b'"d"'), "two.safetensors: c is not in it"),
    "tensor twice": (lambda f: rename_in_header(f, b'"c"', b'"a"'), "a is both in one.safetensors and in two.safetensors"),
    "index not JSON": (lambda f: (f / INDEX_NAME).write_text("{"), f"{INDEX_NAME}: cannot be read"),
    "no index": (lambda f: (f / INDEX_NAME).unlink(), f"no {INDEX_NAME}"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    sharded(tmp_path)
    assert read_folder(tmp_path).keys() == {"a", "b", "c"}
    change, message = DAMAGES[damage]
    change(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        read_folder(tmp_path)
