"""Recipes and calibrations as people write them: ``METHOD@BITS KEY=VALUE ...``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from moebius.errors import CalibrationError, RecipeError
from moebius.recipe import REST, CalibrationSettings, Recipe

#: Words of a recipe that say what it looks at; their fields in :class:`CalibrationSettings`, and what those are.
CALIBRATION_WORDS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "calibration": ("text", str),
    "windows": ("windows", int),
    "window_length": ("window_length", int),
    "seed": ("seed", int),
    "bos": ("bos", str),
}


def recipe_from(method: str, bits: float | None, settings: list[str] | None, rest: str = REST.default) -> Recipe:
    """The recipe that ``--method``, ``--bits``, ``--rest`` and ``--set`` describe."""
    options = parse_settings(settings or [])
    if rest != REST.default and options.setdefault("rest", rest) != rest:
        raise RecipeError(f"--rest {rest}: --set rest={options['rest']} says otherwise; give one of them")
    return Recipe.make(method, bits, **options)


def recipe_from_text(text: str) -> Recipe:
    """The recipe that ``METHOD[@BITS] [KEY=VALUE ...]`` describes, such as ``"rtn@1 gain=true"``.

    Raises:
        RecipeError: not of that form.
    """
    head, *settings = text.split() or [""]
    method, at, bits = head.partition("@")
    try:
        number = float(bits) if at else None
    except ValueError:
        raise RecipeError(
            f"recipe {text!r}: got {bits!r} bits, wanted METHOD@BITS KEY=VALUE ..., such as 'rtn@1 gain=true'"
        ) from None
    return recipe_from(method, number, settings)


def candidate_from_text(text: str, calibration: CalibrationSettings) -> tuple[Recipe, CalibrationSettings]:
    """A recipe as :func:`recipe_from_text` reads it, and a calibration of its own where words such as ``windows=16`` ask for
    one.

    Raises:
        RecipeError: not of that form.
    """
    words = text.split()
    own = parse_settings([word for word in words if word.partition("=")[0] in CALIBRATION_WORDS])
    recipe = recipe_from_text(" ".join(word for word in words if word.partition("=")[0] not in CALIBRATION_WORDS))
    try:
        changed = {field: kind(own[word]) for word, (field, kind) in CALIBRATION_WORDS.items() if word in own}
    except ValueError:
        raise RecipeError(f"recipe {text!r}: wanted whole numbers for windows, window_length and seed") from None
    merged = {**calibration.to_dict(), **changed}
    return recipe, calibration_from(**merged)


def parse_settings(settings: list[str]) -> dict[str, str]:
    """``KEY=VALUE`` texts as a dictionary.

    Raises:
        RecipeError: a text without ``=``, or a key given twice.
    """
    parsed: dict[str, str] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not (key and equals and value):
            raise RecipeError(f"--set {setting}: got no key and value, wanted KEY=VALUE, such as gain=true")
        if key in parsed:
            raise RecipeError(f"--set {setting}: {key} was already set to {parsed[key]}; give it once")
        parsed[key] = value
    return parsed


def calibration_from(
    text: str, windows: int, window_length: int, seed: int, split: str = "train", bos: str = "auto"
) -> CalibrationSettings:
    """The settings, after a look whether a file that is meant is there.

    Raises:
        CalibrationError: a path that does not exist.
    """
    require_text(text)
    if bos not in ("auto", "on", "off"):
        raise RecipeError(f"bos={bos}: wanted auto, on or off")
    return CalibrationSettings(text=text, windows=windows, window_length=window_length, seed=seed, split=split, bos=bos)


def require_text(text: str | None) -> None:
    """A text that is meant as a file is refused if it is not there.

    Raises:
        CalibrationError: a path that does not exist.
    """
    if text is not None and text.endswith((".txt", ".jsonl")) and not Path(text).expanduser().is_file():
        raise CalibrationError(f"{text}: no such file; give a .txt or .jsonl file, the name of a data set, or builtin")
