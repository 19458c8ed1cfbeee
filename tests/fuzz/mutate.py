"""One thing changed in a packed checkpoint: a number, a byte, a value of some JSON, a whole file."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moebius.checkpoint.manifest import write_manifest
from moebius.checkpoint.shards import read_shard

_ODD: tuple[Any, ...] = (
    0,
    -1,
    1,
    2,
    3,
    7,
    8,
    9,
    17,
    255,
    65536,
    10**9,
    1 << 40,
    1 << 70,
    10**400,
    1.5,
    1e308,
    True,
    False,
    None,
)
_ODD += ("", "x", "../x", "a\0b", "\ud83d", "é" * 300, [], {}, [[]], [1, "x"], {"a": {"b": None}}, [[[[[]]]]] * 3)


def number(folder: Path, chance: random.Random) -> None:
    """A number or word in the description of a packed module."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    holder, key = chance.choice([place for place in _places(config["quantization_config"]["modules"]) if _is_leaf(*place)])
    near = [holder[key] + 1, holder[key] - 1] if type(holder[key]) is int else []
    holder[key] = chance.choice([*_ODD, *near])
    path.write_text(json.dumps(config))


def tensor(folder: Path, chance: random.Random) -> None:
    """A byte of a packed tensor, small ones as often as large ones. The manifest follows."""
    file = chance.choice(sorted(folder.glob("packed-*.safetensors")))
    stored = chance.choice([t for _, t in sorted(read_shard(file).items()) if t.end > t.begin])
    content = bytearray(file.read_bytes())
    content[chance.randrange(stored.begin, stored.end)] = chance.choice([0, 0x7F, 0x80, 0xFF, chance.randrange(256)])
    file.write_bytes(content)
    write_manifest(folder)


def byte(folder: Path, chance: random.Random) -> None:
    """A byte of any file."""
    file = chance.choice(_files(folder))
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] = chance.randrange(256)
    file.write_bytes(content)


def value(folder: Path, chance: random.Random) -> None:
    """A value, name or object anywhere in a JSON file: another one in its place, or none, or one more."""
    file = chance.choice([path for path in _files(folder) if path.suffix == ".json" and _places(json.loads(path.read_text()))])
    content = json.loads(file.read_text())
    holder, key = chance.choice(_places(content))
    _change(holder, key, chance)
    file.write_text(json.dumps(content))


def header(folder: Path, chance: random.Random) -> None:
    """A value in the header of a safetensors file, whose length follows, or the length alone."""
    file = chance.choice([path for path in _files(folder) if path.suffix == ".safetensors"])
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    if chance.random() < 0.1:
        wrong = chance.choice([0, 1, length - 1, length + 1, len(content), 1 << 32, (1 << 64) - 1])
        file.write_bytes(wrong.to_bytes(8, "little") + content[8:])
        return
    entries = json.loads(content[8 : 8 + length])
    places = _places(entries)
    _change(*chance.choice(places), chance)
    text = json.dumps(entries).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def contents(folder: Path, chance: random.Random) -> None:
    """All of a file: cut, emptied, in another encoding, nested deeply, something else, gone, or a folder."""
    file = chance.choice(_files(folder))
    content = file.read_bytes()
    change = chance.choice(_CONTENTS)(content, chance)
    file.unlink()
    if change is None:
        if chance.random() < 0.5:
            file.mkdir()
    else:
        file.write_bytes(change)


_CONTENTS: tuple[Callable[[bytes, random.Random], bytes | None], ...] = (
    lambda content, chance: content[: chance.randrange(len(content))],
    lambda content, chance: content + chance.randbytes(chance.randrange(1, 9)),
    lambda content, chance: b"",
    lambda content, chance: b"[]",
    lambda content, chance: b"null",
    lambda content, chance: b"{}",
    lambda content, chance: chance.randbytes(64),
    lambda content, chance: b'{"a":' * 100_000,
    lambda content, chance: b'{"a":' + b"[" * 3000 + b"]" * 3000 + b"," + content[1:],
    lambda content, chance: b"\xef\xbb\xbf" + content,
    lambda content, chance: content.replace(b'"', b'"\xff', 1),
    lambda content, chance: b'{"a":' + b"9" * 5000 + b"," + content[1:],
    lambda content, chance: b'{"a": 1e999, "b": NaN,' + content[1:],
    lambda content, chance: content.decode("latin-1").encode("utf-16"),
    lambda content, chance: None,
)

#: Name to a function that changes a checkpoint in place.
KINDS: dict[str, Callable[[Path, random.Random], None]] = {
    "number": number,
    "tensor": tensor,
    "byte": byte,
    "value": value,
    "header": header,
    "contents": contents,
}


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and path.stat().st_size)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every value in a JSON value, as its holder and its key there."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in _places(value[key])]


def _is_leaf(holder: Any, key: Any) -> bool:
    return not isinstance(holder[key], (dict, list))


def _change(holder: Any, key: Any, chance: random.Random) -> None:
    how = chance.random()
    if how < 0.1:
        del holder[key]
    elif how < 0.2 and isinstance(holder, dict):
        holder[chance.choice(["", "x", "a" * 300, str(key).upper()])] = holder.pop(key)
    elif how < 0.3 and isinstance(holder, dict):
        holder[f"{key}x"] = holder[key]
    elif how < 0.4 and type(holder[key]) is int:
        holder[key] += chance.choice([-1, 1, 8, -8])
    else:
        holder[key] = chance.choice(_ODD)
