"""The work behind ``moebius compare``: quantize, load, measure, one recipe after the other; a stopped run goes on."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from moebius.calibrate.tokens import calibration_windows
from moebius.cli.loading import load_model, load_tokenizer
from moebius.errors import OutputError
from moebius.evaluate.evaluation import Evaluation, evaluate_model
from moebius.evaluate.plan import checkpoint_size
from moebius.evaluate.samples import complete
from moebius.evaluate.size import ModelSize, packed_checkpoint_size
from moebius.pipeline import quantize_model
from moebius.progress import Progress
from moebius.recipe import CalibrationSettings, Recipe
from moebius.report.comparison import ComparisonRow

COMPLETION_TOKENS = 40


@dataclass(frozen=True)
class Comparison:
    """What to compare.

    Attributes:
        source: the original.
        recipes: label to recipe, in the order of the table.
        calibration: what the recipes look at.
        held_out: what every model is measured on.
        prompts: what every model continues.
        device: where to compute.
    """

    source: str
    recipes: dict[str, Recipe]
    calibration: CalibrationSettings
    held_out: CalibrationSettings
    prompts: tuple[str, ...]
    device: str

    def to_dict(self) -> dict[str, Any]:
        """What the rows depend on, ready for JSON; not the source, which may be a path of this machine."""
        return {
            "recipes": {label: recipe.to_dict() for label, recipe in self.recipes.items()},
            "calibration": self.calibration.to_dict(),
            "text": self.held_out.to_dict(),
            "prompts": list(self.prompts),
        }


class WorkFolder:
    """A hidden folder beside the output that becomes the output when all is done, and remembers finished rows until then.

    Raises:
        OutputError: it holds an unfinished comparison with other settings.
    """

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        self.out = out
        self.folder = out.parent / f".{out.name}.partial"
        self._file = self.folder / "unfinished.json"
        self._state: dict[str, Any] = {"settings": settings, "seconds": {}, "rows": {}}
        if self._file.exists():
            state = json.loads(self._file.read_text())
            if state["settings"] != settings:
                raise OutputError(
                    f"{self.folder}: holds an unfinished comparison with other settings; remove it, or choose another --out"
                )
            self._state = state

    def row(self, label: str, make: Callable[[], ComparisonRow]) -> ComparisonRow:
        """The row that an earlier run finished, or what ``make`` returns."""
        if label not in self._state["rows"]:
            self._remember("rows", label, make().to_dict())
        return ComparisonRow.from_dict(self._state["rows"][label])

    def seconds(self, label: str, work: Callable[[], Any]) -> float:
        """How long ``work`` took, now or in the earlier run that did it."""
        if label not in self._state["seconds"]:
            began = time.perf_counter()
            work()
            self._remember("seconds", label, round(time.perf_counter() - began, 2))
        return self._state["seconds"][label]

    def finish(self) -> None:
        """Give the folder its name."""
        self._file.unlink(missing_ok=True)
        if self.out.exists():
            self.out.rmdir()  # it was empty when the command began
        self.folder.rename(self.out)

    def _remember(self, kind: str, label: str, value: Any) -> None:
        self._state[kind][label] = value
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self._file.with_suffix(".tmp")
        draft.write_text(json.dumps(self._state))
        draft.replace(self._file)


def run_comparison(comparison: Comparison, work: WorkFolder, progress: Progress) -> list[ComparisonRow]:
    """The original's row and one for every recipe; the packed checkpoints stay in the work folder.

    Raises:
        MoebiusError: as the commands it stands for: quantize, evaluate, generate.
    """
    tokenizer = load_tokenizer(comparison.source)
    windows = calibration_windows(comparison.held_out, tokenizer)
    original = load_model(comparison.source, device=comparison.device)

    def measured(
        label: str, model: PreTrainedModel, size: ModelSize, recipe: Recipe | None = None, seconds: float | None = None
    ) -> ComparisonRow:
        reference = None if recipe is None else original
        evaluation = evaluate_model(model, windows, reference=reference, progress=Titled(progress, label))
        completions = [complete(model, tokenizer, prompt, COMPLETION_TOKENS) for prompt in comparison.prompts]
        return _row(label, size, evaluation, recipe, seconds, completions)

    def quantized(label: str, recipe: Recipe) -> ComparisonRow:
        folder = work.folder / folder_name(label)
        seconds = work.seconds(
            label,
            lambda: quantize_model(
                comparison.source,
                folder,
                recipe,
                comparison.calibration,
                device=comparison.device,
                progress=Titled(progress, label),
            ),
        )
        model = load_model(folder, device=comparison.device)
        return measured(label, model, packed_checkpoint_size(folder), recipe, seconds)

    rows = [work.row("original", lambda: measured("original", original, checkpoint_size(comparison.source)))]
    for label, recipe in comparison.recipes.items():
        rows.append(work.row(label, lambda label=label, recipe=recipe: quantized(label, recipe)))  # type: ignore[misc]
    return rows


def _row(
    label: str, size: ModelSize, evaluation: Evaluation, recipe: Recipe | None, seconds: float | None, completions: list[str]
) -> ComparisonRow:
    return ComparisonRow(
        label=label,
        recipe=None if recipe is None else recipe.to_dict(),
        bits_per_expert_weight=size.bits_per_expert_weight,
        file_bytes=size.file_bytes or 0,
        perplexity=evaluation.perplexity,
        perplexity_error=evaluation.perplexity_error,
        kl=evaluation.kl,
        top1_agreement=evaluation.top1_agreement,
        routing_similarity=evaluation.routing_similarity,
        seconds=seconds,
        completions=completions,
    )


def folder_name(label: str) -> str:
    """The folder of a recipe's checkpoint: its label in letters, digits, dots and dashes."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", label).strip("-.").lower() or "recipe"


class Titled:
    """A :class:`moebius.progress.Progress` that puts a title before the name of every stage."""

    def __init__(self, progress: Progress, title: str) -> None:
        self._progress, self._title = progress, title

    def stage(self, name: str, total: int) -> None:
        self._progress.stage(f"{self._title}: {name}", total)

    def advance(self, detail: str = "") -> None:
        self._progress.advance(detail)

    def finish(self) -> None:
        self._progress.finish()
