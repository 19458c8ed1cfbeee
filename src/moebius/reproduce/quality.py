"""Rows of a table: each recipe packed, then measured against the original on the table's texts and tasks."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from moebius.evaluate.evaluation import Evaluation, evaluate_model
from moebius.evaluate.plan import checkpoint_size
from moebius.evaluate.reference import StoredReference, save_reference
from moebius.evaluate.size import ModelSize, packed_checkpoint_size
from moebius.evaluate.tasks import evaluate_tasks, score_of
from moebius.progress import Titled
from moebius.reproduce.published_tables import COLUMNS, PublishedRow
from moebius.reproduce.shop import Shop

_BATCH_TOKENS = 2048  # logits of so many are held at once
_WHOLE_BYTES = 2 << 30  # of a stored reference; above, the likeliest tokens and the mass of all others
_TOP_K = 256


def measure_quality(shop: Shop) -> dict[str, dict[str, Any]]:
    """Label of a row to its figures: ``values`` by column, and what else was measured.

    The original runs once and is stored; it and a packed model are never in memory together.
    """
    for row in shop.rows():
        shop.pack(row)
    found: dict[str, dict[str, Any]] = {}
    originals = [row for row in shop.table.rows if row.original]
    if shop.setting.texts or originals:
        label = originals[0].label if originals else "original"
        figures = shop.work.figures(label, partial(_of_original, shop))
        found |= {label: figures} if originals else {}
    for row in shop.rows():
        found[row.label] = shop.work.figures(row.label, partial(_of_packed, shop, row))
    return found


def stored_reference(shop: Shop, text: str) -> StoredReference:
    """What the original says about a text of the table, asked once."""
    folder = _reference_folder(shop, text)
    if not folder.exists():
        _store(shop, shop.original(), text, folder)
    return StoredReference(folder)


def figures_of(evaluation: Evaluation) -> dict[str, Any]:
    """What is kept of an evaluation."""
    names = ("perplexity", "perplexity_error", "kl", "top1_agreement", "routing_similarity")
    return {name: getattr(evaluation, name) for name in names}


def averages(shop: Shop, values: dict[str, float]) -> dict[str, float]:
    """The columns that are means of others, where all of those were measured."""
    columns = shop.table.columns
    tasks = [values.get(column) for column in columns if COLUMNS[column].task]
    if "Avg" in columns and tasks and None not in tasks:
        values["Avg"] = sum(task for task in tasks if task is not None) / len(tasks)
    texts = [values.get(column) for column in columns if COLUMNS[column].text]
    if "AvgPPL" in columns and texts and None not in texts:
        values["AvgPPL"] = sum(text for text in texts if text is not None) / len(texts)
    return values


def _of_original(shop: Shop) -> dict[str, Any]:
    model = shop.original()
    values, texts = {}, {}
    for column, name in _texts(shop):
        folder = _reference_folder(shop, name)
        if not folder.exists():
            _store(shop, model, name, folder)
        evaluation = evaluate_model(
            model, StoredReference(folder).text, batch_size=_batch(shop), progress=Titled(shop.progress, "original")
        )
        values[column], texts[name] = evaluation.perplexity, figures_of(evaluation)
    return _figures(shop, model, checkpoint_size(shop.source), values, texts)


def _of_packed(shop: Shop, row: PublishedRow) -> dict[str, Any]:
    model = shop.packed(row.label)
    values, texts = {}, {}
    for column, name in _texts(shop):
        reference, told = stored_reference(shop, name), Titled(shop.progress, row.label)
        evaluation = evaluate_model(model, reference.text, reference=reference, batch_size=reference.batch_size, progress=told)
        values[column], texts[name] = evaluation.perplexity, figures_of(evaluation)
        if evaluation.mean_routing_similarity is not None:
            values.setdefault("routing", evaluation.mean_routing_similarity)
    folder = shop.folder(row.label)
    return {**_figures(shop, model, packed_checkpoint_size(folder), values, texts), **shop.pack(row)}


def _figures(
    shop: Shop, model: PreTrainedModel, size: ModelSize, values: dict[str, float], texts: dict[str, Any]
) -> dict[str, Any]:
    if shop.tasks is not None:
        scores = evaluate_tasks(model, shop.tokenizer(), shop.tasks, limit=shop.limit, quiet=True)
        for column in shop.table.columns:
            task = COLUMNS[column].task
            score = None if task is None else score_of(scores, task)
            if score is not None:
                values[column] = 100 * score.value
    original = checkpoint_size(shop.source)
    if size.file_bytes and original.file_bytes:
        values["saving"] = 100 * (1 - size.file_bytes / original.file_bytes)
    return {
        "values": averages(shop, values),
        "texts": texts,
        "bits_per_expert_weight": size.bits_per_expert_weight,
        "activated_bits_per_weight": size.activated_bits_per_weight,
        "file_bytes": size.file_bytes,
    }


def _texts(shop: Shop) -> list[tuple[str, str]]:
    """Column and text of the perplexities that are measured; a table without such columns has one all the same."""
    named = {COLUMNS[column].text: column for column in shop.table.columns}
    return [(named.get(text, _column_of(text)), text) for text in shop.setting.texts]


def _column_of(text: str) -> str:
    return next(name for name, column in COLUMNS.items() if column.text == text)


def _reference_folder(shop: Shop, text: str) -> Path:
    return shop.work.folder / f"reference-{text}"


def _store(shop: Shop, model: PreTrainedModel, name: str, folder: Path) -> None:
    text = shop.text(name, model)
    vocabulary = model.config.get_text_config().vocab_size
    whole = 2 * vocabulary * len(text.windows) * (text.windows.shape[1] - text.first_target) <= _WHOLE_BYTES
    save_reference(
        model,
        text,
        folder,
        settings=shop.setting.to_dict(),
        top_k=None if whole else _TOP_K,
        batch_size=_batch(shop),
        progress=Titled(shop.progress, "original"),
    )


def _batch(shop: Shop) -> int:
    return max(1, _BATCH_TOKENS // shop.setting.text_length)
