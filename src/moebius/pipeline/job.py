"""The units of a run: what calibration and packing make of each of them, and what is trained afterwards."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebius.calibrate.states import STATES_IN_MEMORY, states_bytes
from moebius.calibrate.stream import stream_statistics
from moebius.checkpoint.writer import CheckpointWriter
from moebius.errors import UnsupportedModelError
from moebius.formats import Packed, PackedProjection
from moebius.methods import METHODS
from moebius.methods.base import Method
from moebius.methods.linear import packed_linears, quantize_linear
from moebius.methods.router import quantize_router
from moebius.models.layout import read_weights
from moebius.models.load import check_coverage
from moebius.pipeline.blockwise import Budget, recover
from moebius.pipeline.refine import refine
from moebius.pipeline.source import StreamedModel
from moebius.pipeline.student import Pair
from moebius.progress import Progress
from moebius.recipe import Recipe
from moebius.types import PROJECTIONS, CalibrationNeeds, ExpertWeights, LayerStats, MoeLayer


class Job:
    """The units of a run (MoE layers first, then what else was asked for) and how each is packed."""

    def __init__(self, source: StreamedModel, recipe: Recipe) -> None:
        self.source, self.moe, self.recipe = source, source.moe, recipe
        self.method: Method = METHODS[recipe.method]
        self.binary_router = recipe.router == "binary"
        self.needs = self.method.needs(recipe) | CalibrationNeeds(router_moment=self.binary_router)
        self.recovers: bool = dict(recipe.options).get("recover", False)
        self.refines: bool = dict(recipe.options).get("refine", False)
        self._paths = {layer.name: _parameter_paths(layer) for layer in self.moe.moe_layers}
        self._shares: dict[tuple[str, str], dict[str, Any]] = {}
        self._planned: dict[tuple[tuple[int, int, int], str], int] = {}

    def planned_total(self) -> int:
        """Bits that all experts will take, about.

        Raises:
            MoebiusError: experts that are not all there, a budget that cannot be met, or a router that was not found.
        """
        check_coverage(self.moe, self.expert_parameters())
        if self.binary_router:
            for layer in self.moe.moe_layers:
                self._require_router(layer)
        bits = 0
        for layer in self.moe.moe_layers:
            layout = layer.layout
            shapes = (layout.inner * (2 if layout.has_gate else 1), layout.hidden), (layout.hidden, layout.inner)
            for projection, shape in zip(PROJECTIONS, shapes, strict=True):
                bits += self.planned_bits((layout.experts, *shape), projection)
        return bits

    def _require_router(self, layer: MoeLayer) -> str:
        if layer.router_name is None:
            raise UnsupportedModelError(f"{layer.name}: no router was found to binarize; leave out router=binary")
        return layer.router_name

    def planned_bits(self, shape: tuple[int, int, int], projection: str) -> int:
        """Bits that a projection of this shape (experts, out, in) will take, about; refused where the recipe cannot be met."""
        if (shape, projection) not in self._planned:
            self._planned[shape, projection] = self.method.plan(shape, self.recipe, projection).stored_bits()
        return self._planned[shape, projection]

    def survey(self, windows: Tensor, writer: CheckpointWriter, progress: Progress) -> None:
        """Survey every layer, and allocate the budget. What was seen is kept with the unfinished checkpoint."""
        survey = self.method.survey
        assert survey is not None
        layers = {layer.name: layer for layer in self.moe.moe_layers}
        seen = [name for name in layers if all(writer.kept(f"{name}.{projection}") is not None for projection in PROJECTIONS)]
        needs = survey.needs(self.recipe)
        work = self._work(windows, needs.gradients, writer.work.scratch)
        for stats in stream_statistics(
            self.moe, windows, needs, skip=seen, work=work, resident=self.source.weights.layer, progress=progress
        ):
            layer = layers[stats.name]
            weights = read_weights(layer.name, layer.experts)
            for projection in PROJECTIONS:
                weight, of_projection = weights.projection(projection), stats.projection(projection)
                found = survey.survey(weight, of_projection, self.recipe, projection)
                writer.keep(f"{layer.name}.{projection}", {name: tensor.cpu() for name, tensor in found.items()})
            del stats, of_projection  # one layer's statistics in memory, not two
        places = [(name, projection) for name in layers for projection in PROJECTIONS]
        surveys = [kept for name, projection in places if (kept := writer.kept(f"{name}.{projection}")) is not None]
        progress.stage("sharing out the bits", 1)
        for place, kept, share in zip(places, surveys, survey.allocate(surveys, self.recipe), strict=True):
            self._shares[place] = {"seen": kept, "share": share}
        progress.advance(f"{len(places)} projections")

    def packed_layers(
        self, windows: Tensor | None, finished: Collection[str], scratch: Path, progress: Progress
    ) -> Iterator[tuple[str, dict[str, PackedProjection | Packed], dict[str, Any]]]:
        """Name, packed modules and report entry of every unit that is not finished yet."""
        layers = {layer.name: layer for layer in self.moe.moe_layers}
        if windows is None:
            progress.stage("quantizing", len(layers))
            for layer in self.moe.moe_layers:
                if layer.name not in finished:
                    with self.source.weights.layer(layer.decoder_layer):
                        yield layer.name, *self._pack_layer(layer, None)
                progress.advance(layer.name)
        else:
            left = self._left_factors if self.needs.glas_groups else None
            work = self._work(windows, self.needs.gradients, scratch)
            for stats in stream_statistics(
                self.moe,
                windows,
                self.needs,
                left_factors=left,
                skip=finished,
                work=work,
                resident=self.source.weights.layer,
                progress=progress,
            ):
                name, (packed_layer, entry) = stats.name, self._pack_layer(layers[stats.name], stats)
                del stats  # one layer's statistics in memory, not two
                yield name, packed_layer, entry
        for name, bits in packed_linears(self.moe, self.recipe).items():
            if name not in finished:
                weight = self.source.weights.load(f"{name}.weight")
                packed = quantize_linear(weight, bits)
                yield name, {name: packed}, {"name": name, "bits": packed.stored_bits() / weight.numel()}

    def recover(self, windows: Tensor, seed: int, writer: CheckpointWriter, progress: Progress) -> dict[str, Any]:
        """Train the layers that were kept one after the other, and keep what they became; goes on after those that were.

        Returns:
            For the report: by layer, the error of its decoder layer before and after, see :class:`Recovered`.
        """
        packed, finished = writer.kept_layers(), writer.kept_layers("recovered")
        kept = {name: (self._pair(name, modules), entry) for name, (modules, entry) in finished.items()}

        def begin(name: str) -> tuple[Pair, Tensor | None]:
            seen = writer.kept(f"{name}.down")
            return self._pair(name, packed[name][0]), seen["metric"] if seen is not None and "metric" in seen else None

        steps, minutes = self.recipe.recover_steps, self.recipe.recover_minutes
        budget = Budget(steps, 60 * minutes / len(self.moe.moe_layers) if minutes else math.inf)
        for layer in recover(
            self.moe,
            windows,
            begin,
            finished={name: pair for name, (pair, _) in kept.items()},
            budget=budget,
            signs=self.recipe.recover_signs,
            seed=seed,
            work=self._work(windows, False, writer.work.scratch),
            resident=self.source.weights.layer,
            progress=progress,
        ):
            modules, entry = packed[layer.name]
            again = {self._paths[layer.name][p]: projection for p, projection in layer.packed.items()}
            errors = [float(f"{error:.6g}") for error in layer.errors]
            writer.keep_layer(layer.name, {**modules, **again}, {**entry, "recover": errors}, stage="recovered")
        return {name: entry["recover"] for name, (_, entry) in writer.kept_layers("recovered").items()}

    def refine(self, windows: Tensor, seed: int, writer: CheckpointWriter, progress: Progress, stage: str) -> dict[str, Any]:
        """Train what is continuous in the layers that were kept, and write them; from the start again if it was stopped.

        Returns:
            For the report: how far the logits are from the original's, in nats per token, over each tenth of the steps.
        """
        kept = writer.kept_layers(stage)
        layers = {name: self._pair(name, kept[name][0]) for name in self._paths}
        refined, losses = refine(
            self.moe,
            layers,
            windows,
            steps=self.recipe.refine_steps,
            seed=seed,
            progress=progress,
            resident=self.source.weights.layer,
            rest=partial(self.source.weights.layer, without=self.expert_parameters()),
        )
        again = {name: {self._paths[name][p]: found for p, found in pair.items()} for name, pair in refined.items()}
        self.write_kept(writer, stage, again)
        tenths = torch.tensor(losses, dtype=torch.float64).chunk(10)
        return {"nats_per_token": [round(float(tenth.mean()), 6) for tenth in tenths]}

    def write_kept(
        self, writer: CheckpointWriter, stage: str, again: Mapping[str, Mapping[str, PackedProjection]] | None = None
    ) -> None:
        """Write everything that was packed, layers as they are after a stage, with the modules in ``again`` in their places."""
        layers = writer.kept_layers(stage)
        for name, (modules, entry) in writer.kept_layers().items():
            modules, entry = layers.get(name, (modules, entry))
            writer.write_layer(name, {**modules, **(again or {}).get(name, {})}, entry)

    def _pair(self, name: str, modules: Mapping[str, PackedProjection | Packed]) -> dict[str, PackedProjection]:
        """Both projections of a layer, of its packed modules."""
        return {p: found for p, path in self._paths[name].items() if isinstance(found := modules[path], PackedProjection)}

    def _work(self, windows: Tensor, gradients: bool, scratch: Path) -> Path | None:
        """Where hidden states go: into memory, or into a folder where they are too many for that."""
        return scratch if states_bytes(self.moe, windows.numel(), gradients=gradients) > STATES_IN_MEMORY else None

    def expert_parameters(self) -> list[str]:
        """Paths of the parameters that will be packed."""
        return [path for layer in self.moe.moe_layers for path in _parameter_paths(layer).values()]

    def packed_paths(self) -> list[str]:
        """Paths of everything that will be packed: experts, and routers and linear layers where the recipe says so."""
        routers = [layer.router_name for layer in self.moe.moe_layers if self.binary_router and layer.router_name is not None]
        return [*self.expert_parameters(), *routers, *packed_linears(self.moe, self.recipe)]

    def unit_names(self) -> list[str]:
        """Every unit, in the order of the report."""
        return [layer.name for layer in self.moe.moe_layers] + list(packed_linears(self.moe, self.recipe))

    def _left_factors(self, weights: ExpertWeights) -> dict[str, Tensor]:
        factors = {p: self.method.left_factor(weights.projection(p), self.recipe, p) for p in PROJECTIONS}
        return {p: factor for p, factor in factors.items() if factor is not None}

    def _pack_layer(
        self, layer: MoeLayer, stats: LayerStats | None
    ) -> tuple[dict[str, PackedProjection | Packed], dict[str, Any]]:
        weights = read_weights(layer.name, layer.experts)
        paths = self._paths[layer.name]
        packed: dict[str, PackedProjection | Packed] = {}
        for projection in PROJECTIONS:
            weight, seen = weights.projection(projection), None if stats is None else stats.projection(projection)
            share = self._shares.get((layer.name, projection), {})
            packed[paths[projection]] = self.method.quantize(weight, seen, self.recipe, projection, **share)
        entry = _layer_entry(weights, stats, sum(p.stored_bits() for p in packed.values()))
        if zero := [p for p in PROJECTIONS if packed[paths[p]].is_zero()]:
            entry["zero"] = zero
        if self.binary_router:
            name = self._require_router(layer)
            assert stats is not None and stats.router_moment is not None
            router = self.moe.model.get_parameter(f"{name}.weight").detach()
            packed[name] = quantize_router(router, stats.router_moment, self.recipe)
        return packed, entry


def _parameter_paths(layer: MoeLayer) -> dict[str, str]:
    """Projection to the path of its parameter, which becomes the path of its packed module."""
    return {"gate_up": f"{layer.name}.{layer.layout.gate_up_name}", "down": f"{layer.name}.{layer.layout.down_name}"}


def _layer_entry(weights: ExpertWeights, stats: LayerStats | None, stored_bits: int) -> dict[str, Any]:
    """What the report says of a layer: its bits, what its experts saw, and who saw too little to stand alone."""
    entry: dict[str, Any] = {"name": weights.name, "bits": stored_bits / (weights.gate_up.numel() + weights.down.numel())}
    if stats is not None:
        tokens = stats.gate_up.tokens.tolist()
        entry["tokens_per_expert"] = tokens
        # Fewer tokens than inputs: the expert's own Hessian is singular, what makes it invertible is the layer's mean.
        entry["leaned_on_layer"] = [e for e, n in enumerate(tokens) if n < weights.gate_up.shape[2]]
    return entry
