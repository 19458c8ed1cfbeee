"""Packed modules under accelerate's hooks, which fetch the tensors of a module when it is called."""

from __future__ import annotations

from typing import Any

from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module
from torch import nn

from moebius.runtime.packed_experts import PackedExpertsMixin, forget_ready


class FetchParts(ModelHook):
    """Fetches what packed experts read before they run, and lets go of it afterwards.

    The parts of packed experts hold the tensors, and so the hooks, but are never called themselves: the experts read them.
    """

    def __init__(self, parts: list[tuple[nn.Module, AlignDevicesHook]]) -> None:
        self.parts = parts

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        for part, hook in self.parts:
            hook.pre_forward(part)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        forget_ready(module)  # the kernel's copy would keep every layer in memory
        for part, hook in self.parts:
            hook.post_forward(part, None)
        return output


def fetch_parts(model: nn.Module) -> None:
    """Hook the packed experts of a model whose tensors were offloaded to the disk; others are left alone."""
    for module in model.modules():
        if isinstance(module, PackedExpertsMixin):
            hooks = [(part, getattr(part, "_hf_hook", None)) for part in module.modules() if part is not module]
            parts = [(part, hook) for part, hook in hooks if isinstance(hook, AlignDevicesHook) and hook.offload]
            if parts:
                add_hook_to_module(module, FetchParts(parts), append=True)
