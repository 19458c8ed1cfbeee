"""What a recipe would make of a model, from its config alone: size, bits, memory."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from moebius.calibrate.states import STATES_IN_MEMORY, states_bytes
from moebius.checkpoint.dequantized import DequantizedTensor
from moebius.checkpoint.names import expert_tensor_names, parameters_of
from moebius.checkpoint.not_loaded import not_loaded
from moebius.checkpoint.quantized import READ, refuse_quantized_config
from moebius.checkpoint.reader import SourceCheckpoint
from moebius.checkpoint.routing import experts_per_token
from moebius.errors import CheckpointError, ModelNotFoundError
from moebius.evaluate.size import ModelSize, ModuleSize, file_bytes, folder_bytes, packed_module
from moebius.formats import Packed, PackedProjection
from moebius.methods import METHODS
from moebius.methods.linear import packed_linears, plan_linear
from moebius.methods.router import plan_router
from moebius.models.load import skeleton
from moebius.recipe import CalibrationSettings, Recipe
from moebius.types import PROJECTIONS, CalibrationNeeds, MoeLayer, MoeModel

_FLOAT32 = 4  # bytes
_BATCH = 8  # windows per forward pass of the calibration
_HESSIAN_CHUNK = 1 << 29  # methods invert the Hessians of so many bytes of experts at a time


@dataclass(frozen=True)
class PeakMemory:
    """Bytes that a run holds, as far as shapes tell. The interpreter, its libraries and the allocator's gaps come on top.

    Attributes:
        model: one decoder layer, the largest, in the dtype of the checkpoint, and what is outside of the layers; not the
            embeddings, whose rows are read, and not the head.
        hidden_states: of all calibration tokens, at every layer boundary if gradients are taken; none where they go to disk.
        layer: one decoder layer, the largest, in float32.
        activations: what the experts of that layer hold while one batch of windows goes through.
        statistics: sums of one MoE layer, the largest (second moments, GLAS Hessians, Fisher diagonals).
        workspace: copies of weights and Hessians while one projection is quantized.
        logits: of one window at the loss, with its gradients.
        head: in float32, at the loss.
    """

    model: int
    hidden_states: int
    layer: int
    activations: int
    statistics: int
    workspace: int
    logits: int
    head: int

    @property
    def total(self) -> int:
        """The peak: model and hidden states all the time, and the most demanding of loss, calibration and quantization."""
        calibrating = self.layer + self.activations + self.statistics
        quantizing = self.statistics + self.workspace
        return self.model + self.hidden_states + max(self.logits + self.head, calibrating, quantizing)


@dataclass(frozen=True)
class Plan:
    """A model before and after a recipe, and the memory that it takes to get there."""

    before: ModelSize
    after: ModelSize
    moe_layers: int
    memory: PeakMemory

    def to_dict(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        memory = {**vars(self.memory), "total": self.memory.total}
        return {
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "moe_layers": self.moe_layers,
            "memory_bytes": memory,
        }


def plan_model(source: PretrainedConfig | str | Path, recipe: Recipe, calibration: CalibrationSettings) -> Plan:
    """Plan a run without weights.

    Args:
        source: a config, ``config.json``, a folder that holds one, or a hub name.
        recipe: what would be done.
        calibration: how many tokens would be looked at.

    Raises:
        ModelNotFoundError: no such file, folder or name.
        UnsupportedModelError: a model without experts that Moebius can read.
    """
    checkpoint = _weights_beside(source)
    moe = skeleton(source)
    if checkpoint is None:
        refuse_quantized_config(moe.model.config.to_dict(), moe.model.config.model_type, but=READ)
    before = _original_size(moe) if checkpoint is None else _size_with_weights(moe, checkpoint)
    return Plan(
        before, _size_after(moe, before, recipe), len(moe.moe_layers), _peak_memory(moe, recipe, calibration, before.top_k)
    )


def _weights_beside(source: PretrainedConfig | str | Path) -> SourceCheckpoint | None:
    """The checkpoint of a config, where its weights lie beside it; a plan needs none.

    Raises:
        UnsupportedModelError: it is quantized already.
    """
    if isinstance(source, PretrainedConfig) or not Path(source).expanduser().is_dir():
        return None
    try:
        return SourceCheckpoint.open(source)
    except (CheckpointError, ModelNotFoundError):
        return None


def _size_with_weights(moe: MoeModel, checkpoint: SourceCheckpoint) -> ModelSize:
    """The original in the dtype that it is stored in, with what it stores beside the model."""
    _in_dtype(moe, checkpoint.dtype)
    size, beside = _as_stored(_original_size(moe), moe, checkpoint), not_loaded(checkpoint.tensors, moe)
    return replace(
        size,
        other_weights=size.other_weights + beside.weights,
        other_bits=size.other_bits + 8 * beside.bytes,
        not_loaded=beside,
    )


def _as_stored(size: ModelSize, moe: MoeModel, checkpoint: SourceCheckpoint) -> ModelSize:
    """The experts that are quantized in the files, in what they take there."""
    bits: Counter[str] = Counter()
    kinds = {}
    for name, targets in parameters_of(checkpoint.names(), moe.model).items():
        if isinstance(tensor := checkpoint.tensors[name], DequantizedTensor):
            for target in targets:
                bits[target] += 8 * tensor.stored_bytes
                kinds[target] = tensor.kind
    modules = (replace(m, description=kinds[m.name], stored_bits=bits[m.name]) if m.name in bits else m for m in size.modules)
    return replace(size, modules=tuple(modules))


def _in_dtype(moe: MoeModel, dtype: torch.dtype | None) -> None:
    """The stored dtype decides what the original takes, not what the config says, or leaves out."""
    if dtype is not None and dtype != moe.model.dtype:
        nn.Module.to(moe.model, dtype)


def checkpoint_size(source: str | Path) -> ModelSize:
    """The size of a checkpoint that is not packed; expert weights are counted in the dtype that most bytes are stored in.

    Raises:
        MoebiusError: as :func:`plan_model`, or a damaged checkpoint.
    """
    checkpoint = SourceCheckpoint.open(source)
    moe = skeleton(checkpoint.folder)
    expert_tensor_names(checkpoint, moe.model, [_path(layer, p) for layer in moe.moe_layers for p in PROJECTIONS])
    _in_dtype(moe, checkpoint.dtype)
    size = _as_stored(_original_size(moe), moe, checkpoint)
    return ModelSize(
        modules=size.modules,
        other_weights=sum(math.prod(t.shape) for t in checkpoint.tensors.values()) - size.expert_weights,
        other_bits=sum(8 * t.stored_bytes for t in checkpoint.tensors.values()) - size.expert_bits,
        top_k=size.top_k,
        file_bytes=file_bytes(checkpoint.folder),
        folder_bytes=folder_bytes(checkpoint.folder),
        not_loaded=not_loaded(checkpoint.tensors, moe),
    )


def _original_size(moe: MoeModel) -> ModelSize:
    """The original, in the dtype of its config."""
    modules = []
    for layer in moe.moe_layers:
        for projection in PROJECTIONS:
            shape = _shape(layer, projection)
            bits = 8 * _parameter(layer, projection).element_size()
            modules.append(ModuleSize(_path(layer, projection), "experts", f"{bits} bit", shape, bits * math.prod(shape)))
    named = {id(_parameter(layer, projection)) for layer in moe.moe_layers for projection in PROJECTIONS}
    rest = [p for p in moe.model.parameters() if id(p) not in named]
    return ModelSize(
        modules=tuple(modules),
        other_weights=sum(p.numel() for p in rest),
        other_bits=sum(8 * p.numel() * p.element_size() for p in rest),
        top_k=experts_per_token(moe.model.config.to_dict()),
    )


def planned_modules(moe: MoeModel, recipe: Recipe) -> dict[str, PackedProjection | Packed]:
    """What a recipe would put in place of which modules: path to what is stored, with tensors on the meta device."""
    modules: dict[str, PackedProjection | Packed] = {
        _path(layer, projection): _planned(_shape(layer, projection), recipe, projection)
        for layer in moe.moe_layers
        for projection in PROJECTIONS
    }
    for name, bits in packed_linears(moe, recipe).items():
        rows, columns = moe.model.get_parameter(f"{name}.weight").shape
        modules[name] = plan_linear((rows, columns), bits)
    if recipe.router == "binary":
        for layer in moe.moe_layers:
            if layer.router_name is not None:
                rows, columns = moe.model.get_parameter(f"{layer.router_name}.weight").shape
                modules[layer.router_name] = plan_router((rows, columns), recipe)
    return modules


@cache  # most layers of a model have one shape
def _planned(shape: tuple[int, int, int], recipe: Recipe, projection: str) -> PackedProjection:
    return METHODS[recipe.method].plan(shape, recipe, projection)


def replaced_parameter(path: str, packed: PackedProjection | Packed) -> str:
    """Path of the parameter that a packed module stands for."""
    return path if isinstance(packed, PackedProjection) else f"{path}.weight"


def _size_after(moe: MoeModel, before: ModelSize, recipe: Recipe) -> ModelSize:
    modules = planned_modules(moe, recipe)
    others = [name for name, packed in modules.items() if not isinstance(packed, PackedProjection)]
    replaced = [moe.model.get_parameter(replaced_parameter(name, modules[name])) for name in others]
    return ModelSize(
        modules=tuple(packed_module(name, packed) for name, packed in modules.items()),
        other_weights=before.other_weights - sum(w.numel() for w in replaced),
        other_bits=before.other_bits - sum(8 * w.numel() * w.element_size() for w in replaced),
        top_k=before.top_k,
        not_loaded=before.not_loaded,
    )


def _peak_memory(moe: MoeModel, recipe: Recipe, calibration: CalibrationSettings, top_k: int | None) -> PeakMemory:
    binary_router = recipe.router == "binary"
    needs = METHODS[recipe.method].all_needs(recipe) | CalibrationNeeds(router_moment=binary_router)
    looks, gradients = needs.anything, needs.gradients
    # Tokens that are weighed by the loss take sums of their own beside the others, as a group of GLAS does.
    groups = max(needs.glas_groups, int(needs.loss_weighted))
    shapes = [[_shape(layer, projection) for projection in PROJECTIONS] for layer in moe.moe_layers]
    tokens = calibration.windows * calibration.window_length
    rows = min(calibration.windows, _BATCH) * calibration.window_length * (top_k or 1)
    config = moe.model.config.get_text_config()
    router_moment = config.hidden_size**2 if binary_router else 0
    widths = max(sum(outputs + inputs for _, outputs, inputs in layer) for layer in shapes)
    states = states_bytes(moe, tokens, gradients=gradients) if looks else 0
    return PeakMemory(
        model=_resident(moe),
        hidden_states=states if states <= STATES_IN_MEMORY else 0,  # they go to disk
        layer=_FLOAT32 * max(sum(p.numel() for p in layer.parameters()) for layer in moe.decoder) if looks else 0,
        activations=_FLOAT32 * rows * widths * (2 if gradients else 1) if looks else 0,
        statistics=max(sum(_statistics(shape, groups) for shape in layer) for layer in shapes) + _FLOAT32 * router_moment
        if looks
        else 0,
        workspace=max(_workspace(shape, looks) for layer in shapes for shape in layer),
        logits=3 * _FLOAT32 * calibration.window_length * config.vocab_size if gradients else 0,
        head=_FLOAT32 * config.hidden_size * config.vocab_size if gradients else 0,
    )


def _resident(moe: MoeModel) -> int:
    """Bytes of the weights that are there at once, see :class:`moebius.checkpoint.streamed.StreamedWeights`."""
    layer = max(sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in moe.decoder)
    read = {id(p) for part in (*moe.decoder, moe.model.get_output_embeddings()) if part is not None for p in part.parameters()}
    read |= {id(module.weight) for module in moe.model.modules() if isinstance(module, nn.Embedding)}
    return layer + sum(p.numel() * p.element_size() for p in moe.model.parameters() if id(p) not in read)


def _workspace(shape: tuple[int, int, int], hessians: bool) -> int:
    """Bytes of the copies that quantizing a projection makes: about 6 of its weights, and 8 of its Hessians in float64."""
    experts, _, inputs = shape
    hessian = min(8 * experts * inputs * inputs, max(_HESSIAN_CHUNK, 8 * inputs * inputs)) if hessians else 0
    return 6 * _FLOAT32 * math.prod(shape) + 8 * hessian


def _statistics(shape: tuple[int, int, int], groups: int) -> int:
    """Bytes of the sums of one projection, with so many sums beside the second moments."""
    experts, outputs, inputs = shape
    squares = experts * inputs * inputs * (1 + groups)
    vectors = experts * (inputs + (outputs if groups else 0))
    return _FLOAT32 * (squares + vectors)


def _shape(layer: MoeLayer, projection: str) -> tuple[int, int, int]:
    """(experts, out, in)"""
    layout = layer.layout
    channels = layout.inner * (2 if layout.has_gate else 1)
    shapes = {"gate_up": (layout.experts, channels, layout.hidden), "down": (layout.experts, layout.hidden, layout.inner)}
    return shapes[projection]


def _parameter(layer: MoeLayer, projection: str) -> nn.Parameter:
    return getattr(layer.experts, _parameter_name(layer, projection))


def _path(layer: MoeLayer, projection: str) -> str:
    return f"{layer.name}.{_parameter_name(layer, projection)}"


def _parameter_name(layer: MoeLayer, projection: str) -> str:
    return layer.layout.gate_up_name if projection == "gate_up" else layer.layout.down_name
