"""What a model takes, honestly: a bit counts when it is stored.

Signs, bitmaps, masks, codes, scales, shared factors and padding all count. The figures are always given together: bits per
expert weight, bits per weight of the whole model, bytes on disk; and, labelled as such, the paper's activated average.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moebius.checkpoint.described import check_described, packed_from_spec
from moebius.checkpoint.manifest import read_packed_config
from moebius.checkpoint.not_loaded import NotLoaded, not_loaded
from moebius.checkpoint.routing import check_routing, experts_per_token
from moebius.checkpoint.shards import StoredTensor, read_folder
from moebius.errors import CheckpointError, MoebiusError
from moebius.formats import Packed, PackedProjection
from moebius.models.load import skeleton
from moebius.types import MoeModel


@dataclass(frozen=True)
class ModuleSize:
    """What one quantized module takes.

    Attributes:
        name: module path, such as ``model.layers.0.mlp.experts.gate_up_proj``.
        kind: ``"experts"``, or ``"other"`` for a router or a linear layer that was quantized on request.
        description: its formats, such as ``"signs + left integers (8 bit)"``.
        shape: of the original weights; (experts, out, in), or (1, out, in).
        stored_bits: of all its tensors.
        shared_bits: the part of ``stored_bits`` that all experts share.
    """

    name: str
    kind: str
    description: str
    shape: tuple[int, int, int]
    stored_bits: int
    shared_bits: int = 0

    @property
    def weights(self) -> int:
        """Weights of the original."""
        return math.prod(self.shape)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of the original."""
        return self.stored_bits / self.weights

    def activated_bits(self, top_k: int) -> float:
        """Bits that one token touches: the shared factors and ``top_k`` experts (numerator of MoBiE Eq. 46)."""
        experts = self.shape[0]
        return self.shared_bits + (self.stored_bits - self.shared_bits) * top_k / experts


@dataclass(frozen=True)
class ModelSize:
    """What a whole model takes.

    Attributes:
        modules: the experts, and what else was quantized.
        other_weights: weights that were left as they were.
        other_bits: what those take.
        top_k: experts per token; None if the config does not say.
        file_bytes: of the safetensors files; None for a plan.
        folder_bytes: of everything in the folder; None for a plan.
        not_loaded: the part of ``other_weights`` that transformers does not load.
    """

    modules: tuple[ModuleSize, ...]
    other_weights: int
    other_bits: int
    top_k: int | None
    file_bytes: int | None = None
    folder_bytes: int | None = None
    not_loaded: NotLoaded = field(default_factory=NotLoaded)

    @property
    def experts(self) -> tuple[ModuleSize, ...]:
        """The modules that are experts."""
        return tuple(m for m in self.modules if m.kind == "experts")

    @property
    def expert_weights(self) -> int:
        """Expert weights of the original."""
        return sum(m.weights for m in self.experts)

    @property
    def expert_bits(self) -> int:
        """Stored bits of everything that stands for the experts."""
        return sum(m.stored_bits for m in self.experts)

    @property
    def weights(self) -> int:
        """Weights of the original model."""
        return sum(m.weights for m in self.modules) + self.other_weights

    @property
    def bits(self) -> int:
        """Stored bits of the whole model."""
        return sum(m.stored_bits for m in self.modules) + self.other_bits

    @property
    def bits_per_expert_weight(self) -> float:
        """The figure that counts."""
        return self.expert_bits / self.expert_weights

    @property
    def bits_per_weight(self) -> float:
        """Of the whole model, embeddings and attention included."""
        return self.bits / self.weights

    @property
    def activated_bits_per_weight(self) -> float | None:
        """The paper's activated average (MoBiE Eq. 46), with every stored bit counted; None if top-k is not known."""
        if self.top_k is None:
            return None
        activated = sum(m.activated_bits(self.top_k) for m in self.experts)
        return activated / sum(self.top_k * m.shape[1] * m.shape[2] for m in self.experts)

    def to_dict(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        return {
            "bits_per_expert_weight": self.bits_per_expert_weight,
            "bits_per_weight": self.bits_per_weight,
            "activated_bits_per_weight_eq46": self.activated_bits_per_weight,
            "expert_weights": self.expert_weights,
            "weights": self.weights,
            "expert_bytes": self.expert_bits / 8,
            "bytes": self.bits / 8,
            "file_bytes": self.file_bytes,
            "folder_bytes": self.folder_bytes,
            "experts_per_token": self.top_k,
            "not_loaded": self.not_loaded.to_dict(),
            "modules": [
                {
                    "name": m.name,
                    "kind": m.kind,
                    "format": m.description,
                    "shape": list(m.shape),
                    "stored_bits": m.stored_bits,
                    "shared_bits": m.shared_bits,
                    "bits_per_weight": m.bits_per_weight,
                }
                for m in self.modules
            ],
        }


def packed_module(name: str, packed: PackedProjection | Packed) -> ModuleSize:
    """The size of a packed module; its tensors may be on the meta device."""
    if isinstance(packed, PackedProjection):
        parts = [_described(p) if part == "factor" else f"{part} {_described(p)}" for part, p in packed.parts().items()]
        return ModuleSize(name, "experts", " + ".join(parts), packed.shape, packed.stored_bits(), packed.shared_bits())
    return ModuleSize(name, "other", _described(packed), (packed.batch, packed.rows, packed.columns), packed.stored_bits())


def _described(packed: Packed) -> str:
    """A format's name, with its bits where it has a choice of them."""
    bits = packed.spec().get("bits")
    return packed.name if bits is None else f"{packed.name} ({bits} bit)"


def packed_checkpoint_size(folder: Path) -> ModelSize:
    """The size of a packed checkpoint, added up from the headers of its safetensors files.

    Raises:
        CheckpointError: a folder without ``quantization_config`` of Moebius, or files that hold other bits than it says.
    """
    config, quantization = read_packed_config(folder)
    stored = read_folder(folder, config)
    check_described(stored, quantization["modules"])
    check_routing(config, quantization["modules"], folder / "config.json")
    packed = {name: packed_from_spec(name, spec) for name, spec in quantization["modules"].items()}
    modules = [packed_module(name, module) for name, module in packed.items()]
    claimed = {f"{name}.{tensor}" for name, module in packed.items() for tensor in module.tensors()}
    rest = [tensor for name, tensor in stored.items() if name not in claimed]
    moe = _model_of(folder)
    if moe is not None:
        _check_shapes(modules, moe)
    return ModelSize(
        modules=tuple(modules),
        other_weights=sum(math.prod(t.shape) for t in rest),
        other_bits=sum(_bits(t) for t in rest),
        top_k=experts_per_token(config),
        file_bytes=file_bytes(folder),
        folder_bytes=folder_bytes(folder),
        not_loaded=NotLoaded() if moe is None else not_loaded(stored, moe, claimed),
    )


def _model_of(folder: Path) -> MoeModel | None:
    """On the meta device; None for a model that this transformers does not know, whose sizes can still be said."""
    try:
        return skeleton(folder)
    except MoebiusError:
        return None


def _check_shapes(modules: Iterable[ModuleSize], moe: MoeModel) -> None:
    """Refuse packed matrices that are not those of the model, as far as both call them by the same names."""
    shapes: dict[str, tuple[int, ...]] = {name: tuple(p.shape) for name, p in moe.model.named_parameters()}
    for layer in moe.moe_layers:
        layout, channels = layer.layout, layer.layout.inner * (2 if layer.layout.has_gate else 1)
        shapes[f"{layer.name}.{layout.gate_up_name}"] = (layout.experts, channels, layout.hidden)
        shapes[f"{layer.name}.{layout.down_name}"] = (layout.experts, layout.hidden, layout.inner)
    for module in modules:
        got, name = (module.shape, module.name) if module.kind == "experts" else (module.shape[1:], f"{module.name}.weight")
        if name in shapes and got != shapes[name]:
            raise CheckpointError(
                f"{module.name}: packed as {got}, but the model that config.json describes wants {shapes[name]}"
            )


def file_bytes(folder: Path) -> int:
    """Bytes of the safetensors files of a folder."""
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def folder_bytes(folder: Path) -> int:
    """Bytes of all files of a checkpoint."""
    return sum(f.stat().st_size for f in folder.iterdir() if f.is_file())


def _bits(tensor: StoredTensor) -> int:
    return 8 * (tensor.end - tensor.begin)
