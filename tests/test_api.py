"""The functions of ``import moebius``: they do what the commands do, and a type checker sees what they take."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import typer
from mypy import api as mypy_api
from tests.tiny import save_tiny
from typer.testing import CliRunner

import moebius
from moebius import api
from moebius.cli.app import app
from moebius.errors import ModelNotFoundError, OutputError, RecipeError, UnknownNameError

ROOT = Path(__file__).parent.parent
SMALL = {"windows": 4, "window_length": 32}
COMMANDS = ("quantize", "evaluate", "generate", "chat", "info", "plan", "compare")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("olmoe", tmp_path_factory.mktemp("api") / "model")


@pytest.fixture(scope="module")
def packed(model: Path) -> Path:
    return moebius.quantize(model, model.parent / "packed", method="mobie", calibration="builtin", gain=True, **SMALL).folder


def command(*arguments: str | Path) -> dict[str, object]:
    result = CliRunner().invoke(app, [str(a) for a in arguments] + ["--json"])
    assert result.exit_code == 0, result.output
    found: dict[str, object] = json.loads(result.stdout)
    return found


def test_quantize_writes_what_the_command_writes(model: Path, packed: Path, tmp_path: Path) -> None:
    small = ["--windows", "4", "--window-length", "32"]
    command("quantize", model, "--method", "mobie", "--set", "gain=true", "--out", tmp_path / "packed", *small)
    assert (tmp_path / "packed" / "moebius_manifest.json").read_bytes() == (packed / "moebius_manifest.json").read_bytes()


def test_quantize_says_what_it_wrote(packed: Path, tmp_path: Path) -> None:
    result = moebius.quantize(None, tmp_path / "out", method="rtn", bits=3)
    assert result.folder == tmp_path / "out" and result.size.bits_per_expert_weight == pytest.approx(3.2, abs=0.1)
    assert result.peak_memory_bytes > 1e8 and result.seconds["write"] > 0
    assert [layer["name"] for layer in result.layers] == [f"model.layers.{i}.mlp.experts" for i in range(4)]


def test_the_others_say_what_their_commands_say(model: Path, packed: Path, tmp_path: Path) -> None:
    small = ["--windows", "3", "--window-length", "32"]
    result = moebius.evaluate(packed, model, windows=3, window_length=32)
    said = command("evaluate", packed, "--reference", model, *small)
    assert said == {"model": str(packed), **result.to_dict()} and result.kl is not None and result.kl > 0
    assert command("info", packed, "--verify") == {"model": str(packed), **moebius.info(packed, verify=True).to_dict()}
    planned = moebius.plan(model, "gptq", 3, group_size=16)
    shown = command("plan", model, "--method", "gptq", "--bits", "3", "--set", "group_size=16")
    assert shown.items() >= planned.to_dict().items()
    written = moebius.generate(packed, "def f", 7, temperature=0.5, seed=3)
    told = command("generate", packed, "--prompt", "def f", "--tokens", "7", "--temperature", "0.5", "--seed", "3")
    assert written.text == told["completion"] and written.tokens == told["tokens"]
    compared = moebius.compare(model, ["rtn@8", "rtn@2"], out=tmp_path / "compared", text_windows=2, **SMALL)
    assert [row.label for row in compared.rows] == ["original", "rtn@8", "rtn@2"]
    assert json.loads((tmp_path / "compared" / "results.json").read_text()) == json.loads(json.dumps(compared.to_dict()))


def test_a_loaded_model_is_used_as_it_is(packed: Path) -> None:
    loaded = moebius.load(packed)
    pieces: list[str] = []
    written = moebius.generate(loaded, "def f", 7, on_text=pieces.append)
    assert "".join(pieces) == written.text == moebius.generate(packed, "def f", 7).text
    talk = moebius.chat(loaded)
    first = talk.ask("def", tokens=5)
    assert talk.ask("x", tokens=5).text == moebius.generate(loaded, f"def{first.text}x", 5).text
    assert loaded.dtype == torch.bfloat16 and moebius.load(packed, dtype="float32").dtype == torch.float32
    loaded.config._name_or_path = ""
    loaded.name_or_path = ""
    with pytest.raises(RecipeError, match="give its tokenizer"):
        moebius.generate(loaded, "x")


def test_nothing_is_printed(packed: Path, capfd: pytest.CaptureFixture[str]) -> None:
    moebius.generate(packed, "def", 3)
    moebius.evaluate(packed, windows=1, window_length=32)
    assert capfd.readouterr().out == ""


def test_what_cannot_be_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="no method named"):
        moebius.quantize(None, tmp_path / "out", method="rtm")
    with pytest.raises(UnknownNameError, match="no option 'side'"):
        moebius.quantize(None, tmp_path / "out", method="rtn", side="input")
    with pytest.raises(UnknownNameError, match="no preset named 'ablations'"):
        moebius.compare(preset="ablations", out=tmp_path / "out")
    with pytest.raises(ModelNotFoundError):
        moebius.load(tmp_path / "nowhere")
    with pytest.raises(RecipeError, match="abacus"):
        moebius.load(device="abacus")
    with pytest.raises(RecipeError, match="empty text"):
        moebius.generate(prompt="")
    with pytest.raises(RecipeError, match="top_k"):
        moebius.evaluate(top_k=3)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(OutputError, match="not empty"):
        moebius.compare(out=tmp_path / "full")


def test_packages_are_called_and_looked_into() -> None:
    code = """
import moebius, inspect
from moebius.quantize.binary import *
import moebius.evaluate.size as size
assert callable(moebius.quantize) and callable(moebius.evaluate) and callable(moebius.compare)
assert size.ModelSize is moebius.evaluate.size.ModelSize
assert list(inspect.signature(moebius.quantize).parameters)[:5] == ["model", "out", "method", "bits", "calibration"]
assert moebius.quantize.__wrapped__.__doc__.startswith("Quantize the experts")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names() -> None:
    assert moebius.__version__ == version("moebius")
    assert set(moebius.__all__) <= set(dir(moebius))
    assert all(getattr(moebius, name) is not None for name in moebius.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = moebius.nothing  # type: ignore[attr-defined]


def test_import_is_light() -> None:
    code = "import sys, moebius; assert not {'torch', 'transformers', 'numpy', 'typer', 'rich'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_library_does_not_need_the_command_line() -> None:
    code = (
        "import sys, moebius.api, moebius.bench.run; assert not {'typer', 'moebius.cli', 'rich.progress'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", COMMANDS)
def test_defaults_are_those_of_the_command(name: str) -> None:
    function = inspect.signature(getattr(api, name))
    group = typer.main.get_command(app)
    options = {parameter.name: parameter.default for parameter in group.commands[name].params}  # type: ignore[attr-defined]
    shared = {p.name: p.default for p in function.parameters.values() if p.name in options and p.default is not p.empty}
    assert len(shared) >= 2
    different = {n for n, default in shared.items() if (options[n] or None) != (default or None)}
    assert different == set()


def checked(code: str, tmp_path: Path) -> str:
    """What mypy says; torch and transformers, which take a minute to read, are left out: `make check` reads them."""
    (tmp_path / "code.py").write_text(code)
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nstrict = true\nfollow_imports = silent\n[mypy-torch.*,transformers.*,scipy.*,numpy.*]\nfollow_imports = skip\n"
    )
    cache, config = str(tmp_path / "cache"), str(tmp_path / "mypy.ini")
    return mypy_api.run([str(tmp_path / "code.py"), "--config-file", config, "--cache-dir", cache])[0]


def test_a_type_checker_sees_signatures(tmp_path: Path) -> None:
    right = (ROOT / "tests" / "api_types.py").read_text().partition("\n")[2]  # without the line that wants torch's own types
    assert "Success" in checked(right, tmp_path)
    wrong = [
        'moebius.quantize("model", "out", bits="one")',
        'moebius.evaluate("model", protocol="gguf")',
        'moebius.generate("model", 3)',
        'moebius.plan("model").nothing',
        "moebius.nothing",
        'moebius.compare("model")',
    ]
    said = checked("import moebius\n\n" + "\n".join(wrong) + "\n", tmp_path)
    assert {int(line) for line in re.findall(r"code.py:(\d+): error", said)} == set(range(3, 3 + len(wrong))), said
