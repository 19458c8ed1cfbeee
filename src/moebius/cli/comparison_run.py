"""The work behind ``moebius compare``: quantize, load, measure, one recipe after the other; a stopped run goes on."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from moebius import unfinished
from moebius.calibrate.tokens import calibration_windows
from moebius.cli.loading import load_model, load_tokenizer
from moebius.errors import OutputError
from moebius.evaluate.evaluation import evaluate_model
from moebius.evaluate.plan import checkpoint_size
from moebius.evaluate.samples import complete
from moebius.evaluate.size import ModelSize, packed_checkpoint_size
from moebius.pipeline import quantize_model
from moebius.progress import Progress, Titled
from moebius.recipe import CalibrationSettings, Recipe
from moebius.report.comparison import ComparisonRow
from moebius.table import METHODS

COMPLETION_TOKENS = 40
#: Label of the row of the model that everything is compared to.
ORIGINAL = "original"


@dataclass(frozen=True)
class Comparison:
    """What to compare.

    Attributes:
        source: the original.
        candidates: label to recipe and what it looks at, in the order of the table.
        held_out: what every model is measured on.
        prompts: what every model continues.
        device: where to compute.
        matched: what ``moebius`` looks at to be set beside every recipe at as many stored bits; None leaves it out.
    """

    source: str
    candidates: Mapping[str, tuple[Recipe, CalibrationSettings]]
    held_out: CalibrationSettings
    prompts: tuple[str, ...]
    device: str
    matched: CalibrationSettings | None = None

    def to_dict(self) -> dict[str, Any]:
        """What the rows depend on, ready for JSON; not the source, which may be a path of this machine."""
        return {
            "recipes": {
                label: {"recipe": recipe.to_dict(), "calibration": calibration.to_dict()}
                for label, (recipe, calibration) in self.candidates.items()
            },
            "text": self.held_out.to_dict(),
            "prompts": list(self.prompts),
            "matched": None if self.matched is None else self.matched.to_dict(),
        }


class WorkFolder:
    """A hidden folder beside the output that becomes the output when all is done, and remembers finished rows until then.

    Raises:
        OutputError: it holds an unfinished comparison with other settings.
    """

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        self.out = out = out.absolute()
        self.folder = unfinished.beside(out)
        self._file = self.folder / "unfinished.json"
        self._state: dict[str, Any] = {"settings": settings, "costs": {}, "rows": {}}
        if self._file.exists():
            state = json.loads(self._file.read_text())
            if state["settings"] != settings:
                raise OutputError(
                    f"{self.folder}: holds an unfinished comparison with other settings; remove it, or choose another --out"
                )
            self._state = state

    def row(self, label: str, make: Callable[[], ComparisonRow]) -> ComparisonRow:
        """The row that an earlier run finished, or what ``make`` returns."""
        return ComparisonRow.from_dict(self.figures(label, lambda: make().to_dict()))

    def figures(self, label: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What an earlier run finished under this label, or what ``make`` returns, ready for JSON."""
        if label not in self._state["rows"]:
            self._remember("rows", label, make())
        return self._state["rows"][label]

    def cost(self, label: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """``seconds`` that ``work`` took and the ``peak_memory_bytes`` it reports, now or in the earlier run that did it."""
        if label not in self._state["costs"]:
            began = time.perf_counter()
            report = work()
            seconds = round(time.perf_counter() - began, 2)
            self._remember("costs", label, {"seconds": seconds, "peak_memory_bytes": report["peak_memory_bytes"]})
        return self._state["costs"][label]

    def finish(self) -> None:
        """Give the folder its name; a folder that was there, empty, stays: it may be the one that somebody stands in."""
        self._file.unlink(missing_ok=True)
        if not self.out.exists():
            self.folder.rename(self.out)
            return
        for path in self.folder.iterdir():
            path.rename(self.out / path.name)
        self.folder.rmdir()

    def _remember(self, kind: str, label: str, value: Any) -> None:
        self._state[kind][label] = value
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self._file.with_suffix(".tmp")
        draft.write_text(json.dumps(self._state))
        draft.replace(self._file)


def run_comparison(comparison: Comparison, work: WorkFolder, progress: Progress) -> tuple[Comparison, list[ComparisonRow]]:
    """The original's row and one for every recipe; the packed checkpoints stay in the work folder.

    Returns:
        The comparison with the recipes that were set beside others, and the rows; those of a matched comparison by their bits.

    Every recipe has packed its checkpoint before the original is loaded to be measured: its peak memory is its own.

    Raises:
        MoebiusError: as the commands it stands for: quantize, evaluate, generate.
    """
    costs = {label: _quantize(comparison, label, work, progress) for label in comparison.candidates}
    if comparison.matched is not None:
        others = [label for label, (recipe, _) in comparison.candidates.items() if recipe.method != "moebius"]
        stored = [packed_checkpoint_size(work.folder / folder_name(label)).bits_per_expert_weight for label in others]
        comparison = with_matches(comparison, stored)
        costs = {label: _quantize(comparison, label, work, progress) for label in comparison.candidates}
    tokenizer = load_tokenizer(comparison.source)
    windows = calibration_windows(comparison.held_out, tokenizer)
    original = load_model(comparison.source, device=comparison.device)

    def measured(label: str, model: PreTrainedModel, size: ModelSize) -> ComparisonRow:
        recipe, calibration = comparison.candidates.get(label, (None, None))
        reference = None if recipe is None else original
        evaluation = evaluate_model(model, windows, reference=reference, progress=Titled(progress, label))
        return ComparisonRow(
            label=label,
            recipe=None if recipe is None else recipe.to_dict(),
            calibration=None if calibration is None else calibration.to_dict(),
            bits_per_expert_weight=size.bits_per_expert_weight,
            file_bytes=size.file_bytes or 0,
            perplexity=evaluation.perplexity,
            perplexity_error=evaluation.perplexity_error,
            kl=evaluation.kl,
            top1_agreement=evaluation.top1_agreement,
            routing_similarity=evaluation.routing_similarity,
            completions=[complete(model, tokenizer, prompt, COMPLETION_TOKENS).text for prompt in comparison.prompts],
            **costs.get(label, {}),
        )

    def packed(label: str) -> ComparisonRow:
        folder = work.folder / folder_name(label)
        return measured(label, load_model(folder, device=comparison.device), packed_checkpoint_size(folder))

    first = work.row(ORIGINAL, lambda: measured(ORIGINAL, original, checkpoint_size(comparison.source)))
    rows = [work.row(label, partial(packed, label)) for label in comparison.candidates]
    if comparison.matched is not None:
        rows.sort(key=lambda row: row.bits_per_expert_weight)
    return comparison, [first, *rows]


def with_matches(comparison: Comparison, stored: Sequence[float]) -> Comparison:
    """With ``moebius`` at just below each of these stored bits, as far as it goes: what a recipe stores may depend on the
    model's shape, and is known once it has packed a checkpoint.
    """
    assert comparison.matched is not None
    options = METHODS["moebius"].options
    budgets = sorted({min(math.floor(bits * 1000) / 1000, options.high) for bits in stored if bits >= options.low})
    beside = {f"moebius@{bits:g}": (Recipe.make("moebius", bits), comparison.matched) for bits in budgets}
    return dataclasses.replace(comparison, candidates={**comparison.candidates, **beside})


def _quantize(comparison: Comparison, label: str, work: WorkFolder, progress: Progress) -> dict[str, Any]:
    """Seconds and peak memory of packing the checkpoint of one recipe."""
    recipe, calibration = comparison.candidates[label]
    folder, titled = work.folder / folder_name(label), Titled(progress, label)
    return work.cost(
        label,
        lambda: quantize_model(comparison.source, folder, recipe, calibration, device=comparison.device, progress=titled),
    )


def folder_name(label: str) -> str:
    """The folder of a recipe's checkpoint: its label in letters, digits, dots and dashes."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", label).strip("-.").lower() or "recipe"
