"""What every measurement of a table is given: the model, the setting, and a folder in which finished work is remembered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedModel

from moebius.calibrate.tokens import calibration_windows
from moebius.evaluate.protocol import EvaluationText, evaluation_text
from moebius.evaluate.tasks import LoadedTasks
from moebius.models.limits import positions_of
from moebius.pipeline import quantize_model
from moebius.progress import Progress, Titled
from moebius.recipe import Recipe
from moebius.reproduce.published_tables import PublishedRow, PublishedTable
from moebius.reproduce.setting import Setting, row_calibration


class Work(Protocol):
    """A folder that remembers what was finished, so that a run that was stopped goes on."""

    folder: Path

    def figures(self, label: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What ``make`` returned, now or in an earlier run."""

    def cost(self, label: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Seconds and peak memory of ``work``, now or in an earlier run."""


@dataclass(frozen=True)
class Shop:
    """What a measurement works with.

    Attributes:
        table: what is made.
        source: folder or hub name of the model.
        setting: what it is made with.
        left_out: label of a row to why its recipe is not measured.
        work: where packed checkpoints and finished figures go.
        load_model: a model from its folder.
        load_tokenizer: its tokenizer.
        folder_name: what the packed checkpoint of a row is called.
        device: where to compute.
        tasks: to ask every model; None: no tasks.
        limit: documents of each task; None: all.
        progress: told about everything.
    """

    table: PublishedTable
    source: str
    setting: Setting
    left_out: Mapping[str, str]
    work: Work
    load_model: Callable[..., PreTrainedModel]
    load_tokenizer: Callable[[str], Any]
    folder_name: Callable[[str], str]
    device: str
    tasks: LoadedTasks | None
    limit: int | None
    progress: Progress

    def rows(self) -> list[PublishedRow]:
        """Those with a recipe that can be made."""
        return [row for row in self.table.rows if row.recipe is not None and row.label not in self.left_out]

    def original(self) -> PreTrainedModel:
        """The model itself."""
        return self.load_model(self.source, device=self.device)

    def packed(self, label: str) -> PreTrainedModel:
        """The packed model of a row."""
        return self.load_model(self.work.folder / self.folder_name(label), device=self.device)

    def pack(self, row: PublishedRow) -> dict[str, Any]:
        """Make the packed checkpoint of a row; seconds and peak memory."""
        return self.work.cost(row.label, partial(self.quantized, row))

    def quantized(self, row: PublishedRow) -> dict[str, Any]:
        """Make the packed checkpoint of a row; the report of the run."""
        assert row.recipe is not None
        folder, told = self.work.folder / self.folder_name(row.label), Titled(self.progress, row.label)
        recipe, calibration = Recipe.make(**row.recipe), row_calibration(self.setting, row)
        return quantize_model(self.source, folder, recipe, calibration, device=self.device, progress=told)

    def text(self, name: str, model: PreTrainedModel) -> EvaluationText:
        """A text of the table in windows, under the table's protocol."""
        setting = self.setting
        length = min(setting.text_length, positions_of(model.config) or setting.text_length)
        tokenizer = self.load_tokenizer(self.source)
        return evaluation_text(
            setting.protocol, setting.texts[name], tokenizer, windows=setting.text_windows, window_length=length
        )

    def calibration_windows(self) -> Any:
        """The windows that recipes look at. (windows, window_length) int64"""
        return calibration_windows(self.setting.calibration, self.load_tokenizer(self.source))
