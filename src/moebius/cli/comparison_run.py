"""The work behind ``moebius compare``: quantize, load, measure, one recipe after the other; a stopped run goes on."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from moebius import unfinished
from moebius.calibrate.tokens import calibration_windows
from moebius.cli.loading import load_model, load_tokenizer
from moebius.errors import MoebiusError, OutputError
from moebius.evaluate.evaluation import evaluate_model
from moebius.evaluate.plan import checkpoint_size
from moebius.evaluate.samples import complete
from moebius.evaluate.size import ModelSize, packed_checkpoint_size
from moebius.memory import return_freed_memory
from moebius.pipeline import check_recipe, quantize_model
from moebius.progress import Progress
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
        finished: rows that an earlier comparison has measured; their recipes are among the candidates.
    """

    source: str
    candidates: Mapping[str, tuple[Recipe, CalibrationSettings]]
    held_out: CalibrationSettings
    prompts: tuple[str, ...]
    device: str
    matched: CalibrationSettings | None = None
    finished: tuple[ComparisonRow, ...] = ()

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

    def __init__(self, out: Path, settings: dict[str, Any], finished: Sequence[ComparisonRow] = ()) -> None:
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
        self._state["rows"].update({row.label: row.to_dict() for row in finished})

    def __contains__(self, label: str) -> bool:
        return label in self._state["rows"]

    def row(self, label: str, make: Callable[[], ComparisonRow]) -> ComparisonRow:
        """The row that an earlier run finished, or what ``make`` returns."""
        if label not in self._state["rows"]:
            self._remember("rows", label, make().to_dict())
        return ComparisonRow.from_dict(self._state["rows"][label])

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
        for path in sorted(self.folder.iterdir(), key=Path.is_file):  # checkpoints before the table that names them
            path.rename(self.out / path.name)
        self.folder.rmdir()

    def _remember(self, kind: str, label: str, value: Any) -> None:
        self._state[kind][label] = value
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self._file.with_suffix(".tmp")
        draft.write_text(json.dumps(self._state))
        draft.replace(self._file)


#: Told about the rows so far, and the comparison with what was set beside others by then.
Grown = Callable[[Comparison, Sequence[ComparisonRow]], None]


def run_comparison(
    comparison: Comparison, work: WorkFolder, progress: Progress, grown: Grown = lambda comparison, rows: None
) -> tuple[Comparison, list[ComparisonRow]]:
    """The original's row and one for every recipe; the packed checkpoints stay in the work folder.

    Every recipe is checked against the model before the first is quantized, and measured as soon as it is packed. The original
    is in memory while a row is measured, and not while one is packed: peak memory is that of the recipe.

    Args:
        comparison: what to compare.
        work: what is finished, and where the rest goes.
        progress: told about stages and steps.
        grown: called after every row.

    Returns:
        The comparison with the recipes that were set beside others, and the rows; those of a matched comparison by their bits.

    Raises:
        MoebiusError: as the commands it stands for: quantize, evaluate, generate.
    """
    check_candidates(comparison, work)
    rows = [work.row(ORIGINAL, lambda: _Measurement(comparison, progress).original())]
    for label in comparison.candidates:
        _add(label, comparison, work, progress, rows)
        grown(comparison, rows)
    if comparison.matched is not None:
        own = {label for label, (recipe, _) in comparison.candidates.items() if recipe.method == "moebius"}
        comparison = with_matches(comparison, [row.bits_per_expert_weight for row in rows[1:] if row.label not in own])
        for label in comparison.candidates.keys() - {row.label for row in rows}:
            _add(label, comparison, work, progress, rows)
            grown(comparison, rows)
        rows[1:] = sorted(rows[1:], key=lambda row: row.bits_per_expert_weight)
    return comparison, rows


def check_candidates(comparison: Comparison, work: WorkFolder) -> None:
    """Refuse what any recipe would be refused for, before hours were spent on those before it.

    Raises:
        MoebiusError: of the same class, with the recipe's label in front.
    """
    for label, (recipe, calibration) in comparison.candidates.items():
        if label not in work:
            try:
                check_recipe(comparison.source, recipe, calibration, comparison.device)
            except MoebiusError as error:
                raise type(error)(f"recipe {label!r}: {error}") from error


def _add(label: str, comparison: Comparison, work: WorkFolder, progress: Progress, rows: list[ComparisonRow]) -> None:
    """Pack a recipe's checkpoint and measure it, or take up what an earlier run did of that."""

    def measured() -> ComparisonRow:
        cost = _quantize(comparison, label, work, progress)
        return _Measurement(comparison, progress).packed(label, work.folder / folder_name(label), cost)

    rows.append(work.row(label, measured))


class _Measurement:
    """The original and the windows, in memory for as long as one row is measured."""

    def __init__(self, comparison: Comparison, progress: Progress) -> None:
        self._comparison, self._progress = comparison, progress
        self._tokenizer = load_tokenizer(comparison.source)
        self._windows = calibration_windows(comparison.held_out, self._tokenizer)
        self._original = load_model(comparison.source, device=comparison.device)

    def original(self) -> ComparisonRow:
        """Its own row."""
        return self._row(ORIGINAL, self._original, checkpoint_size(self._comparison.source), {})

    def packed(self, label: str, folder: Path, cost: dict[str, Any]) -> ComparisonRow:
        """The row of a packed checkpoint."""
        return self._row(label, load_model(folder, device=self._comparison.device), packed_checkpoint_size(folder), cost)

    def _row(self, label: str, model: PreTrainedModel, size: ModelSize, cost: dict[str, Any]) -> ComparisonRow:
        recipe, calibration = self._comparison.candidates.get(label, (None, None))
        reference = None if recipe is None else self._original
        evaluation = evaluate_model(model, self._windows, reference=reference, progress=Titled(self._progress, label))
        prompts = self._comparison.prompts
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
            completions=[complete(model, self._tokenizer, prompt, COMPLETION_TOKENS).text for prompt in prompts],
            **cost,
        )


def added_to(comparison: Comparison, results: dict[str, Any]) -> Comparison:
    """A finished comparison and the recipes that are new in this one; what it has measured stays as it is.

    Args:
        comparison: with the recipes to add; those that are there already are left out.
        results: of the finished one, as its results.json has them.

    Raises:
        OutputError: it measured another model, on another text, or a recipe of the same name in another way.
    """
    mine, theirs = comparison.to_dict(), results
    for what in ("text", "prompts"):
        if mine[what] != theirs[what]:
            raise OutputError(
                f"--add: this comparison has {what} {theirs[what]}, got {mine[what]}; give the same, or choose another --out"
            )
    candidates = {
        label: (Recipe.from_dict(values["recipe"]), CalibrationSettings(**values["calibration"]))
        for label, values in theirs["recipes"].items()
    }
    for label, candidate in comparison.candidates.items():
        if candidates.setdefault(label, candidate) != candidate:
            raise OutputError(f"--add: {label!r} is there already with another calibration; give it a word of its own")
    matched = comparison.matched or (CalibrationSettings(**theirs["matched"]) if theirs["matched"] else None)
    rows = tuple(ComparisonRow.from_dict(row) for row in theirs["rows"])
    return dataclasses.replace(comparison, candidates=candidates, matched=matched, finished=rows)


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

    def quantize() -> dict[str, Any]:
        return_freed_memory()
        return quantize_model(comparison.source, folder, recipe, calibration, device=comparison.device, progress=titled)

    return work.cost(label, quantize)


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
