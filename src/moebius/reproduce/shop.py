"""What every measurement of a table is given: the model, the setting, and a folder in which finished work is remembered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from moebius.calibrate.tokens import calibration_windows
from moebius.compare.results import folder_name
from moebius.compare.work_folder import WorkFolder
from moebius.evaluate.protocol import EvaluationText, evaluation_text
from moebius.evaluate.tasks import LoadedTasks
from moebius.hf.loading import load_model, load_tokenizer
from moebius.models.limits import positions_of
from moebius.pipeline import quantize_model
from moebius.progress import Progress, Titled
from moebius.recipe import Recipe
from moebius.reproduce.published_tables import PublishedRow, PublishedTable
from moebius.reproduce.setting import Setting, row_calibration


@dataclass(frozen=True)
class Shop:
    """What a measurement works with.

    Attributes:
        table: what is made.
        source: folder or hub name of the model.
        setting: what it is made with.
        left_out: label of a row to why its recipe is not measured.
        work: where packed checkpoints and finished figures go.
        device: where to compute.
        tasks: to ask every model; None: no tasks.
        limit: documents of each task; None: all.
        progress: told about everything.
    """

    table: PublishedTable
    source: str
    setting: Setting
    left_out: Mapping[str, str]
    work: WorkFolder
    device: str
    tasks: LoadedTasks | None
    limit: int | None
    progress: Progress

    def rows(self) -> list[PublishedRow]:
        """Those with a recipe that can be made."""
        return [row for row in self.table.rows if row.recipe is not None and row.label not in self.left_out]

    def original(self) -> PreTrainedModel:
        """The model itself."""
        return load_model(self.source, device=self.device)

    def packed(self, label: str) -> PreTrainedModel:
        """The packed model of a row."""
        return load_model(self.folder(label), device=self.device)

    def folder(self, label: str) -> Path:
        """Where the packed checkpoint of a row is."""
        return self.work.folder / folder_name(label)

    def tokenizer(self) -> Any:
        """The model's."""
        return load_tokenizer(self.source)

    def pack(self, row: PublishedRow) -> dict[str, Any]:
        """Make the packed checkpoint of a row; seconds and peak memory."""
        return self.work.cost(row.label, partial(self.quantized, row))

    def quantized(self, row: PublishedRow) -> dict[str, Any]:
        """Make the packed checkpoint of a row; the report of the run."""
        assert row.recipe is not None
        folder, told = self.folder(row.label), Titled(self.progress, row.label)
        recipe, calibration = Recipe.make(**row.recipe), row_calibration(self.setting, row)
        return quantize_model(self.source, folder, recipe, calibration, device=self.device, progress=told)

    def text(self, name: str, model: PreTrainedModel) -> EvaluationText:
        """A text of the table in windows, under the table's protocol."""
        setting = self.setting
        length = min(setting.text_length, positions_of(model.config) or setting.text_length)
        tokenizer = self.tokenizer()
        return evaluation_text(
            setting.protocol, setting.texts[name], tokenizer, windows=setting.text_windows, window_length=length
        )

    def calibration_windows(self) -> Any:
        """The windows that recipes look at. (windows, window_length) int64"""
        return calibration_windows(self.setting.calibration, self.tokenizer())
