"""Quantize, load, measure, one recipe after the other; a stopped run goes on."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from moebius.calibrate.tokens import calibration_windows
from moebius.checkpoint.reader import SourceCheckpoint
from moebius.compare.results import RESULTS_NAME, Comparison, ComparisonResult, folder_name
from moebius.compare.work_folder import WorkFolder
from moebius.errors import MoebiusError, OutputError
from moebius.evaluate.evaluation import evaluate_model
from moebius.evaluate.plan import checkpoint_size
from moebius.evaluate.size import ModelSize, packed_checkpoint_size
from moebius.generation.complete import complete
from moebius.hf.loading import load_model, load_tokenizer
from moebius.memory import return_freed_memory
from moebius.pipeline import check_recipe, quantize_model
from moebius.progress import Progress, Silent, Titled
from moebius.recipe import CalibrationSettings, Recipe
from moebius.report.comparison import ComparisonRow
from moebius.table import METHODS

COMPLETION_TOKENS = 40
#: Label of the row of the model that everything is compared to.
ORIGINAL = "original"
#: Told about the rows so far, and the comparison with what was set beside others by then.
Grown = Callable[[Comparison, Sequence[ComparisonRow]], None]


def compare_models(
    comparison: Comparison, out: Path, progress: Progress | None = None, *, add: bool = False
) -> ComparisonResult:
    """Quantize a model with several recipes, and measure each beside the original. A stopped comparison goes on.

    Args:
        comparison: what to compare.
        out: the folder that appears when all is done.
        progress: told about stages and steps.
        add: ``out`` holds a finished comparison, which gets the recipes that it does not have.

    Raises:
        OutputError: beside ``out`` lies an unfinished comparison with other settings, or the one to add to is another's.
        MoebiusError: as what it does: quantize, evaluate, generate.
    """
    fingerprint = SourceCheckpoint.open(comparison.source).fingerprint()
    if add:
        comparison = added_to(comparison, fingerprint, out)
    work = WorkFolder(out, {"source": comparison.source, **comparison.to_dict()}, comparison.finished)

    def result(now: Comparison, rows: Sequence[ComparisonRow]) -> ComparisonResult:
        return ComparisonResult(out, now, tuple(rows), fingerprint)

    comparison, rows = run_comparison(
        comparison, work, progress or Silent(), lambda now, rows: result(now, rows).write_table(work.folder)
    )
    final = result(comparison, rows)
    final.write(work.folder)
    work.finish()
    return final


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
        for label in [label for label in comparison.candidates if label not in {row.label for row in rows}]:
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


def added_to(comparison: Comparison, fingerprint: str, out: Path) -> Comparison:
    """The finished comparison in a folder and the recipes that are new in this one; what was measured stays as it is.

    Args:
        comparison: with the recipes to add; those that are there already are left out.
        fingerprint: of the files of its original.
        out: the folder of the finished one.

    Raises:
        OutputError: there is none, or it measured another model, on another text, or a recipe of the same name in another way.
    """
    try:
        found: dict[str, Any] = json.loads((out / RESULTS_NAME).read_text())
        _ = [found[name] for name in ("model", "recipes", "text", "prompts", "matched", "rows")]
    except (OSError, ValueError, KeyError, TypeError):
        raise OutputError(f"{out}: has no finished comparison to add to; leave out --add, or name the folder of one") from None
    if found.get("model_sha256") != fingerprint:
        raise OutputError(f"{out}: compares {found['model']}, whose files are other ones; choose another --out")
    mine = comparison.to_dict()
    for what in ("text", "prompts"):
        if mine[what] != found[what]:
            raise OutputError(
                f"--add: this comparison has {what} {found[what]}, got {mine[what]}; give the same, or choose another --out"
            )
    candidates = {
        label: (Recipe.from_dict(values["recipe"]), CalibrationSettings(**values["calibration"]))
        for label, values in found["recipes"].items()
    }
    for label, candidate in comparison.candidates.items():
        if candidates.setdefault(label, candidate) != candidate:
            raise OutputError(f"--add: {label!r} is there already with another calibration; give it a word of its own")
    matched = comparison.matched or (CalibrationSettings(**found["matched"]) if found["matched"] else None)
    rows = tuple(ComparisonRow.from_dict(row) for row in found["rows"])
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
