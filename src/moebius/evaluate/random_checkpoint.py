"""Checkpoints with random weights, packed or not, written tensor by tensor: a model of any size in the memory of one layer."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor
from transformers import PretrainedConfig

from moebius.checkpoint.guards import guard_sources
from moebius.checkpoint.manifest import FORMAT_VERSION, MANIFEST_NAME, manifest_text
from moebius.checkpoint.shards import DTYPE_NAMES, INDEX_NAME, MemoryTensor, TensorSource, byte_count, write_shard, write_text
from moebius.evaluate.plan import planned_modules, replaced_parameter
from moebius.formats import Packed, PackedProjection
from moebius.formats.random_contents import random_contents, random_projection
from moebius.models.load import skeleton
from moebius.progress import Progress, Silent
from moebius.recipe import Recipe
from moebius.types import MoeLayer, MoeModel

_SPREAD = 0.02  # standard deviation that transformers initializes with
# Odd, so that no two rows of a matrix are alike.
_BLOCK = (1 << 22) + 1


def write_random_checkpoint(
    config: PretrainedConfig,
    folder: Path,
    recipe: Recipe | None = None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> None:
    """Write a checkpoint that ``from_pretrained`` loads, with random weights.

    Experts are stored fused, under the names that they have in the model.

    Args:
        config: of the model; its ``dtype`` is that of the weights.
        folder: where to; must exist.
        recipe: the packed modules are as this would store them, their bits random; None: nothing is packed.
        seed: of everything.
        progress: told about every layer.

    Raises:
        MoebiusError: a model without experts that Moebius can read, or a recipe that asks for something impossible.
        OSError: the folder cannot be written, or the disk is full.
    """
    progress = progress or Silent()
    moe, generator = skeleton(config), Generator().manual_seed(seed)
    modules = {} if recipe is None else planned_modules(moe, recipe)
    progress.stage("writing random weights", len(moe.moe_layers) + 1)
    entries: dict[str, dict[str, Any]] = {}
    for number, (name, sources) in enumerate(_shards(moe, modules, generator)):
        entries |= write_shard(folder / f"random-{number:05}.safetensors", sources)
        progress.advance(name)
    total = sum(byte_count(e["dtype"], e["shape"]) for e in entries.values())
    index = {"metadata": {"total_size": total}, "weight_map": {n: e["file"] for n, e in sorted(entries.items())}}
    write_text(folder / INDEX_NAME, json.dumps(index, indent=1) + "\n")
    config = copy.deepcopy(config)
    config.architectures = [type(moe.model).__name__]
    if recipe is not None:
        write_text(folder / MANIFEST_NAME, manifest_text(entries))
        config.quantization_config = {
            "quant_method": "moebius",
            "format_version": FORMAT_VERSION,
            "recipe": recipe.to_dict(),
            "modules": {path: packed.spec() for path, packed in modules.items()},
        }
    config.save_pretrained(folder)


def _shards(
    moe: MoeModel, modules: Mapping[str, PackedProjection | Packed], generator: Generator
) -> Iterator[tuple[str, Sequence[TensorSource]]]:
    """The experts of one layer after the other, then everything else."""
    block = torch.randn(_BLOCK, generator=generator).mul_(_SPREAD)
    unpacked = {name: RandomTensor(name, tensor, block) for name, tensor in _tensors(moe).items()}
    for path, packed in modules.items():
        del unpacked[replaced_parameter(path, packed)]
    for layer in moe.moe_layers:
        own = [unpacked.pop(name) for name in _parameters(layer) if name in unpacked]
        yield layer.name, [*own, *_packed_tensors({n: modules[n] for n in _parameters(layer) if n in modules}, generator)]
    others = {name: packed for name, packed in modules.items() if not isinstance(packed, PackedProjection)}
    yield "everything else", [*unpacked.values(), *_packed_tensors(others, generator)]


def _packed_tensors(modules: Mapping[str, PackedProjection | Packed], generator: Generator) -> list[MemoryTensor]:
    tensors = []
    for path, blank in modules.items():
        packed = random_contents(blank, generator) if isinstance(blank, Packed) else random_projection(blank, generator)
        tensors += [MemoryTensor(f"{path}.{name}", tensor) for name, tensor in packed.tensors().items()]
    return tensors + guard_sources({path: packed.spec() for path, packed in modules.items()})


def _parameters(layer: MoeLayer) -> list[str]:
    return [f"{layer.name}.{name}" for name in (layer.layout.gate_up_name, layer.layout.down_name)]


def _tensors(moe: MoeModel) -> dict[str, Tensor]:
    """What a checkpoint of the model holds; of tensors that are tied to each other, the first."""
    once: dict[int, str] = {}
    tensors = moe.model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        once.setdefault(id(tensor), name)
    return {name: tensors[name] for name in once.values()}


@dataclass(frozen=True)
class RandomTensor:
    """A :class:`TensorSource` that is not in memory: norms are ones, biases zeros, matrices pieces of one block of numbers."""

    name: str
    like: Tensor
    block: Tensor

    @property
    def dtype(self) -> str:
        return DTYPE_NAMES[self.like.dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.like.shape)

    def chunks(self) -> Iterator[memoryview]:
        """The bytes, a block at a time."""
        block = self.block
        if self.like.ndim < 2:
            block = torch.full(self.shape, 0.0 if self.name.endswith("bias") else 1.0)
        values = block.to(self.like.dtype).view(torch.uint8).numpy()
        left = math.prod(self.shape) * self.like.element_size()
        while left:
            chunk = values[:left]
            left -= len(chunk)
            yield chunk.data
