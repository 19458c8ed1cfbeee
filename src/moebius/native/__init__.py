"""The C++ of all ops, and its one face: what was compiled, with which instructions it runs, and its objects.

Tensors cross this border whole. The extension checks dtype, shape, layout and device of each of them, and every number that
leads to a place in memory, before it reads or writes; it keeps alive what its objects read. See ``_extension.pyi`` for what it
takes, and ``csrc/`` for what it does.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moebius.errors import KernelError

if TYPE_CHECKING:
    from moebius.native import _extension

try:
    from moebius.native import _extension
except ImportError as error:  # installed where there was no C++ compiler
    _extension: Any = None  # type: ignore[no-redef]
    _MISSING = f"the compiled kernels are not there ({error}); reinstall moebius where there is a C++ compiler"


def missing() -> str | None:
    """Why there are no compiled kernels; None if there are."""
    return _MISSING if _extension is None else None


def extension() -> Any:
    """The compiled module; ask :func:`missing` first."""
    return _extension


def levels() -> list[str]:
    """Sets of instructions that this processor has and the kernels know, the best first; none if nothing was compiled."""
    return _extension.levels() if _extension else []


def level() -> str:
    """The set of instructions in use."""
    return _extension.level()


def use_level(name: str) -> None:
    """Use this set of instructions from now on.

    Raises:
        KernelError: a name that is not among :func:`levels`.
    """
    if name not in levels():
        raise KernelError(
            f"instruction level: got {name!r}, wanted one of {', '.join(levels()) or 'none: nothing was compiled'}"
        )
    _extension.use_level(name)


def has_tiles() -> bool:
    """Whether the instructions in use multiply many inputs fast, by tiles."""
    return bool(_extension and _extension.has_tiles())


def product_dtype(inputs: torch.dtype) -> torch.dtype:
    """What dense products for these inputs are computed in: bf16 only where that is asked for and fast."""
    return torch.bfloat16 if inputs == torch.bfloat16 and _extension.multiplies_bf16() else torch.float32


def multiplied(matrix: Any, inputs: Tensor, outputs: Tensor) -> Tensor:
    """``outputs``, into which an object of the extension has written its matrix times the inputs."""
    matrix.apply(inputs.contiguous(), outputs, torch.get_num_threads())
    return outputs


class Contents:
    """Tensors that a kernel holds something made of, and what they held when it took them.

    Their bytes are looked at, which costs about a tenth of a nanosecond each: a write through ``.data``, through NumPy or to an
    inference tensor raises no version. On a GPU a look would wait for all that is under way, and is left out.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        parts = [_bytes_of(tensor) for tensor in tensors if tensor.device.type == "cpu"]
        self._look: Callable[[], Any] = lambda: [zlib.crc32(part.numpy().data) for part in parts]
        if _extension:
            self._look = _extension.Contents(parts).fingerprint
        self._found = self._look()

    def unchanged(self) -> bool:
        """Whether they hold the same."""
        return bool(self._look() == self._found)


def _bytes_of(tensor: Tensor) -> Tensor:
    """The memory of a tensor, flat; where there are gaps, all of it that it is part of."""
    if tensor.is_contiguous():
        return tensor.detach().reshape(-1).view(torch.uint8)
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
