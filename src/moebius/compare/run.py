"""Quantize, load, measure, one recipe after the other; a stopped run goes on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from moebius.calibrate.tokens import calibration_windows
from moebius.compare.results import Comparison, ComparisonResult, folder_name
from moebius.compare.work_folder import WorkFolder
from moebius.evaluate.evaluation import evaluate_model
from moebius.evaluate.plan import checkpoint_size
from moebius.evaluate.size import ModelSize, packed_checkpoint_size
from moebius.generation.complete import complete
from moebius.hf.loading import load_model, load_tokenizer
from moebius.pipeline import quantize_model
from moebius.progress import Progress, Silent, Titled
from moebius.recipe import Recipe
from moebius.report.comparison import ComparisonRow
from moebius.table import METHODS

COMPLETION_TOKENS = 40
#: Label of the row of the model that everything is compared to.
ORIGINAL = "original"


def compare_models(comparison: Comparison, out: Path, progress: Progress | None = None) -> ComparisonResult:
    """Quantize a model with several recipes, and measure each beside the original. A stopped comparison goes on.

    Args:
        comparison: what to compare.
        out: the folder that appears when all is done.
        progress: told about stages and steps.

    Raises:
        OutputError: beside ``out`` lies an unfinished comparison with other settings.
        MoebiusError: as what it does: quantize, evaluate, generate.
    """
    work = WorkFolder(out, {"source": comparison.source, **comparison.to_dict()})
    comparison, rows = run_comparison(comparison, work, progress or Silent())
    result = ComparisonResult(out, comparison, tuple(rows))
    result.write(work.folder)
    work.finish()
    return result


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
