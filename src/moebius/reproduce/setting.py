"""What a table is made with on a given model: the paper's calibration, protocol and texts, or what stands in for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from moebius.checkpoint.reader import locate
from moebius.errors import MoebiusError, UnknownNameError
from moebius.evaluate.plan import plan_model
from moebius.recipe import CalibrationSettings, Recipe
from moebius.reproduce.published_tables import PublishedRow, PublishedTable, paper_models
from moebius.table import METHODS, nearest

#: On the reference model, which has read Python alone: its own text, and as much of it as takes minutes.
_SMALL_CALIBRATION = CalibrationSettings()
_SMALL_WINDOWS, _SMALL_LENGTH = 64, 256


@dataclass(frozen=True)
class Wishes:
    """What whoever asks wants otherwise than the paper had it; None: as the paper, or as suits the reference model.

    Attributes:
        calibration, windows, window_length, seed: of the calibration.
        text: stands in for the first text of the table.
        text_windows, text_length: of the evaluation.
        beside: the published model whose figures stand beside the measured ones.
    """

    calibration: str | None = None
    windows: int | None = None
    window_length: int | None = None
    seed: int | None = None
    text: str | None = None
    text_windows: int | None = None
    text_length: int | None = None
    beside: str | None = None


@dataclass(frozen=True)
class Setting:
    """What a table is made with.

    Attributes:
        model: name of the paper's model that this is; None for any other.
        beside: the published model whose figures are printed.
        calibration: of rows that say nothing else.
        texts: text of the table to what is read for it; those that nothing stands in for are left out.
        protocol, text_windows, text_length: of the evaluation; None: all windows.
        is_small: the texts are the reference model's own.
    """

    model: str | None
    beside: str | None
    calibration: CalibrationSettings
    texts: Mapping[str, str]
    protocol: str
    text_windows: int | None
    text_length: int
    is_small: bool

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return {**dataclasses.asdict(self), "texts": dict(self.texts)}


def setting_for(table: PublishedTable, source: str, is_reference: bool, wishes: Wishes) -> Setting:
    """What a table is made with on a model.

    Args:
        source: folder or hub name of the model.
        is_reference: it is the reference model of this package, which no text and no task of the papers suits.

    Raises:
        UnknownNameError: figures of a model that the table does not have.
        ModelNotFoundError: no such model.
    """
    model = None if is_reference else paper_model(source)
    beside = wishes.beside or (model if model in table.models else next(iter(table.models), None))
    if wishes.beside is not None and wishes.beside not in table.models:
        raise UnknownNameError(
            f"--beside {wishes.beside}: {table.name} has no figures of it{nearest(wishes.beside, table.models)};"
            f" it has {', '.join(table.models) or 'none of any model'}"
        )
    calibration = _SMALL_CALIBRATION if is_reference else CalibrationSettings(**table.calibration)
    if is_reference:
        calibration = dataclasses.replace(calibration, seed=table.calibration.get("seed", 0))
    names = ("windows", "window_length", "seed")
    asked: dict[str, Any] = {"text": wishes.calibration, **{name: getattr(wishes, name) for name in names}}
    calibration = dataclasses.replace(calibration, **{name: value for name, value in asked.items() if value is not None})
    texts = {text: text for text in table.texts}
    if wishes.text is not None or is_reference:
        texts = dict.fromkeys(table.texts[:1], wishes.text or "builtin")
    length = table.protocol["window_length"]
    small = min(length, _SMALL_LENGTH) if is_reference else length
    return Setting(
        model=model,
        beside=beside,
        calibration=calibration,
        texts=texts,
        protocol=table.protocol["name"],
        text_windows=wishes.text_windows or (_SMALL_WINDOWS * _SMALL_LENGTH // small if is_reference else None),
        text_length=wishes.text_length or small,
        is_small=is_reference,
    )


def paper_model(source: str) -> str | None:
    """The model of the papers that a checkpoint is, by what its config says; None for any other."""
    folder = locate(source)
    config = AutoConfig.from_pretrained(folder)
    for name, values in paper_models().items():
        if all(getattr(config, key, None) == value for key, value in values.items()):
            return f"{name}-Chat" if _is_chat(Path(source).name, name) else name
    return None


def _is_chat(folder: str, name: str) -> bool:
    """Only Qwen1.5-MoE is published both ways, and only what a checkpoint is called tells which it is."""
    return name == "Qwen1.5-MoE-A2.7B" and "chat" in folder.lower()


def row_calibration(setting: Setting, row: PublishedRow) -> CalibrationSettings:
    """What the recipe of a row looks at."""
    changed = dict(row.calibration)
    if changed.get("text") in setting.texts:
        changed["text"] = setting.calibration.text if setting.is_small else changed["text"]
    return dataclasses.replace(setting.calibration, **changed)


def why_not(setting: Setting, source: str, row: PublishedRow) -> str | None:
    """Why the recipe of a row cannot be made here, in one line; None if it can, or if there is none.

    It is asked before the work: methods, options and bits of the recipe, then its plan for the model.
    """
    if row.recipe is None:
        return None
    if row.recipe["method"] not in METHODS:
        return f"not built: there is no method {row.recipe['method']!r}"
    try:
        recipe = Recipe.make(**row.recipe)
    except MoebiusError as error:
        return f"not built: {error}"
    text = row.calibration.get("text")
    if setting.is_small and text is not None and text not in setting.texts:
        return f"not measured: nothing stands in for {text} here"
    try:
        plan_model(source, recipe, row_calibration(setting, row))
    except MoebiusError as error:
        return f"impossible here: {error}"
    return None
