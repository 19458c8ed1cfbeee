"""Small files of a checkpoint with anything in them: every command ends well or in one line, never in a Python error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moebius.cli.app import app

WRONG: tuple[Any, ...] = (None, [], {}, "x", -1, 1.5, True, [[]], 10**30, {"a": [None]}, "\ud83d")


@pytest.fixture(scope="module")
def packed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damaged") / "packed"
    result = CliRunner().invoke(app, ["quantize", str(model), "--method", "rtn", "--out", str(folder), "--quiet"])
    assert result.exit_code == 0, result.output
    return folder


def ends_well(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code in (0, 2), f"{arguments[0]}: {result.output[-400:]}"
    if result.exit_code:
        assert result.stderr.count("error: ") == 1, result.stderr
    return result.stderr


CONTENTS: dict[str, Callable[[bytes], bytes]] = {
    "half": lambda b: b[: len(b) // 2],
    "empty": lambda b: b"",
    "list": lambda b: b"[]",
    "deep": lambda b: b'{"a":' * 50_000,
    "latin": lambda b: b.replace(b'"', b'"\xe4', 1),
    "digits": lambda b: b'{"a":' + b"9" * 5000 + b"}",
}


FILES = ["config.json", "model.safetensors.index.json", "moebius_manifest.json", "moebius_report.json"]
FILES += ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]


@pytest.mark.parametrize("what", CONTENTS)
@pytest.mark.parametrize("file", FILES)
def test_contents(packed: Path, tmp_path: Path, file: str, what: str) -> None:
    folder = Path(shutil.copytree(packed, tmp_path / "copy"))
    (folder / file).write_bytes(CONTENTS[what]((folder / file).read_bytes()))
    ends_well("info", folder, "--verify")
    ends_well("generate", folder, "--prompt", "a", "--tokens", "1", "--quiet")
    if file == "config.json":
        ends_well("plan", folder)


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to every value, at most two of each list or of each object of more than twenty."""
    items = (
        list(content.items()) if isinstance(content, dict) else list(enumerate(content)) if isinstance(content, list) else []
    )
    for key, value in items if len(items) <= 40 else items[:2]:
        yield (*path, key)
        yield from places(value, (*path, key))


@pytest.mark.parametrize(
    "file", ["config.json", "model.safetensors.index.json", "moebius_manifest.json", "moebius_report.json"]
)
def test_values(packed: Path, tmp_path: Path, file: str) -> None:
    """Every value in turn replaced by one of another kind."""
    folder = Path(shutil.copytree(packed, tmp_path / "copy"))
    text = (folder / file).read_text()
    for number, place in enumerate(places(json.loads(text))):
        content = json.loads(text)
        holder = content
        for key in place[:-1]:
            holder = holder[key]
        holder[place[-1]] = WRONG[number % len(WRONG)]
        (folder / file).write_text(json.dumps(content))
        ends_well("info", folder, "--verify")
        if file == "config.json":
            ends_well("generate", folder, "--prompt", "a", "--tokens", "1", "--quiet")


REPORTS: tuple[Any, ...] = (3, [None], [{"name": 1}], [{"name": "x", "tokens_per_expert": 3}])
REPORTS += ([{"name": "x", "tokens_per_expert": []}], [{"name": "x", "tokens_per_expert": ["many"]}])


@pytest.mark.parametrize("layers", REPORTS)
def test_reports(packed: Path, tmp_path: Path, layers: Any) -> None:
    folder = Path(shutil.copytree(packed, tmp_path / "copy"))
    (folder / "moebius_report.json").write_text(json.dumps({"layers": layers}))
    assert "moebius_report.json: layers" in ends_well("info", folder)


def test_the_command_line_compares_hashes(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit of a packed tensor that no check of shapes can see; the environment has the last word."""
    folder = Path(shutil.copytree(packed, tmp_path / "copy"))
    shard = min(folder.glob("packed-*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-2] ^= 1
    shard.write_bytes(content)
    assert "not those that were written" in ends_well("generate", folder, "--prompt", "a", "--tokens", "1", "--quiet")
    monkeypatch.setenv("MOEBIUS_HASHES", "0")
    assert not ends_well("generate", folder, "--prompt", "a", "--tokens", "1", "--quiet")
