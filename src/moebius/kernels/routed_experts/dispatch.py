"""Which implementation runs a layer: the fastest one that can, or the one that the environment asks for.

A backend is a module beside this one with two functions: ``refusal(gate_up, down, activation)`` says in words what keeps it
from a layer, or None; ``routed_experts`` has the signature of the reference. One that has something to do once for many calls
also has ``prepare(gate_up, down)``, which returns an :class:`Experts`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from types import ModuleType
from typing import Protocol

from torch import Tensor

from moebius.formats import PackedProjection
from moebius.kernels import choice
from moebius.kernels.routed_experts import reference

#: Formats that every backend but the definition refuses, although checkpoints of the default method may have them.
_WITHOUT_KERNELS = ("trellis",)


class Experts(Protocol):
    """The experts of one layer, ready to run."""

    def __call__(
        self,
        hidden: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        activation: Callable[[Tensor], Tensor],
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> Tensor:
        """See :func:`moebius.kernels.routed_experts.reference.routed_experts`."""


def prepare(gate_up: PackedProjection, down: PackedProjection, activation: Callable[[Tensor], Tensor]) -> Experts:
    """The layer in the hands of the backend that suits it. It reads these tensors as long as it lives.

    Raises:
        KernelError: if ``MOEBIUS_KERNEL`` names a backend that does not exist, is not there or cannot run the layer.
    """
    asked = choice.forced()
    refusal = partial(_refusal, gate_up=gate_up, down=down, activation=activation, forced=bool(asked))
    name, reason = choice.choose(choice.BACKENDS, refusal, asked)
    _tell(name, gate_up, down, reason)
    return _prepared(name, gate_up, down)


def routed_experts(
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up: PackedProjection,
    down: PackedProjection,
    activation: Callable[[Tensor], Tensor],
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """What :func:`moebius.kernels.routed_experts.reference.routed_experts` defines, by the backend that suits the layer."""
    experts = prepare(gate_up, down, activation)
    return experts(hidden, top_k_index, top_k_weights, activation, gate_up_bias, down_bias)


def _refusal(
    name: str, *, gate_up: PackedProjection, down: PackedProjection, activation: Callable[[Tensor], Tensor], forced: bool
) -> str | None:
    if name == "reference":
        return None
    devices = {t.device.type for projection in (gate_up, down) for t in projection.tensors().values()}
    if name == "triton" and devices == {"cpu"} and not forced:  # its interpreter is there for tests alone
        return "the layer is on the CPU"
    module = _module(name)
    if isinstance(module, str):
        return module
    reason: str | None = module.refusal(gate_up, down, activation)
    return reason


def _prepared(name: str, gate_up: PackedProjection, down: PackedProjection) -> Experts:
    module = reference if name == "reference" else _module(name)
    assert isinstance(module, ModuleType)
    if hasattr(module, "prepare"):
        experts: Experts = module.prepare(gate_up, down)
        return experts

    def run(
        hidden: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        activation: Callable[[Tensor], Tensor],
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> Tensor:
        routed: Tensor = module.routed_experts(
            hidden, top_k_index, top_k_weights, gate_up, down, activation, gate_up_bias, down_bias
        )
        return routed

    return run


@cache
def _module(name: str) -> ModuleType | str:
    """A backend, or why it cannot be imported."""
    try:
        return import_module(f"moebius.kernels.routed_experts.{name}")
    except ImportError as error:
        return f"it cannot be imported ({error})"


def _tell(name: str, gate_up: PackedProjection, down: PackedProjection, reason: str) -> None:
    module = _module(name) if name == "cpu" else None
    level = f" ({module.level()})" if isinstance(module, ModuleType) else ""
    choice.tell_once(f"experts of {gate_up.factor.name} and {down.factor.name}: {name} kernels{level}, because {reason}")
    if gate_up.factor.name in _WITHOUT_KERNELS or down.factor.name in _WITHOUT_KERNELS:
        told = "experts of trellis codes have no kernels yet: they are unpacked in plain PyTorch for every batch of tokens, "
        choice.tell_once(told + "which is slow; codes=planes has kernels", warn=True)
