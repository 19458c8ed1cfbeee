"""Guards: empty tensors under the names of the parameters that packed tensors stand for.

transformers without Moebius only warns about a quantization it does not know, and fills what it finds no tensor for with
random numbers. With a tensor of no elements under the parameter's own name, whose shape fits no matrix, it raises instead
(unless it is told ``ignore_mismatched_sizes=True``, which nothing stored can help). A guard takes its line in the header alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from moebius.checkpoint.shards import MemoryTensor, StoredTensor
from moebius.errors import CheckpointError


def guarded_parameter(module: str, spec: Mapping[str, Any]) -> str:
    """Path of the parameter that a packed module stands for: experts are parameters themselves, others have a ``weight``."""
    return module if "factor" in spec else f"{module}.weight"


def guard_tensors(modules: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """The guards of packed modules, by name.

    Args:
        modules: path to spec, as in the ``quantization_config``.
    """
    return {guarded_parameter(module, spec): torch.empty(0, dtype=torch.uint8) for module, spec in modules.items()}


def guard_sources(modules: Mapping[str, Mapping[str, Any]]) -> list[MemoryTensor]:
    """:func:`guard_tensors`, ready to be written to a shard."""
    return [MemoryTensor(name, tensor) for name, tensor in guard_tensors(modules).items()]


def check_all_listed(stored: Mapping[str, StoredTensor], modules: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a config that leaves out what the files hold packed, and guards that are there for some modules only.

    Raises:
        CheckpointError: names the parameter.
    """
    listed = {guarded_parameter(module, spec) for module, spec in modules.items()}
    guards = {name for name, tensor in stored.items() if tensor.is_guard}
    found = guards | set(_projections(stored))
    if left_out := sorted(found - listed):
        raise CheckpointError(
            f"{left_out[0]}: is packed in the files, but `modules` in config.json leaves it out"
            f"{f', and {len(left_out) - 1} others' if len(left_out) > 1 else ''}; fetch config.json again"
        )
    if guards and (unguarded := sorted(listed - guards)):
        raise CheckpointError(f"{unguarded[0]}: has no guard in the files, though others have; fetch the checkpoint again")


def _projections(names: Iterable[str]) -> Iterable[str]:
    """Paths of packed experts, also in checkpoints that were written before there were guards."""
    return (name.partition(".factor.")[0] for name in names if ".factor." in name)
