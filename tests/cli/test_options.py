"""What is read out of options before anything heavy is imported."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from moebius.checks import require_device, require_free
from moebius.compare.presets import PRESETS, chosen_recipes
from moebius.errors import CalibrationError, ModelNotFoundError, OutputError, RecipeError, UnknownNameError
from moebius.recipe import CalibrationSettings, Recipe
from moebius.recipe_text import calibration_from, candidate_from_text, parse_settings, recipe_from_text
from moebius.source import path_or_hub_name

SEEN = CalibrationSettings()


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
    demo = chosen_recipes([], None, SEEN)
    assert demo == chosen_recipes([], "demo", SEEN)
    assert list(demo) == ["rtn@1", "gptq@2", "mobie", "mobie gain=true", "moebius"]
    ablation = [recipe for recipe, _ in chosen_recipes([], "ablation", SEEN).values()]
    parts = [(recipe.cejd, recipe.glas, recipe.nges) for recipe in ablation]
    none, c, g, n = (False,) * 3, (True, False, False), (False, True, False), (False, False, True)
    assert parts == [none, c, g, n, (True, True, False), (True, True, True)]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid(preset: str) -> None:
    candidates = list(chosen_recipes([], preset, SEEN).values())
    assert len(candidates) > 2
    assert all(one != other for one, other in itertools.combinations(candidates, 2)), "two labels for the same run"


def test_a_recipe_has_a_calibration_of_its_own_if_it_says_so() -> None:
    recipe, seen = candidate_from_text("rtn@2 windows=16 gain=true seed=3", SEEN)
    assert recipe == Recipe.make("rtn", 2, gain=True)
    assert seen == CalibrationSettings(windows=16, seed=3)
    assert candidate_from_text("rtn@2 gain=true", SEEN) == (recipe, SEEN)
    with pytest.raises(RecipeError, match="whole numbers"):
        candidate_from_text("rtn@2 windows=few", SEEN)
    with pytest.raises(CalibrationError, match="no such file"):
        candidate_from_text("rtn@2 calibration=nowhere.txt", SEEN)


def test_recipes_are_added_to_a_preset_and_given_once() -> None:
    assert list(chosen_recipes(["rtn@4"], None, SEEN)) == ["rtn@4"]
    assert list(chosen_recipes(["rtn@4"], "demo", SEEN))[-1] == "rtn@4"
    with pytest.raises(RecipeError, match="twice"):
        chosen_recipes(["rtn@4", " rtn@4"], None, SEEN)


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
            path_or_hub_name(name)
    assert path_or_hub_name("owner/name") == "owner/name"
    with pytest.raises(CalibrationError, match="no such file"):
        calibration_from(str(tmp_path / "none.txt"), 1, 2, 0)


def test_device() -> None:
    assert require_device("cpu") == "cpu"
    with pytest.raises(RecipeError, match="torch cannot use it"):
        require_device("abacus")
