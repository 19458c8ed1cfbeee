"""BitsMoE's integer program and the time of quantization: what a direction costs at each width, how well one number stands for
the distortion of a width, and where the seconds go (its Figures 3 to 6).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moebius.calibrate.stream import stream_statistics
from moebius.methods.bitsmoe import WIDTHS, loss_coefficients, spectral_factors
from moebius.models.layout import read_weights
from moebius.models.load import describe
from moebius.quantize.integers import whole_rows
from moebius.quantize.spectral import distortions
from moebius.recipe import Recipe
from moebius.reproduce.published_tables import PublishedRow
from moebius.reproduce.shop import Shop
from moebius.types import PROJECTIONS, CalibrationNeeds, ProjectionStats

_EXPERTS = 3  # of the first, the middle and the last layer are drawn


def spread_of(values: Tensor, statistic: str) -> Tensor:
    """How far single values are from their mean, as a share of it: the coefficient of variation, or the relative Monte Carlo
    standard error of the mean (Koehler et al. 2009), which is that over the root of how many there are.

    Args:
        values: (values, ...).
        statistic: ``cv`` or ``rmcse``.
    """
    variation = values.std(0) / values.mean(0)
    return variation if statistic == "cv" else variation / len(values) ** 0.5


def measure_coefficients(shop: Shop) -> dict[str, dict[str, Any]]:
    """Mean loss coefficients of a direction at each width, of some experts of some layers."""
    return {row.label: shop.work.figures(row.label, partial(_coefficients, shop)) for row in shop.table.rows}


def measure_distortion_spread(shop: Shop) -> dict[str, dict[str, Any]]:
    """By layer and width, how much the distortion of a direction varies around the mean that stands for it."""
    return {row.label: shop.work.figures(row.label, partial(_spread, shop)) for row in shop.table.rows}


def measure_time_breakdown(shop: Shop) -> dict[str, dict[str, Any]]:
    """Seconds of each stage of quantization, and how many times as fast as GPTQ at the same bits the whole is."""

    def timed(row: PublishedRow) -> dict[str, Any]:
        return {"seconds": shop.quantized(row)["seconds"]}

    seconds = {row.label: shop.work.figures(row.label, partial(timed, row))["seconds"] for row in shop.rows()}
    totals = {label: sum(parts.values()) for label, parts in seconds.items()}
    found = {}
    for row in shop.rows():
        assert row.recipe is not None
        base = next((r for r in shop.rows() if r.recipe and r.recipe == {**row.recipe, "method": "gptq"}), None)
        values = {} if base is None else {"times_gptq": totals[base.label] / totals[row.label]}
        found[row.label] = {"values": values, "series": {"seconds": seconds[row.label]}}
    return found


def _coefficients(shop: Shop) -> dict[str, Any]:
    recipe = Recipe.make(**shop.table.options["recipe"])
    lines: dict[str, list[float]] = {}
    total: list[Tensor] = []
    for index, weight, stats, projection in _layers(shop, recipe):
        basis, factors, directions = spectral_factors(weight, recipe, projection)
        group = whole_rows(recipe.group_size, directions.shape[2])
        costs = loss_coefficients(basis, factors, directions, stats, recipe, group)  # (experts, directions, widths)
        total.append(costs.mean((0, 1)))
        if projection == "down":
            for expert in sorted({0, len(costs) // 2, len(costs) - 1})[:_EXPERTS]:
                lines[f"layer {index}, expert {expert}"] = costs[expert].mean(0).tolist()
    mean = torch.stack(total).mean(0)
    return {"values": {"coefficient": float(mean[int(recipe.bits)])}, "series": {"widths": list(WIDTHS), "lines": _some(lines)}}


def _spread(shop: Shop) -> dict[str, Any]:
    recipe, statistic = Recipe.make(**shop.table.options["recipe"]), shop.table.options["statistic"]
    by_layer: dict[int, list[Tensor]] = {}
    for index, weight, _, projection in _layers(shop, recipe):
        _, _, directions = spectral_factors(weight, recipe, projection)
        lost = distortions(directions, WIDTHS[1:], whole_rows(recipe.group_size, directions.shape[2]))
        used = directions.square().sum(2) > 0  # of a direction that no expert uses nothing is lost
        by_layer.setdefault(index, []).append(lost[used])
    spreads = {index: spread_of(torch.cat(parts).double(), statistic).tolist() for index, parts in by_layer.items()}
    flat = [value for values in spreads.values() for value in values]
    return {"values": {"variation": sum(flat) / len(flat)}, "series": {"widths": list(WIDTHS[1:]), "layers": spreads}}


def _layers(shop: Shop, recipe: Recipe) -> Iterator[tuple[int, Tensor, ProjectionStats, str]]:
    """Number of the MoE layer from 1, weights (experts, out, in) float32, statistics and name of each projection."""
    moe = describe(shop.original())
    places = {layer.name: (number, layer) for number, layer in enumerate(moe.moe_layers, 1)}
    needs = CalibrationNeeds(inputs=True)
    for stats in stream_statistics(moe, shop.calibration_windows(), needs, progress=shop.progress):
        number, layer = places[stats.name]
        weights = read_weights(layer.name, layer.experts)
        for projection in PROJECTIONS:
            yield number, weights.projection(projection).detach().float(), stats.projection(projection), projection


def _some(lines: dict[str, list[float]]) -> dict[str, list[float]]:
    """Those of the first, the middle and the last layer."""
    layers = list(dict.fromkeys(name.partition(",")[0] for name in lines))
    kept = {layers[0], layers[len(layers) // 2], layers[-1]}
    return {name: line for name, line in lines.items() if name.partition(",")[0] in kept}
