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

#: What to do where the kernels of a device, or all, do not take a format.
_ADVICE = {
    "trellis": "codes=planes has kernels",
    "cpu": "planes and signs have kernels (methods moebius and mobie); or moebius.dequantize(model), if memory allows",
    "triton": "pip install triton, if it is missing; or moebius.dequantize(model), if memory allows",
}


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
    formats = experts.gate_up.factor.name, experts.down.factor.name
    of = f"experts of {' and '.join(formats)}"
    choice.tell_once(f"{of}: {name} kernels{level}, because {reason}")
    if name == "reference" and not choice.forced():
        fast = "cpu" if experts.devices() == {"cpu"} else "triton"
        why = _refusal(fast, experts, forced=False)
        choice.tell_unpacked(of, why or reason, next(filter(None, map(_ADVICE.get, formats)), _ADVICE[fast]))
