"""What happens inside a packed model: which experts its tokens go to, and how the channels of a layer's output move (MoBiE
Figure 3, KBVQ-MoE Figure 3).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moebius.calibrate.layerwise import removed
from moebius.evaluate.routing import recorded_decisions
from moebius.models.load import describe
from moebius.reproduce.published_tables import PublishedRow
from moebius.reproduce.shop import Shop

_WINDOWS = 8  # of the text are looked at
_TOKENS = 96  # of the first window are drawn


def choices_kept(original: Tensor, other: Tensor) -> float:
    """Share of the original's choices that the other model makes too, token by token. Indices (tokens, top_k) each."""
    return float((original.unsqueeze(2) == other.unsqueeze(1)).any(2).float().mean())


def measure_token_map(shop: Shop) -> dict[str, dict[str, Any]]:
    """Share of the experts that tokens keep, by layer, and where the first tokens go at half depth."""
    for row in shop.rows():
        shop.pack(row)
    return {row.label: shop.work.figures(row.label, partial(_token_map, shop, row)) for row in shop.rows()}


def measure_channel_shift(shop: Shop) -> dict[str, dict[str, Any]]:
    """How far the means and variances of the channels of one layer's experts' output are from the original's."""
    for row in shop.rows():
        shop.pack(row)
    return {row.label: shop.work.figures(row.label, partial(_channel_shift, shop, row)) for row in shop.rows()}


@torch.inference_mode()
def _token_map(shop: Shop, row: PublishedRow) -> dict[str, Any]:
    original, packed = shop.original(), shop.packed(row.label)
    names = [layer.name for layer in describe(original).moe_layers]
    windows = _windows(shop, original)
    chosen: list[dict[str, list[Tensor]]] = []
    for model in (original, packed):
        found: dict[str, list[Tensor]] = {name: [] for name in names}
        with recorded_decisions(model, names) as decisions:
            for ids in windows.split(1):
                model(input_ids=ids.to(model.device), use_cache=False)
                for name in names:
                    found[name].append(decisions[name][0].cpu())
        chosen.append(found)
    kept = [choices_kept(torch.cat(chosen[0][name]), torch.cat(chosen[1][name])) for name in names]
    middle = names[len(names) // 2]
    maps = {
        title: [[token, int(expert)] for token, some in enumerate(found[middle][0][:_TOKENS]) for expert in some]
        for title, found in zip(("original", row.label), chosen, strict=True)
    }
    return {"values": {"kept": 100 * sum(kept) / len(kept)}, "series": {"kept": kept, "maps": maps, "layer": middle}}


@torch.inference_mode()
def _channel_shift(shop: Shop, row: PublishedRow) -> dict[str, Any]:
    original, packed = shop.original(), shop.packed(row.label)
    layers = describe(original).moe_layers
    name = layers[min(len(layers) - 1, int(shop.table.options["depth"] * len(layers)))].name
    windows = _windows(shop, original)
    mean, variance = _moments(original, name, windows)
    other_mean, other_variance = _moments(packed, name, windows)
    floor = torch.finfo(torch.float64).tiny
    moved = ((other_mean - mean).square() / variance.clamp_min(floor)).mean().sqrt()
    spread = (other_variance / variance.clamp_min(floor) - 1).square().mean().sqrt()
    series = {"mean": mean, "variance": variance, "mean of it": other_mean, "variance of it": other_variance}
    return {
        "values": {"mean_shift": float(moved), "variance_shift": float(spread)},
        "series": {**{key: tensor.tolist() for key, tensor in series.items()}, "layer": name},
    }


def _moments(model: nn.Module, name: str, windows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel of what the experts of a layer put out. float64 (hidden,) each"""
    sums: list[Tensor] = []

    def add(_: nn.Module, __: Any, output: Any) -> None:
        rows = (output[0] if isinstance(output, tuple) else output).flatten(0, -2).double().cpu()
        sums.append(torch.stack([rows.sum(0), rows.square().sum(0), torch.full_like(rows[0], len(rows))]))

    device = next(model.parameters()).device
    with removed(model.get_submodule(name).register_forward_hook(add)):
        for ids in windows.split(1):
            model(input_ids=ids.to(device), use_cache=False)
    total, squares, count = torch.stack(sums).sum(0)
    mean = total / count
    return mean, squares / count - mean.square()


def _windows(shop: Shop, model: Any) -> Tensor:
    return shop.text(next(iter(shop.setting.texts)), model).windows[:_WINDOWS]
