"""What packed modules share: packed tensors as buffers, and a class swap that can be undone, copied and pickled."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

from torch import Tensor, nn

from moebius.formats import Packed, from_tensors
from moebius.native import Contents
from moebius.private_transformers import mark_initialized


class PackedTensors(nn.Module):
    """The tensors of one :class:`Packed` as buffers, under their own names.

    ``model.to(torch.bfloat16)`` moves them but does not cast them: a scale in another dtype would be another weight.
    """

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        register(self, packed)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedTensors:
        move(self, fn)
        return self

    def extra_repr(self) -> str:
        spec: Any = self._packed_spec
        return ", ".join(f"{key}={value}" for key, value in spec.items())


def register(module: nn.Module, packed: Packed) -> None:
    """Make the tensors of ``packed`` buffers of a module."""
    module._packed_spec = packed.spec()  # type: ignore[assignment]
    module._packed_names = tuple(packed.tensors())  # type: ignore[assignment]
    for name, tensor in packed.tensors().items():
        module.register_buffer(name, tensor)


def packed_of(module: nn.Module) -> Packed:
    """The inverse of :func:`register`: built anew each time, because loading and moving replace the buffers."""
    names: Any = module._packed_names
    spec: Any = module._packed_spec
    return from_tensors(spec, {name: getattr(module, name) for name in names})


class Watched:
    """Tensors of some modules as they were when a kernel took them.

    Args:
        modules: whose buffers and parameters.
        copied: those of them that the kernel holds something made of, so that what they hold is looked at too.
    """

    def __init__(self, modules: Iterable[nn.Module], copied: Iterable[Tensor] = ()) -> None:
        # This is asked in every layer for every token: dictionaries are faster than walking through modules.
        holders: list[Any] = [holder for m in modules for holder in (m._buffers, m._parameters)]
        named = [(holder, name, tensor) for holder in holders for name, tensor in holder.items()]
        self._tensors = [(holder, name, tensor, _place(tensor), _version(tensor)) for holder, name, tensor in named]
        self._contents = Contents(copied)

    def unchanged(self) -> bool:
        """Whether no tensor was replaced, given other memory or written to since, in whatever way."""
        for holder, name, tensor, place, version in self._tensors:
            if holder.get(name) is not tensor or _place(tensor) != place or _version(tensor) != version:
                return False
        return self._contents.unchanged()


def _place(tensor: Tensor | None) -> int:
    try:
        return 0 if tensor is None else tensor.data_ptr()
    except RuntimeError:  # of a subclass without memory of its own
        return 0


def _version(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.is_inference() else tensor._version


def move(module: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
    """What ``nn.Module._apply`` does with the packed buffers, except that their dtypes stay."""
    names: Any = module._packed_names
    for name in names:
        buffer = getattr(module, name)
        moved = fn(buffer)
        module._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)


@cache
def packed_class(mixin: type, original: type) -> type:
    """The class of a packed module: the original's with a mixin in front, so that ``isinstance`` keeps its answers."""
    return type(f"Packed{original.__name__}", (mixin, original), {"__module__": original.__module__})


def rebuild(mixin: type, original: type) -> nn.Module:
    """A blank packed module, for unpickling: its class exists only while the program runs."""
    kind: Any = packed_class(mixin, original)
    return kind.__new__(kind)


class PackedMixin(nn.Module):
    """Base of the mixins: how a swapped module is pickled, and how it gets its class back."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        mixin, original = type(self).__bases__
        return rebuild, (mixin, original), self.__dict__

    def restore_class(self) -> None:
        """Give the module its original class back; its parameters are the caller's to set."""
        self.__class__ = type(self).__bases__[1]


def swap(module: nn.Module, mixin: type) -> None:
    """Put ``mixin`` in front of a module's class. Loading code must not initialize what the checkpoint brings."""
    original: Any = type(module)
    module.__class__ = packed_class(mixin, original)
    mark_initialized(module)
