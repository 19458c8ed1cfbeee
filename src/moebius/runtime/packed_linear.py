"""Modules with one packed ``weight``: routers, and the linear layers of shared experts and dense MLPs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moebius.formats import Packed
from moebius.runtime.packed_module import PackedMixin, move, packed_of, register, swap


class PackedWeightMixin(PackedMixin):
    """``weight`` is unpacked whenever it is asked for, so the forward of any class that reads it stays as it is."""

    weight_dtype: torch.dtype

    @property
    def weight(self) -> Tensor:
        """(out, in) in the dtype that the parameter would have."""
        return packed_of(self).unpack()[0].to(self.weight_dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeightMixin:
        names: Any = self._packed_names
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype)).dtype
        move(self, fn)
        packed = {name: self._buffers.pop(name) for name in names}  # out of the way of a cast
        super()._apply(fn, recurse)
        self._buffers.update(packed)
        return self


def pack_weight(module: nn.Module, packed: Packed) -> None:
    """Turn a module with a parameter ``weight`` into a packed one, in place.

    Args:
        module: a linear layer or a router; may be on the meta device.
        packed: a batch of one, (1, out, in); its tensors become buffers of the module.
    """
    weight: Any = module.weight
    module.weight_dtype = weight.dtype
    del module.weight
    register(module, packed)
    swap(module, PackedWeightMixin)


def unpack_weight(module: PackedWeightMixin, dtype: torch.dtype) -> None:
    """Undo :func:`pack_weight`: ``weight`` is a parameter of this dtype again."""
    names: Any = module._packed_names
    weight = packed_of(module).unpack()[0].to(dtype)
    module.restore_class()
    for name in (*names, "_packed_names", "_packed_spec", "weight_dtype"):
        delattr(module, name)
    module.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
