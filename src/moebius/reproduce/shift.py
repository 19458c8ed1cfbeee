"""Expert shift apart from weight error (MoBiE Table 1): the weights of one model, the routing of another."""

from __future__ import annotations

from functools import partial
from typing import Any

from transformers import PreTrainedModel

from moebius.errors import RecipeError
from moebius.evaluate.evaluation import evaluate_model
from moebius.evaluate.reference import StoredReference
from moebius.progress import Titled
from moebius.recipe import Recipe
from moebius.reproduce.published_tables import COLUMNS, PublishedRow
from moebius.reproduce.quality import figures_of, stored_reference
from moebius.reproduce.setting import why_not
from moebius.reproduce.shop import Shop

_PACKED = "quantized"


def measure_expert_shift(shop: Shop) -> dict[str, dict[str, Any]]:
    """Label of a row to the perplexity of its weights under its routing. Both models are in memory together."""
    pack_own(shop)
    original, packed = shop.original(), shop.packed(_PACKED)
    (name,) = list(shop.setting.texts)[:1]
    column = next(key for key in shop.table.columns if COLUMNS[key].text == name)
    reference = stored_reference(shop, name)
    models = {"original": original, _PACKED: packed}
    return {
        row.label: shop.work.figures(row.label, partial(_measured, shop, row, models, reference, column))
        for row in shop.table.rows
    }


def pack_own(shop: Shop) -> Recipe:
    """The packed checkpoint of the recipe that a table has as a whole, under the name ``quantized``.

    Raises:
        RecipeError: it cannot be made here.
    """
    row = PublishedRow(_PACKED, recipe=shop.table.options["recipe"])
    reason = why_not(shop.setting, shop.source, row)
    if reason is not None:
        raise RecipeError(f"{shop.table.name}: {reason}")
    shop.pack(row)
    return Recipe.make(**shop.table.options["recipe"])


def _measured(
    shop: Shop, row: PublishedRow, models: dict[str, PreTrainedModel], reference: StoredReference, column: str
) -> dict[str, Any]:
    weights, routing = row.options["weights"], row.options["routing"]
    evaluation = evaluate_model(
        models[weights],
        reference.text,
        reference=reference,
        routing_from=None if routing == weights else models[routing],
        batch_size=reference.batch_size,
        progress=Titled(shop.progress, row.label),
    )
    return {"values": {column: evaluation.perplexity}, "texts": {column: figures_of(evaluation)}}
