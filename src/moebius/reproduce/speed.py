"""Tokens per second, memory of activated weights and seconds of quantization (MoBiE Figure 6)."""

from __future__ import annotations

from functools import partial
from typing import Any

from moebius.evaluate.plan import checkpoint_size
from moebius.evaluate.size import ModelSize, packed_checkpoint_size
from moebius.evaluate.speed import SpeedSettings, measure_speed, warm_up
from moebius.models.limits import positions_of
from moebius.reproduce.published_tables import PublishedRow
from moebius.reproduce.shop import Shop

#: The paper's: four sequences, prompts of 1024 tokens, 256 decoded after them. Below: for models with fewer positions.
_PAPER = SpeedSettings(prompt=1024, context=1024, new=256, batch=4, repeats=1)
_SMALL = SpeedSettings(prompt=128, context=128, new=32, batch=4, repeats=1)


def measure_tokens_per_second(shop: Shop) -> dict[str, dict[str, Any]]:
    """Label of a row to tokens per second of whole requests, gigabytes that a token touches, and seconds of quantization."""
    for row in shop.rows():
        shop.pack(row)
    rows = [row for row in shop.table.rows if row.original or row in shop.rows()]
    return {row.label: shop.work.figures(row.label, partial(_measured, shop, row)) for row in rows}


def _measured(shop: Shop, row: PublishedRow) -> dict[str, Any]:
    model = shop.original() if row.original else shop.packed(row.label)
    positions = positions_of(model.config)
    fits = positions is None or positions >= _PAPER.context + _PAPER.new
    settings = _PAPER if fits else _SMALL
    size = checkpoint_size(shop.source) if row.original else packed_checkpoint_size(shop.folder(row.label))
    warm_up(model, settings, "moebius")
    speed = measure_speed(model, settings, "moebius", shop.progress, row.label).to_dict(settings)
    values = {"tokens_s": speed["request"]["tokens_per_second"]}
    activated = _activated_bytes(size)
    if activated is not None:
        values["memory"] = activated / 1e9
    return {
        "values": values,
        "bits_per_expert_weight": size.bits_per_expert_weight,
        "activated_bits_per_weight": size.activated_bits_per_weight,
        **({} if row.original else shop.pack(row)),
    }


def _activated_bytes(size: ModelSize) -> float | None:
    """What a token touches: everything outside the experts, and the experts that it is sent to."""
    if size.top_k is None:
        return None
    experts = sum(module.activated_bits(size.top_k) for module in size.experts)
    return (experts + size.other_bits) / 8
