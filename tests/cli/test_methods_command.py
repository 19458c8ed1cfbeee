"""``moebius methods``, and a method that is one file and one call: through every command that takes a recipe."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from moebius.cli.app import app
from moebius.table import METHODS

TOY = '''
"""Every weight is the mean magnitude of its row, with its sign: BWN, and a switch that makes it worse."""

from moebius.formats.base import empty_like_spec
from moebius.formats.projection import PackedProjection
from moebius.formats.signs import Signs
from moebius.methods import Method
from moebius.methods.options import GAIN
from moebius.options import MethodOptions, Option
from moebius.quantize.binary import mixed_order
from moebius.types import CalibrationNeeds

STRETCH = Option("stretch", 1.0, "what row scales are multiplied by", low=0.1, high=8)
ROUNDS = Option("rounds", 3, "updates of row and column scales", (0, 3, 5), from_bits=((1, 5),))


def quantize(weight, stats, recipe, projection):
    none = weight.new_zeros(weight.shape[0], weight.shape[2]).bool()
    planes = mixed_order(weight.float(), none, recipe.rounds)
    return PackedProjection(planes.scaled(torch.full(weight.shape[:2], recipe.stretch)).pack())


def plan(shape, recipe, projection):
    return PackedProjection(empty_like_spec(Signs(*shape).spec()))


METHOD = Method(
    "signs alone",
    MethodOptions((STRETCH, ROUNDS), default_bits=1, low=1, high=1),
    quantize,
    plan,
    lambda recipe: CalibrationNeeds(),
)
'''.replace("from moebius.formats.base", "import torch\n\nfrom moebius.formats.base")

SMALL = ["--windows", "4", "--window-length", "32", "--quiet"]


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "toy_method.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    METHODS.register("toy", "toy_method:METHOD")
    yield
    METHODS.unregister("toy")
    sys.modules.pop("toy_method", None)


def invoked(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def printed(*arguments: str | Path) -> str:
    result = invoked(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.usefixtures("toy")
def test_a_method_from_one_file_goes_through_every_command(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    asked = ["--method", "toy", "--set", "stretch=2"]
    planned = json.loads(printed("plan", model, *asked, "--json"))
    assert planned["recipe"] == {
        **{"method": "toy", "bits": 1, "stretch": 2.0, "rounds": 5},
        **{"router": "keep", "rest": "bf16", "shared_experts": 16, "dense_layers": 16},
    }
    printed("quantize", model, *asked, "--out", tmp_path / "packed", *SMALL)
    size = json.loads(printed("info", tmp_path / "packed", "--verify", "--json"))
    assert size["recipe"] == planned["recipe"]
    assert size["bits_per_expert_weight"] == planned["after"]["bits_per_expert_weight"]
    assert "stretch" in printed("info", tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.isfinite(loaded(torch.tensor([[1, 2, 3]])).logits).all()

    words = ["toy", "toy stretch=8"]
    out = tmp_path / "compared"
    rows = json.loads(
        printed("compare", model, "-r", words[0], "-r", words[1], "--text-windows", "4", "--out", out, *SMALL, "--json")
    )["rows"]
    assert [row["label"] for row in rows] == ["original", *words]
    assert 0 < rows[1]["kl"] < rows[2]["kl"]


@pytest.mark.usefixtures("toy")
def test_what_a_registered_method_is_told(model: Path) -> None:
    assert "toy" in printed("methods")
    text = printed("methods", "toy")
    for piece in ("signs alone", "stretch", "0.1 to 8", "3, 5 from 1 bits on", "0, 3, 5", "updates of row and column scales"):
        assert piece in text
    for setting, message in (
        ("nges_lambda=5", "no option 'nges_lambda'; it has: dense_layers, rest"),
        ("stretch=9", "wanted 0.1 to 8"),
    ):
        result = invoked("plan", model, "--method", "toy", "--set", setting)
        assert result.exit_code == 2 and message in " ".join(result.stderr.split())


@pytest.mark.parametrize("name", METHODS)
def test_every_option_is_shown_with_default_range_and_help(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    text, described = printed("methods", name), json.loads(printed("methods", name, "--json"))[name]
    for option in METHODS[name].options.options:
        line = next(line for line in text.splitlines() if line.split()[:1] == [option.name])
        assert option.default_text() in line and option.range_text() in line and option.help in line
        assert described["options"][option.name]["default"] == option.default
    assert described["bits"]["default"] == METHODS[name].options.default_bits


def test_a_method_that_is_not_there() -> None:
    result = invoked("methods", "mobi")
    assert result.exit_code == 2 and "no method named 'mobi'" in result.stderr and "did you mean 'mobie'" in result.stderr


@pytest.mark.parametrize("columns", ["80", "120"])
def test_help_of_quantize_fits_on_a_screen_and_points_on(columns: str) -> None:
    command = [sys.executable, "-m", "moebius.cli", "quantize", "--help"]
    environment = {"COLUMNS": columns, "PATH": "", "LC_ALL": "C.UTF-8"}
    text = subprocess.run(command, capture_output=True, encoding="utf-8", check=True, env=environment).stdout
    assert 24 <= len(text.splitlines()) <= 40
    assert "moebius methods NAME" in " ".join(text.split())
