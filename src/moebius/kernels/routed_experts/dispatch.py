"""Which implementation runs a layer: the fastest one that can, or the one that the environment asks for.

A backend is a module beside this one, named in :data:`moebius.kernels.choice.BACKENDS`, with two functions:
``refusal(experts)`` says in words what keeps it from a layer, or None; ``prepare(experts)`` does what is done once and returns
the layer, ready to run.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

from moebius import native
from moebius.kernels import choice
from moebius.kernels.routed_experts.experts import PackedExperts, Run

#: Formats that every backend but the definition refuses, although checkpoints of the default method may have them.
_WITHOUT_KERNELS = ("trellis",)


def prepare(experts: PackedExperts) -> Run:
    """The layer in the hands of the backend that suits it. It reads these tensors as long as it lives.

    Raises:
        KernelError: if ``MOEBIUS_KERNEL`` names a backend that does not exist, is not there or cannot run the layer.
    """
    asked = choice.forced()
    name, reason = choice.choose(choice.BACKENDS, lambda name: _refusal(name, experts, forced=bool(asked)), asked)
    _tell(name, experts, reason)
    module = _module(name)
    assert isinstance(module, ModuleType)
    run: Run = module.prepare(experts)
    return run


def _refusal(name: str, experts: PackedExperts, *, forced: bool) -> str | None:
    if name == "triton" and experts.devices() == {"cpu"} and not forced:  # its interpreter is there for tests alone
        return "the layer is on the CPU"
    module = _module(name)
    if isinstance(module, str):
        return module
    reason: str | None = module.refusal(experts)
    return reason


@cache
def _module(name: str) -> ModuleType | str:
    """A backend, or why it cannot be imported."""
    try:
        return import_module(f"moebius.kernels.routed_experts.{name}")
    except ImportError as error:
        return f"it cannot be imported ({error})"


def _tell(name: str, experts: PackedExperts, reason: str) -> None:
    level = f" ({native.level()})" if name == "cpu" else ""
    formats = [experts.gate_up.factor.name, experts.down.factor.name]
    choice.tell_once(f"experts of {' and '.join(formats)}: {name} kernels{level}, because {reason}")
    if any(name in _WITHOUT_KERNELS for name in formats):
        told = "experts of trellis codes have no kernels yet: they are unpacked in plain PyTorch for every batch of tokens, "
        choice.tell_once(told + "which is slow; codes=planes has kernels", warn=True)
