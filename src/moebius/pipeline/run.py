"""The run: calibrate, quantize and write layer by layer, then copy everything else through."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from moebius.calibrate.self_sampling import balanced_windows
from moebius.calibrate.states import STATES_IN_MEMORY, states_bytes
from moebius.calibrate.stream import stream_statistics
from moebius.calibrate.tokens import begins_with, calibration_windows, windows_digest
from moebius.checkpoint.manifest import FORMAT_VERSION, REPORT_NAME
from moebius.checkpoint.names import expert_tensor_names, tied_copies
from moebius.checkpoint.reader import SourceCheckpoint
from moebius.checkpoint.writer import CheckpointWriter
from moebius.errors import CheckpointError, UnsupportedModelError, first_line
from moebius.formats import Packed, PackedProjection
from moebius.memory import PeakMemory
from moebius.methods import METHODS
from moebius.methods.base import Method
from moebius.methods.linear import packed_linears, quantize_linear
from moebius.methods.router import quantize_router
from moebius.models.layout import read_weights
from moebius.models.limits import check_tokens, tell_of_positions
from moebius.models.load import check_coverage
from moebius.pipeline.blockwise import Budget, recover
from moebius.pipeline.refine import refine
from moebius.pipeline.source import StreamedModel, open_model
from moebius.pipeline.student import Pair
from moebius.progress import Progress, Silent
from moebius.recipe import CalibrationSettings, Recipe
from moebius.types import PROJECTIONS, CalibrationNeeds, ExpertWeights, LayerStats, MoeLayer, MoeModel

#: Layers that a line names; the report has all.
_NAMED = 8

_log = logging.getLogger("moebius")


def quantize_model(
    source: str | Path,
    out: Path,
    recipe: Recipe,
    calibration: CalibrationSettings,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Quantize the experts of a checkpoint and write a packed checkpoint that transformers loads.

    Layers are finished one after the other in a work folder beside ``out``; a run that was stopped, in whatever way, goes on
    where it was when the same command is given again, and writes the bytes of a run that was not. ``out`` appears at the very
    end, complete. The files depend on the source, the recipe and the calibration, and on how the machine rounds: its
    instructions, the number of threads, the device, the version of PyTorch. Work of a run with other settings is refused.

    Args:
        source: local folder or hub name of a transformers checkpoint.
        out: folder to create; may exist if it is empty.
        recipe: what to do.
        calibration: which tokens to look at, for methods that need any.
        device: where each layer is run and quantized.
        progress: told about stages and steps.

    Returns:
        The report that is also written to ``out`` (layers with their tokens per expert, bits and experts that shrank towards
        their layer), with ``seconds`` by stage and ``peak_memory_bytes`` added, which are not written.

    Raises:
        MoebiusError: one of its subclasses for every cause that is known, before ``out`` exists.
    """
    progress = progress or Silent()
    clock, memory = _Clock(), PeakMemory()
    with CheckpointWriter(out) as writer:
        checkpoint = SourceCheckpoint.open(source)
        job = _Job(open_model(checkpoint, device), recipe)
        moe = job.moe
        windows = _checked_early(job, calibration, writer)
        copied = set(checkpoint.names()) - expert_tensor_names(checkpoint, moe.model, job.packed_paths())
        checkpoint.check_finite(checkpoint.names(), progress, infinite=copied)
        if job.needs.self_sampled:
            windows = _self_sampled(moe, checkpoint.folder, calibration, progress)
            calibration = dataclasses.replace(calibration, text="self-sampled", split="train")
        settings: dict[str, Any] = {"recipe": recipe.to_dict()}
        if windows is not None:
            settings["calibration"] = {**calibration.to_dict(), "digest": windows_digest(windows)}
        key = {"source": checkpoint.fingerprint(), "format_version": FORMAT_VERSION, "machine": _machine(device), **settings}
        writer.begin(key)
        clock.lap("load")
        refined = _pack(job, windows, calibration.seed, writer, progress, clock)
        modules = writer.modules()
        check_coverage(moe, modules)
        writer.copy_rest(checkpoint, expert_tensor_names(checkpoint, moe.model, modules) | tied_copies(checkpoint, moe.model))
        entries = writer.entries()
        report = {
            "format_version": FORMAT_VERSION,
            **settings,
            "layers": [entries[name] for name in job.unit_names()],
            **refined,
            **({"dequantized_from": kinds} if (kinds := checkpoint.dequantized_from()) else {}),
        }
        config = {"quant_method": "moebius", "format_version": FORMAT_VERSION, **settings, "modules": modules}
        writer.finish(checkpoint, config, {REPORT_NAME: json.dumps(report, indent=1) + "\n"})
    clock.lap("write")
    progress.finish()
    _tell_of_zeros(report["layers"])
    return {**report, "seconds": clock.laps, "peak_memory_bytes": memory.bytes()}


def _pack(
    job: _Job, windows: Tensor | None, seed: int, writer: CheckpointWriter, progress: Progress, clock: _Clock
) -> dict[str, Any]:
    """Survey, quantize and refine, as the recipe has it; what refinement adds to the report."""
    if job.method.survey is not None and windows is not None:
        job.survey(windows, writer, progress)
        clock.lap("survey")
    if windows is None or not (job.recovers or job.refines):
        for name, packed, entry in job.packed_layers(windows, writer.entries(), writer.work.scratch, progress):
            writer.write_layer(name, packed, entry)
        clock.lap("calibrate and quantize")
        return {}
    for name, packed, entry in job.packed_layers(windows, writer.kept_layers(), writer.work.scratch, progress):
        writer.keep_layer(name, packed, entry)
    clock.lap("calibrate and quantize")
    found: dict[str, Any] = {}
    stage = "packed"
    if job.recovers:
        found["recover"], stage = job.recover(windows, seed, writer, progress), "recovered"
        clock.lap("recover")
    if job.refines:
        found["refine"] = job.refine(windows, seed, writer, progress, stage)
        clock.lap("refine")
    else:
        job.write_kept(writer, stage)
    return found


def check_recipe(source: str | Path, recipe: Recipe, calibration: CalibrationSettings, device: str = "cpu") -> None:
    """Refuse what :func:`quantize_model` would refuse of this model and recipe, from headers, config and tokenizer alone.

    Raises:
        MoebiusError: a model, recipe, budget, tokenizer or text that no run can use.
    """
    checkpoint = SourceCheckpoint.open(source)
    job = _Job(open_model(checkpoint, device), recipe)
    job.planned_total()
    _drawn(checkpoint.folder, calibration, job)


def _drawn(folder: Path, calibration: CalibrationSettings, job: _Job) -> Tensor | None:
    """The calibration windows, if there are to be any and the model does not write them."""
    if job.needs.self_sampled:
        begins_with(_tokenizer(folder), calibration.bos)
        return None
    return _windows(folder, calibration, job.moe) if job.needs.anything or job.method.survey is not None else None


def _checked_early(job: _Job, calibration: CalibrationSettings, writer: CheckpointWriter) -> Tensor | None:
    """What can be known before the weights are read, cheapest first; the calibration windows, if there are to be any.

    Raises:
        MoebiusError: a model, tokenizer, text, budget or disk that the run would fail on later.
    """
    moe, checkpoint = job.moe, job.source.checkpoint
    replaced = expert_tensor_names(checkpoint, moe.model, job.expert_parameters())
    bits = job.planned_total()
    windows = _drawn(checkpoint.folder, calibration, job)
    if windows is not None:
        tell_of_positions(moe.model.config, windows.shape[1])
    rest = sum(tensor.end - tensor.begin for name, tensor in checkpoint.tensors.items() if name not in replaced)
    writer.require_room(rest + bits // 8)
    return windows


def _machine(device: str) -> dict[str, Any]:
    """What of the machine the bytes depend on: sums of products are rounded in an order that is its own."""
    threads, instructions = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    versions = {"moebius": version("moebius"), "torch": torch.__version__}
    return {**versions, "device": device, "threads": threads, "instructions": instructions}


class _Job:
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


def _tell_of_zeros(entries: list[dict[str, Any]]) -> None:
    """Name the layers that the budget gave nothing, in one line."""
    named = [f"{entry['name']} ({' and '.join(entry['zero'])})" for entry in entries if entry.get("zero")]
    if named:
        some = ", ".join(named[:_NAMED]) + (f" and {len(named) - _NAMED} more" if len(named) > _NAMED else "")
        _log.warning("the budget gave nothing to %s: these experts put out zeros; more --bits would change that", some)


def _windows(folder: Path, calibration: CalibrationSettings, moe: MoeModel) -> Tensor:
    windows = calibration_windows(calibration, _tokenizer(folder))
    check_tokens(moe.model, windows)
    return windows


def _self_sampled(moe: MoeModel, folder: Path, calibration: CalibrationSettings, progress: Progress) -> Tensor:
    """As many windows as the calibration asks for, written by the model."""
    if calibration.text != CalibrationSettings.text:
        _log.warning("calibration text %s: not read, the model writes its own; self_sampling=false reads it", calibration.text)
    head = begins_with(_tokenizer(folder), calibration.bos)
    return balanced_windows(
        moe, calibration.windows, calibration.window_length, head=head, seed=calibration.seed, progress=progress
    )


def _tokenizer(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers and tokenizers raise whatever a damaged or newer file does to them
        raise CheckpointError(
            f"{folder}: has no tokenizer that transformers can load ({type(error).__name__}: {first_line(error)}); "
            "calibration needs one"
        ) from error


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._last = round(now - self._last, 2), now
