"""What a checkpoint holds: bits, honestly counted, and how it was packed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebius.checkpoint.manifest import REPORT_NAME, is_packed, read_packed_config, verify
from moebius.checkpoint.reader import locate
from moebius.errors import CheckpointError
from moebius.evaluate.plan import checkpoint_size
from moebius.evaluate.size import ModelSize, packed_checkpoint_size
from moebius.json_file import field, read_object


@dataclass(frozen=True)
class CheckpointInfo:
    """What is known of a checkpoint without loading it.

    Attributes:
        folder: where it is.
        verified: whether every tensor was compared with the hash that the manifest has of it.
        size: of experts, of the whole model and on disk.
        quantization: the ``quantization_config`` of a packed checkpoint, empty for another.
        layers: what the report of a packed checkpoint says of its layers, such as their tokens per expert.
    """

    folder: Path
    verified: bool
    size: ModelSize
    quantization: dict[str, Any]
    layers: list[dict[str, Any]]

    @property
    def packed(self) -> bool:
        """Whether Moebius packed it."""
        return bool(self.quantization)

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON; not the folder, which may be a path of this machine."""
        about = ("format_version", "recipe", "calibration")
        known = {name: value for name, value in self.quantization.items() if name in about}
        return {"verified": self.verified, **self.size.to_dict(), **known, "layers": self.layers}


def checkpoint_info(source: str | Path, *, verified: bool = False) -> CheckpointInfo:
    """Look into a checkpoint, packed or not.

    Args:
        source: folder or hub name.
        verified: also compare every tensor with the manifest's hash.

    Raises:
        ModelNotFoundError: nothing there.
        CheckpointError: a checkpoint that is damaged, or one without a manifest that is to be verified.
    """
    folder = locate(source)
    packed = is_packed(folder)
    if verified and not packed:
        raise CheckpointError(f"{source}: got a checkpoint that Moebius did not pack, which has no manifest to verify")
    if verified:
        verify(folder, hashes=True)
    size = packed_checkpoint_size(folder) if packed else checkpoint_size(folder)
    quantization = read_packed_config(folder)[1] if packed else {}
    return CheckpointInfo(folder, verified, size, quantization, report_layers(folder) if packed else [])


def report_layers(folder: Path) -> list[dict[str, Any]]:
    """What the report of a packed checkpoint says of its layers; nothing where there is no report.

    Raises:
        CheckpointError: a report that cannot be read, or is none.
    """
    path = folder / REPORT_NAME
    if not path.exists():
        return []
    layers: list[Any] = field(read_object(path), "layers", list, path, [])
    for layer in layers:
        counts = layer.get("tokens_per_expert", [0]) if isinstance(layer, dict) else None
        named = isinstance(layer, dict) and isinstance(layer.get("name"), str)
        named = named and isinstance(layer.get("leaned_on_layer", []), list)
        counted = isinstance(counts, list) and counts and all(type(n) is int and 0 <= n < 1 << 63 for n in counts)
        if not named or not counted:
            raise CheckpointError(f"{path}: layers hold {str(layer)[:60]!r}, wanted names and counts; fetch it again")
    return layers
