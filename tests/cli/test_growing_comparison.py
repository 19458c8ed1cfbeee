"""A comparison refuses before it works, shows what it has while it works, and takes more recipes when it is done."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.cli.test_commands import run_json
from tests.tiny import save_tiny
from typer.testing import CliRunner, Result

from moebius.cli.app import app
from moebius.compare import run as comparison_run
from moebius.pipeline import run


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the checkpoints that were packed, in order; ``rtn-3`` is interrupted."""
    names: list[str] = []
    real = comparison_run.quantize_model

    def counted(source: str, out: Path, *arguments: Any, **options: Any) -> Any:
        names.append(out.name)
        if out.name == "rtn-3":
            raise KeyboardInterrupt
        return real(source, out, *arguments, **options)

    monkeypatch.setattr(comparison_run, "quantize_model", counted)
    return names


@pytest.fixture
def command(model: Path, text: Path, calibration: list[str], tmp_path: Path) -> list[str]:
    texts = ["--text", str(text), "--text-windows", "3"]
    return ["compare", str(model), *calibration, *texts, "--out", str(tmp_path / "out")]


def tried(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--quiet"])


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        ("bitsmoe@0.5", "bitsmoe: got 0.5 bits"),
        ("mxmoe@1.25", "mxmoe: got 1.25 bits"),
        ("moebius@0.3 windows=9000", "found"),
    ],
)
def test_an_impossible_recipe_is_refused_before_the_first_is_packed(
    recipe: str, why: str, command: list[str], packed: list[str], tmp_path: Path
) -> None:
    result = tried(*command, "-r", "rtn@2", "-r", recipe, "-r", "rtn@4")
    assert result.exit_code == 2 and f"recipe {recipe!r}: " in result.stderr and why in result.stderr
    assert packed == [] and not list(tmp_path.iterdir())


def test_a_router_that_cannot_be_found_is_refused_before_the_first_is_packed(
    command: list[str], packed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = run.open_model

    def hidden(*arguments: Any) -> Any:
        source = real(*arguments)
        layers = tuple(dataclasses.replace(layer, router_name=None, router=None) for layer in source.moe.moe_layers)
        return dataclasses.replace(source, moe=dataclasses.replace(source.moe, moe_layers=layers))

    monkeypatch.setattr(run, "open_model", hidden)
    result = tried(*command, "-r", "rtn@2", "-r", "mobie router=binary")
    assert result.exit_code == 2 and "no router was found" in result.stderr and packed == []


def test_the_table_grows_row_by_row_and_every_row_is_measured_when_it_is_packed(
    command: list[str], packed: list[str], tmp_path: Path
) -> None:
    assert tried(*command, "-r", "rtn@8", "-r", "rtn@2", "-r", "rtn@3").exit_code == 130
    assert packed == ["rtn-8", "rtn-2", "rtn-3"]
    folder = tmp_path / ".out.partial"
    so_far = json.loads((folder / "results.json").read_text())
    assert [row["label"] for row in so_far["rows"]] == ["original", "rtn@8", "rtn@2"]
    assert all(row["kl"] is not None for row in so_far["rows"][1:])
    assert "| rtn@2 |" in (folder / "comparison.md").read_text()
    assert not list(folder.glob("*.tmp")) and not (tmp_path / "out").exists()


def test_a_recipe_is_added_without_doing_the_others_again(command: list[str], packed: list[str], tmp_path: Path) -> None:
    before = run_json(*command, "-r", "rtn@8", "-r", "rtn@2")
    assert packed == ["rtn-8", "rtn-2"]
    assert tried(*command, "--add", "-r", "gptq@2", "-r", "rtn@3").exit_code == 130
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == before, "what was finished stays as it was"
    assert packed[2:] == ["gptq-2", "rtn-3"]
    assert tried(*command, "--add", "-r", "gptq@2", "-r", "rtn@3").exit_code == 130
    assert packed[4:] == ["rtn-3"], "a stopped addition goes on where it was"
    shutil.rmtree(tmp_path / ".out.partial")
    after = run_json(*command, "--add", "-r", "rtn@2", "-r", "rtn@4")
    assert packed[5:] == ["rtn-4"]
    assert [row["label"] for row in after["rows"]] == ["original", "rtn@8", "rtn@2", "rtn@4"]
    assert after["rows"][:3] == before["rows"]
    assert after["recipes"].keys() == {"rtn@8", "rtn@2", "rtn@4"}
    for row in after["rows"][1:]:
        assert (tmp_path / "out" / row["folder"] / "config.json").exists()
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == after
    assert not (tmp_path / ".out.partial").exists()


def test_nothing_is_added_to_a_comparison_of_something_else(
    command: list[str], packed: list[str], calibration: list[str], text: Path, tmp_path: Path
) -> None:
    nothing = tried(*command, "--add", "-r", "rtn@4")
    assert nothing.exit_code == 2 and "no finished comparison to add to" in nothing.stderr
    run_json(*command, "-r", "rtn@8")
    other_text = tried(*command, "--add", "-r", "rtn@4", "--text-windows", "2")
    assert other_text.exit_code == 2 and "this comparison has text" in other_text.stderr
    other_seed = tried(*command, "--add", "-r", "rtn@8 gain=true", "-r", "rtn@8", "--window-length", "16")
    assert other_seed.exit_code == 2
    other = save_tiny("olmoe", tmp_path / "other", seed=1)
    command[1] = str(other)
    other_model = tried(*command, "--add", "-r", "rtn@4")
    assert other_model.exit_code == 2 and "whose files are other ones" in other_model.stderr
    assert packed == ["rtn-8"]
