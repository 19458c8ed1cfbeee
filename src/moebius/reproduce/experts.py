"""How alike experts are: their weights before and after a joint basis, their outputs before and after shared directions are
taken out of them, and how few directions hold most of them (MoBiE Figure 2; KBVQ-MoE Figures 2 and 5).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moebius.basis.joint_svd import joint_basis
from moebius.basis.klt_svd import klt_basis, shared_directions
from moebius.calibrate.stream import stream_statistics
from moebius.linalg.eigen import descending_eigh
from moebius.models.layout import read_weights
from moebius.models.load import describe
from moebius.recipe import Recipe
from moebius.reproduce.shop import Shop
from moebius.types import CalibrationNeeds, MoeLayer

_LAYERS = 4  # of a deep model, so many spread over its depth


def centered_kernel_alignment(matrices: Tensor) -> Tensor:
    """Linear CKA of every two of some matrices, rows as samples and columns as features (Kornblith et al. 2019).

    Args:
        matrices: (experts, rows, columns).

    Returns:
        (experts, experts), between 0 and 1.
    """
    centred = (matrices - matrices.mean(1, keepdim=True)).double()
    grams = (centred @ centred.mT).flatten(1)  # HSIC of two is the inner product of their centred Gram matrices
    grams = grams / grams.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return grams @ grams.mT


def output_similarity(matrices: Tensor, moment: Tensor) -> Tensor:
    """Cosine of what every two matrices put out for the same inputs: of ``tr(W_i C W_jᵀ)``. (experts, experts)

    Args:
        matrices: (experts, out, in).
        moment: second moment ``C`` of the inputs. (in, in)
    """
    basis, _ = klt_basis(moment.double())
    seen = (matrices.double() @ basis).flatten(1)
    seen = seen / seen.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return seen @ seen.mT


def energy_captured(weight: Tensor, moment: Tensor) -> Tensor:
    """``ρ_k`` of the stacked experts in the coordinates of their inputs (KBVQ-MoE Eq. 17), for k = 1, 2, ... (in,)"""
    gram = torch.zeros_like(moment, dtype=torch.float64)
    for matrix in weight.double():
        gram += matrix.mT @ matrix
    basis, _ = klt_basis(moment.double())
    values, _ = descending_eigh(basis.mT @ gram @ basis)
    values = values.clamp_min(0)
    return values.cumsum(0) / values.sum()


def measure_expert_cka(shop: Shop) -> dict[str, dict[str, Any]]:
    """Mean CKA of two experts of one layer: of their weights, and of their factors under the joint basis."""

    def measured() -> dict[str, Any]:
        bits = Recipe.make("mobie").shared_bits
        means: dict[str, list[float]] = {"before": [], "after": []}
        maps: dict[str, list[list[float]]] = {}
        for layer, matrices in _projections(shop):
            for name, weight in matrices.items():
                weight = weight.float()
                factors = joint_basis(weight, side="output", bits=bits).factors(weight)
                for when, some in (("before", weight), ("after", factors)):
                    alike = centered_kernel_alignment(some)
                    means[when].append(_off_diagonal(alike))
                    if name == "down" and when not in maps:
                        maps[when] = alike.tolist()
            shop.progress.advance(layer.name)
        return _summed_up(means, maps)

    shop.progress.stage("similarity of experts", min(_LAYERS, len(describe(shop.original()).moe_layers)))
    found = shop.work.figures("experts", measured)
    return _of_rows(shop, "cka", found)


def measure_output_similarity(shop: Shop) -> dict[str, dict[str, Any]]:
    """Mean cosine of what two experts put out, with all of their weights, and without the shared directions."""

    def measured() -> dict[str, Any]:
        recipe = Recipe.make(**shop.table.options["recipe"])
        means: dict[str, list[float]] = {"before": [], "after": []}
        maps: dict[str, list[list[float]]] = {}
        for weight, moment in _first_projections(shop):
            rank = max(1, round(recipe.rank_share * weight.shape[2]))
            rest = weight - shared_directions(weight, moment, rank).matrix()
            for when, some in (("before", weight), ("after", rest)):
                alike = output_similarity(some, moment)
                means[when].append(_off_diagonal(alike.abs()))
                maps.setdefault(when, alike.abs().tolist())
        return _summed_up(means, maps)

    found = shop.work.figures("outputs", measured)
    return _of_rows(shop, "similarity", found)


def _summed_up(means: dict[str, list[float]], maps: dict[str, list[list[float]]]) -> dict[str, Any]:
    """By label of a row, the mean over everything that was looked at, and one map."""
    return {label: {"mean": sum(values) / len(values), "map": maps[label]} for label, values in means.items()}


def _of_rows(shop: Shop, value: str, found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What :func:`_summed_up` found, as the rows of the table have it."""
    return {
        row.label: {"values": {value: found[row.label]["mean"]}, "series": {"map": found[row.label]["map"]}}
        for row in shop.table.rows
    }


def measure_spectrum(shop: Shop) -> dict[str, dict[str, Any]]:
    """Share of the energy of the first layer's stacked experts that so many directions hold."""

    def measured() -> dict[str, Any]:
        weight, moment = next(_first_projections(shop))
        return {"captured": energy_captured(weight, moment).tolist()}

    captured = shop.work.figures("spectrum", measured)["captured"]
    found = {}
    for row in shop.table.rows:
        assert row.x is not None
        rank = max(1, round(row.x * len(captured)))
        found[row.label] = {"values": {"captured": 100 * captured[rank - 1]}, "series": {"captured": captured}}
    return found


def _projections(shop: Shop) -> Iterator[tuple[MoeLayer, dict[str, Tensor]]]:
    """A few layers, and their gate, up and down. (experts, out, in) each"""
    layers = describe(shop.original()).moe_layers
    for layer in [layers[i] for i in sorted({round(k * (len(layers) - 1) / max(1, _LAYERS - 1)) for k in range(_LAYERS)})]:
        weights, layout = read_weights(layer.name, layer.experts), layer.layout
        first = weights.gate_up.detach()
        matrices = {"up": first}
        if layout.has_gate:
            halves = first.chunk(2, dim=1) if layout.is_concatenated else (first[:, ::2], first[:, 1::2])
            matrices = dict(zip(("gate", "up"), halves, strict=True))
        yield layer, {**matrices, "down": weights.down.detach()}


def _first_projections(shop: Shop) -> Iterator[tuple[Tensor, Tensor]]:
    """The first projection of every MoE layer (experts, out, in) float32, and the second moment of all its inputs (in, in)."""
    moe = describe(shop.original())
    layers = {layer.name: layer for layer in moe.moe_layers}
    windows, needs = shop.calibration_windows(), CalibrationNeeds(inputs=True)
    for stats in stream_statistics(moe, windows, needs, progress=shop.progress):
        layer = layers[stats.name]
        yield read_weights(layer.name, layer.experts).gate_up.detach().float(), stats.gate_up.second_moment.sum(0)


def _off_diagonal(matrix: Tensor) -> float:
    """Mean of what is not on the diagonal."""
    count = len(matrix)
    return float((matrix.sum() - matrix.diagonal().sum()) / (count * (count - 1)))
