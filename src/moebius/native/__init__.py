"""The C++ of all ops, and its one face: what was compiled, with which instructions it runs, and its objects.

Tensors cross this border whole. The extension checks dtype, shape, layout and device of each of them, and every number that
leads to a place in memory, before it reads or writes; it keeps alive what its objects read. See ``_extension.pyi`` for what it
takes, and ``csrc/`` for what it does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

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
