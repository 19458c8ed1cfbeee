"""What is read out of options before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path

import pytest

from moebius.cli.compare import PRESETS, chosen_recipes
from moebius.cli.options import (
    calibration_from,
    model_or_reference,
    options_help,
    parse_settings,
    recipe_from_text,
    require_device,
    require_free,
)
from moebius.errors import CalibrationError, ModelNotFoundError, OutputError, RecipeError, UnknownNameError
from moebius.recipe import METHOD_OPTIONS, Recipe


def test_settings() -> None:
    assert parse_settings(["gain=true", "side=hidden"]) == {"gain": "true", "side": "hidden"}
    for wrong in (["gain"], ["=true"], ["gain="], ["gain=true", "gain=false"]):
        with pytest.raises(RecipeError, match="--set"):
            parse_settings(wrong)


def test_recipes_as_text() -> None:
    assert recipe_from_text("rtn@1 gain=true") == Recipe.make("rtn", 1, gain=True)
    assert recipe_from_text("  mobie   side=hidden ") == Recipe.make("mobie", side="hidden")
    with pytest.raises(RecipeError, match="'one' bits"):
        recipe_from_text("rtn@one")
    with pytest.raises(UnknownNameError, match="no method named"):
        recipe_from_text("")
    with pytest.raises(RecipeError, match="9 bits"):
        recipe_from_text("gptq@9")


def test_presets_are_the_promised_rows() -> None:
    demo = chosen_recipes([], None)
    assert demo == chosen_recipes([], "demo")
    assert list(demo) == ["rtn@1", "gptq@2", "mobie", "mobie gain=true"]
    ablation = chosen_recipes([], "ablation")
    parts = [(recipe.cejd, recipe.glas, recipe.nges) for recipe in ablation.values()]
    none, c, g, n = (False,) * 3, (True, False, False), (False, True, False), (False, False, True)
    assert parts == [none, c, g, n, (True, True, False), (True, True, True)]
    assert PRESETS.keys() == {"demo", "ablation"}


def test_recipes_are_added_to_a_preset_and_given_once() -> None:
    assert list(chosen_recipes(["rtn@4"], None)) == ["rtn@4"]
    assert list(chosen_recipes(["rtn@4"], "demo"))[-1] == "rtn@4"
    with pytest.raises(RecipeError, match="twice"):
        chosen_recipes(["rtn@4", " rtn@4"], None)


def test_output_folder(tmp_path: Path) -> None:
    assert require_free(tmp_path / "new") == tmp_path / "new"
    assert require_free(tmp_path) == tmp_path
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="not empty"):
        require_free(tmp_path)
    with pytest.raises(OutputError, match="is a file"):
        require_free(tmp_path / "file")


def test_paths_that_are_not_there(tmp_path: Path) -> None:
    for name in (str(tmp_path / "none"), "./none", "~/none/at/all", "a/b/c"):
        with pytest.raises(ModelNotFoundError, match="no such file or folder"):
            model_or_reference(name)
    assert model_or_reference("owner/name") == "owner/name"
    with pytest.raises(CalibrationError, match="no such file"):
        calibration_from(str(tmp_path / "none.txt"), 1, 2, 0)


def test_device() -> None:
    assert require_device("cpu") == "cpu"
    with pytest.raises(RecipeError, match="torch cannot use it"):
        require_device("abacus")


def test_help_names_every_method_and_option() -> None:
    text = options_help()
    for name, spec in METHOD_OPTIONS.items():
        assert f"[bold]{name}[/bold]" in text
        for option in spec.options:
            assert f"[cyan]{option}[/cyan]=" in text
