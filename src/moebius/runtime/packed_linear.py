"""Modules with one packed ``weight``: routers, and linear layers outside the experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from moebius.errors import ShapeError, UnsupportedModelError
from moebius.formats import Packed
from moebius.kernels.choice import tell_of_gradients, wants_gradients
from moebius.kernels.packed_linear import Linear, prepare
from moebius.private_transformers import mark_initialized
from moebius.runtime.packed_module import PackedMixin, Watched, move, packed_of, register, swap


class UnpackedWeight(Tensor):
    """The weight of a packed module, made when it was asked for: a change to it would be lost, and is refused.

    That is what merging an adapter does (``weight.data += ...``). What is computed from it is an ordinary tensor.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        in_place = (name.endswith("_") and not name.startswith("__")) or name in _WRITES
        if (in_place and args and isinstance(args[0], cls)) or isinstance(kwargs.get("out"), cls):
            raise UnsupportedModelError(
                "weight of a packed layer: got a write to it (such as merging an adapter), which would be lost; "
                "keep the adapter beside the layer, or moebius.dequantize(model) first"
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        # A view shares the memory that nobody will look at again.
        return result.as_subclass(cls) if name in ("detach", "__get__") and isinstance(result, Tensor) else result


_WRITES = {"__setitem__", "__set__", *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"))}
_WRITES |= {f"__i{name}__" for name in ("and", "or", "xor", "lshift", "rshift")}


class PackedWeightMixin(PackedMixin):
    """``weight`` is unpacked whenever it is asked for, so the forward of any class that reads it stays as it is."""

    weight_dtype: torch.dtype

    # Outside of graphs, which would hold the weight that they were traced with.
    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """That of the module's own class."""
        return super().forward(*args, **kwargs)

    @property
    def weight(self) -> Tensor:
        """(out, in) in the dtype that the parameter would have. It can be read: what is written to it is refused."""
        weight = packed_of(self).unpack()[0].to(self.weight_dtype).as_subclass(UnpackedWeight)
        # The class around it may want to initialize it while transformers loads: it has its values.
        mark_initialized(weight)
        return weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeightMixin:
        names: Any = self._packed_names
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype)).dtype
        move(self, fn)
        packed = {name: self._buffers.pop(name) for name in names}  # out of the way of a cast
        super()._apply(fn, recurse)
        self._buffers.update(packed)
        return self


class PackedLinearMixin(PackedWeightMixin):
    """A linear layer that multiplies from its packed bytes."""

    @torch.compiler.disable
    def forward(self, inputs: Tensor) -> Tensor:
        """(..., in) to (..., out), in the dtype of the inputs."""
        bias: Any = self.bias
        if inputs.shape[-1] != self.in_features:
            raise ShapeError(f"packed linear layer: got inputs {tuple(inputs.shape)}, wanted (..., {self.in_features})")
        if wants_gradients(inputs, bias):
            tell_of_gradients()
            return functional.linear(inputs, self.weight.to(inputs.dtype), bias)
        outputs = ready_linear(self)(inputs.reshape(-1, inputs.shape[-1])).view(*inputs.shape[:-1], -1)
        return outputs if bias is None else outputs.add_(bias)


#: By module, and outside of it: the layer in the hands of a kernel, and the buffers that it reads.
_READY: WeakKeyDictionary[nn.Module, tuple[Watched, Linear]] = WeakKeyDictionary()


def ready_linear(module: PackedLinearMixin) -> Linear:
    """The layer in the hands of its kernel, prepared once for as long as its tensors stay."""
    found = _READY.get(module)
    if found is None or not found[0].unchanged():
        run = prepare(packed_of(module))
        found = _READY[module] = Watched([module], run.copied), run
    return found[1]


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
    swap(module, PackedLinearMixin if type(module).forward is nn.Linear.forward else PackedWeightMixin)


def unpack_weight(module: PackedWeightMixin, dtype: torch.dtype) -> None:
    """Undo :func:`pack_weight`: ``weight`` is a parameter of this dtype again."""
    names: Any = module._packed_names
    weight = packed_of(module).unpack()[0].to(dtype)
    module.restore_class()
    for name in (*names, "_packed_names", "_packed_spec", "weight_dtype"):
        delattr(module, name)
    module.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
