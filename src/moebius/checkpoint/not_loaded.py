"""Tensors of a checkpoint that transformers does not load: layers for multi-token prediction, scales that nobody reads.

They are copied as they are, in 16 bit and experts included, so whoever counts bits has to be told.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from moebius.checkpoint.dequantized import SourceTensor
from moebius.checkpoint.names import parameters_of
from moebius.types import MoeModel

_SHOWN = 4


@dataclass(frozen=True)
class NotLoaded:
    """What no parameter of the model takes.

    Attributes:
        names: of the tensors, those of one layer or of one kind together, such as ``mtp.*`` and ``model.layers.61.*``.
        tensors: how many there are.
        weights: their numbers.
        bytes: what they take.
    """

    names: tuple[str, ...] = ()
    tensors: int = 0
    weights: int = 0
    bytes: int = 0

    def line(self) -> str:
        """One line that names them; empty if there are none."""
        if not self.tensors:
            return ""
        shown = ", ".join(self.names[:_SHOWN]) + (f" and {len(self.names) - _SHOWN} more" if len(self.names) > _SHOWN else "")
        return (
            f"not loaded by transformers, copied as they are and not counted as experts: {shown} "
            f"({self.tensors:,} tensors, {self.bytes:,} bytes)"
        )

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"names": list(self.names), "tensors": self.tensors, "weights": self.weights, "bytes": self.bytes}


def not_loaded(tensors: Mapping[str, SourceTensor], moe: MoeModel, claimed: Collection[str] = ()) -> NotLoaded:
    """The tensors of a checkpoint that are of no use to its model.

    Args:
        tensors: all of them, by name.
        moe: the model; the meta device is enough.
        claimed: names that belong to packed modules.
    """
    known = parameters_of(tensors.keys(), moe.model)
    found = {name: tensor for name, tensor in tensors.items() if name not in known and name not in claimed}
    return NotLoaded(
        names=tuple(sorted({_together(name, moe) for name in found})),
        tensors=len(found),
        weights=sum(math.prod(tensor.shape) for tensor in found.values()),
        bytes=sum(tensor.end - tensor.begin for tensor in found.values()),
    )


def _together(name: str, moe: MoeModel) -> str:
    """The name that a tensor is listed under."""
    if name.startswith("mtp."):
        return "mtp.*"
    layer = re.match(r"(.*?\blayers\.)(\d+)\.", name)
    if layer and int(layer[2]) >= len(moe.decoder):
        return f"{layer[0]}*"
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
