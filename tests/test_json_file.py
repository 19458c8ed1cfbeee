"""JSON from others: whatever is in the file, the answer is an object or one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from moebius.errors import CheckpointError
from moebius.json_file import field, read_config, read_object

BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a JSON object"),
    "half": (b'{"a": [1, 2', "not a JSON object"),
    "a list": (b"[]", "not a JSON object"),
    "null": (b"null", "not a JSON object"),
    "byte order mark": (b"\xef\xbb\xbf{}", "byte order mark"),
    "Latin-1": (b'{"a": "\xe4"}', "not UTF-8"),
    "UTF-16": ("{}".encode("utf-16"), "not UTF-8"),
    "zeros": (b"\0" * 64, "not a JSON object"),
    "deep": (b'{"a":' * 100_000, "nested too deeply"),
    "giant number": (b'{"a": ' + b"9" * 5000 + b"}", "not a JSON object"),
    "half a character": (b'{"a": "\\ud800"}', "not UTF-8"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken(tmp_path: Path, what: str) -> None:
    content, message = BROKEN[what]
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"x\.json: .*{message}") as caught:
        read_object(tmp_path / "x.json")
    assert "\n" not in str(caught.value)


def test_missing_or_a_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing"):
        read_object(tmp_path / "x.json")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_object(tmp_path)


def test_good(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": {"b": 1}, "emoji": "\\ud83d\\ude00", "limit": [0.0, Infinity]}')
    content = read_object(tmp_path / "x.json")
    assert content == {"a": {"b": 1}, "emoji": "😀", "limit": [0.0, float("inf")]}
    assert field(content, "a", dict, "x") == {"b": 1} and field(content, "c", list, "x", [2]) == [2]
    for name, kind, got in (("a", list, "an object"), ("c", dict, "nothing"), ("emoji", int, "a text")):
        with pytest.raises(CheckpointError, match=f"x: {name} is {got}, wanted"):
            field(content, name, kind, "x")


@pytest.mark.parametrize(
    "config", ['{"num_hidden_layers": 10001}', '{"a": {"b": {"n_layer": 1000000}}}', '{"v": {"depth": 20000}}']
)
def test_more_layers_than_can_be_built(config: str, tmp_path: Path) -> None:
    """Wherever in the config it says so."""
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match="wanted 10000 at most"):
        read_config(tmp_path / "config.json")
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 10000, "a": {"layers": "10001", "width": 99999}}')
    assert read_config(tmp_path / "config.json")["num_hidden_layers"] == 10000
