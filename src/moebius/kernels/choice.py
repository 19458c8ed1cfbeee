"""Which implementation of an op runs: the fastest one that can, or the one that the environment asks for."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from moebius import native
from moebius.errors import KernelError

#: Set to the name of a backend, it is used or an error is raised.
VARIABLE = "MOEBIUS_KERNEL"
#: What inputs may be.
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: Of any op.
BACKENDS = ("triton", "cpu", "reference")

_log = logging.getLogger("moebius.kernels")


def forced() -> str:
    """The backend that the environment asks for, or nothing.

    Raises:
        KernelError: if ``MOEBIUS_KERNEL`` is no name of a backend.
    """
    name = os.environ.get(VARIABLE, "")
    if name and name not in BACKENDS:
        raise KernelError(f"{VARIABLE}: got {name!r}, wanted one of {', '.join(BACKENDS)}, or nothing for the fastest")
    return name


def choose(names: Sequence[str], refusal: Callable[[str], str | None], asked: str) -> tuple[str, str]:
    """A backend, and why it was chosen.

    Args:
        names: backends of the op, the fastest first.
        refusal: what keeps a backend from the work, in words, or None.
        asked: a backend that was asked for, or nothing.

    Raises:
        KernelError: if the one that was asked for refuses.
    """
    refusals: list[str] = []
    for name in (asked,) if asked else names:
        reason = refusal(name)
        if reason is None:
            return name, f"{VARIABLE} asks for it" if asked else "; ".join(refusals) or "it is the fastest"
        refusals.append(f"{name}: {reason}")
    raise KernelError(f"{VARIABLE}={asked} cannot run this layer: {refusals[0]}; unset it to use what can")


def wants_gradients(*tensors: Tensor | None) -> bool:
    """Whether gradients are taken of something that was computed from these. Kernels have none: the definitions have."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


@cache
def tell_once(message: str, *, warn: bool = False) -> None:
    """Log what was chosen, once; as a warning where it is not what one would expect."""
    _log.log(logging.WARNING if warn else logging.INFO, message)


def tell_unpacked(what: str, reason: str, advice: str) -> None:
    """Warn, once for each cause, that what a fast kernel should read is unpacked instead.

    Args:
        what: is unpacked: experts or linear layers, and of which format.
        reason: what keeps the kernel of the device from it.
        advice: what to do about it.
    """
    if reason == native.missing():  # the same cause for everything
        what, advice = "packed layers", ""
    advice = f"; {advice}" if advice else ""
    tell_once(f"{what} are unpacked in plain PyTorch for every batch of tokens, which is slow: {reason}{advice}", warn=True)


def tell_of_gradients() -> None:
    """Warn, once, that gradients are taken through packed layers."""
    told = "gradients are taken through packed layers: they are unpacked in plain PyTorch, which is slow"
    tell_once(f"{told}; use torch.no_grad() where none are wanted", warn=True)
