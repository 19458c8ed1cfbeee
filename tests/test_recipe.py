"""Recipes: a method's own options, their defaults and ranges, and recipes that earlier versions wrote."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import subprocess
import sys
from typing import Any

import pytest

from moebius.errors import RecipeError, UnknownNameError
from moebius.methods.options import GAIN, NGES_LAMBDA
from moebius.options import MethodOptions, Option
from moebius.recipe import COMMON, CalibrationSettings, Recipe
from moebius.table import METHODS, Table

NULL_SPACE = ("nges_lambda", "nges_iterations", "null_space_threshold")


@pytest.mark.parametrize("method", METHODS)
def test_a_method_takes_its_own_options_and_no_others(method: str) -> None:
    own = {option.name: option for option in (*METHODS[method].options.options, *COMMON)}
    recipe = Recipe.make(method)
    assert recipe.to_dict().keys() == {"method", "bits", *own}
    every = {option.name: option.default for known in METHODS for option in METHODS[known].options.options}
    for name, default in every.items():
        if name in own:
            assert getattr(Recipe.make(method, **{name: getattr(recipe, name)}), name) == getattr(recipe, name)
        else:
            with pytest.raises(UnknownNameError, match=f"method '{method}' has no option '{name}'; it has: "):
                Recipe.make(method, **{name: default})
            with pytest.raises(AttributeError, match=name):
                getattr(recipe, name)


def test_null_space_options_belong_to_those_that_read_them() -> None:
    for method in METHODS:
        reads = method in ("mobie", "billm", "arb")
        for name in NULL_SPACE:
            assert (name in dict(Recipe.make(method).options)) == reads


def test_defaults_depend_on_the_bits() -> None:
    found = [
        [Recipe.make("moebius", bits).to_dict()[name] for name in ("planes", "scale_bits", "loss_weighted")]
        for bits in (0.5, 0.99, 1, 1.24, 1.25, 1.5, 2, 2.49, 2.5, 4)
    ]
    assert found == [
        *([4, 5, True], [4, 5, True], [4, 5, False], [4, 5, False], [6, 5, False]),
        *([6, 6, False], [6, 8, False], [6, 8, False], [7, 8, False], [7, 8, False]),
    ]
    assert [Recipe.make("rtn", bits).group_size for bits in (1, 2, 8)] == [0, 128, 128]
    assert (Recipe.make("kbvq").idre, Recipe.make("gptvq").idre) == (True, False)


@pytest.mark.parametrize(
    ("method", "option", "value", "wanted"),
    [
        ("moebius", "planes", 8, "wanted one of 1, 2, 3"),
        ("moebius", "planes", 2.5, "got 2.5, wanted a whole number"),
        ("moebius", "sweeps", -1, "got -1, wanted 0 to 1000"),
        ("moebius", "damping", float("nan"), "wanted 0 to 1"),
        ("moebius", "damping", float("inf"), "wanted 0 to 1"),
        ("moebius", "sweeps", float("inf"), "wanted a whole number"),
        ("moebius", "refine_steps", 0, "wanted 1 to 1000000"),
        ("moebius", "gain", "maybe", "wanted true or false"),
        ("moebius", "gain", None, "wanted true or false"),
        ("rtn", "group_size", 1 << 21, "wanted 0 to 1048576"),
        ("rtn", "group_size", [], "wanted a whole number"),
        ("mobie", "nges_lambda", "much", "wanted a number"),
        ("mobie", "rest", "int2", "wanted one of bf16, int8, int4"),
    ],
)
def test_values_that_are_refused(method: str, option: str, value: Any, wanted: str) -> None:
    with pytest.raises(RecipeError, match=f"option {option}: .*{wanted}"):
        Recipe.make(method, **{option: value})


def test_recipes_of_earlier_versions_are_read() -> None:
    """As 0.1 stored them: every method had null-space options, and two options other names."""
    old = {"method": "moebius", "bits": 0.5, "felt": False, "layer_lean": 0.1, "rest": "int8", "planes": 3}
    recipe = Recipe.from_dict({**old, "nges_lambda": 0.2, "nges_iterations": 15, "null_space_threshold": 0.01})
    assert recipe == Recipe.make("moebius", 0.5, loss_weighted=False, shrinkage=0.1, rest="int8", planes=3)
    assert Recipe.from_dict({"method": "mobie", "bits": 1, "nges_lambda": 0.5}).nges_lambda == 0.5
    assert Recipe.make("rtn", 2, layer_lean="0.5") == Recipe.make("rtn", 2, shrinkage=0.5)
    with pytest.raises(RecipeError, match="got it twice"):
        Recipe.make("rtn", 2, layer_lean=0.5, shrinkage=0.5)
    with pytest.raises(UnknownNameError, match="no option 'runes'"):
        Recipe.from_dict({"method": "rtn", "bits": 2, "runes": 1})


@pytest.mark.parametrize("method", METHODS)
def test_recipes_survive_json_copies_and_pickles(method: str) -> None:
    recipe = Recipe.make(method, gain=True, shared_experts=4)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    for again in (copy.deepcopy(recipe), pickle.loads(pickle.dumps(recipe)), dataclasses.replace(recipe)):
        assert again == recipe and hash(again) == hash(recipe) and again.gain
    assert recipe != Recipe.make(method, gain=False, shared_experts=4)


def test_an_option_a_method_does_not_have_is_at_its_default() -> None:
    assert Recipe.make("mobie", nges_lambda=0.7).value(NGES_LAMBDA) == 0.7
    assert Recipe.make("rtn", router="binary").value(NGES_LAMBDA) == NGES_LAMBDA.default


def test_declarations_are_checked() -> None:
    for options, message in (
        ((GAIN, GAIN), "gain: declared twice"),
        ((Option("seed", 1, ""),), "seed: declared twice, or a word"),
        ((Option("lean", 1, "", formerly=("gain",)), GAIN), "gain: declared twice"),
        ((Option("width", 9, "", high=8),), "width: got 9"),
        ((Option("width", 1, "", high=8, from_bits=((2, 9),)),), "width: got 9"),
    ):
        with pytest.raises(RecipeError, match=message):
            MethodOptions(options, default_bits=1, low=1, high=2)


def test_a_table_refuses_names_that_are_taken_or_cannot_be_typed() -> None:
    table = Table("thing", {"one": "math:pi"})
    table.register("one", "math:pi")  # the same again: a module that is imported twice
    for name in ("one", "", "a b", "a@b", "a=b"):
        with pytest.raises(UnknownNameError, match=r"wanted a name without|one of that name already"):
            table.register(name, "math:e")
    table.register("two", 2)
    assert dict(table) == {"one": 3.141592653589793, "two": 2} and "two" in table and "three" not in table


def test_names_are_known_without_importing_methods() -> None:
    code = "import sys, moebius.recipe as r; assert 'rtn' in r.METHODS and list(r.METHODS); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_calibration_settings_have_a_dictionary() -> None:
    assert CalibrationSettings(**CalibrationSettings(windows=3).to_dict()) == CalibrationSettings(windows=3)
