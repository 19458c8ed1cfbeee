"""A fused experts module of transformers that keeps its matrices packed and runs from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from moebius.formats import Packed, PackedProjection
from moebius.kernels.choice import tell_of_gradients, wants_gradients
from moebius.kernels.routed_experts import PackedExperts, prepare, reference
from moebius.private_transformers import gate
from moebius.runtime.packed_module import PackedMixin, PackedTensors, Watched, packed_of, swap
from moebius.types import ExpertsLayout


class ProjectionTensors(nn.Module):
    """A :class:`PackedProjection` as submodules ``factor``, ``left``, ``right`` and ``bias``."""

    def __init__(self, projection: PackedProjection) -> None:
        super().__init__()
        for part, packed in projection.parts().items():
            self.add_module(part, PackedTensors(packed))

    def packed(self) -> PackedProjection:
        """The projection, over the buffers as they are now."""
        parts: dict[str, Packed] = {part: packed_of(module) for part, module in self.named_children()}
        return PackedProjection(**parts)


class PackedExpertsMixin(PackedMixin):
    """Runs the experts from their packed matrices. Biases, activation and gate are the module's own.

    Where gradients are taken, the definition runs, which has them: of the hidden state, the routing weights and the biases.
    """

    # A graph would hold the tensors of the layer it was traced with, and not see that others took their place.
    @torch.compiler.disable
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As transformers' experts: (tokens, hidden), (tokens, top_k), (tokens, top_k) to (tokens, hidden)."""
        if wants_gradients(hidden_states, top_k_weights, *_own_biases(self)):
            tell_of_gradients()
            return reference.routed_experts(hidden_states, top_k_index, top_k_weights, packed_experts(self))
        return ready_experts(self).run(hidden_states, top_k_index, top_k_weights)


def _activation(module: Any) -> Callable[[Tensor], Tensor]:
    """The module's own; it does not keep the module alive."""
    itself, has_gate = ref(module), packed_layout(module).has_gate

    def activation(states: Tensor) -> Tensor:
        module: Any = itself()
        activated: Tensor = gate(module)(states) if has_gate else module.act_fn(states)
        return activated

    return activation


def packed_experts(module: Any) -> PackedExperts:
    """All that the experts of a packed module compute with, over its tensors as they are now."""
    projections = packed_projections(module)
    biases = (_bias(projection, own) for projection, own in zip(projections, _own_biases(module), strict=True))
    return PackedExperts(*projections, _activation(module), *biases)


def _own_biases(module: Any) -> list[Tensor | None]:
    layout = packed_layout(module)
    return [getattr(module, f"{name}_bias") if layout.has_bias else None for name in (layout.gate_up_name, layout.down_name)]


class ReadyExperts:
    """A layer in the hands of a kernel, and what that was made from."""

    def __init__(self, module: nn.Module) -> None:
        layout = packed_layout(module)
        with torch.no_grad():
            self.run = prepare(packed_experts(module))
        parents = [(module._modules, name) for name in (layout.gate_up_name, layout.down_name)]
        parents += [(part._modules, name) for part in _projection_tensors(module) for name in part._modules]
        parents += [(holder, "act_fn") for holder in (module._modules, vars(module)) if "act_fn" in holder]
        self.modules = [(holder, name, holder[name]) for holder, name in parents]
        # The module itself holds the biases that are its own.
        parts = [part for _, _, part in self.modules if isinstance(part, nn.Module)]
        biases = [(p.bias, own) for p, own in zip(packed_projections(module), _own_biases(module), strict=True) if p.bias]
        # What the kernel holds is their sum, see `_bias`.
        summed = [tensor for bias, own in biases for tensor in (*bias.tensors().values(), own) if tensor is not None]
        self.copied = *self.run.copied, *summed
        self.buffers = Watched([module, *parts], self.copied)

    def holds(self) -> bool:
        """Whether no module and no buffer was replaced or written to since."""
        for holder, name, part in self.modules:
            if holder.get(name) is not part:
                return False
        return self.buffers.unchanged()


#: By module, and outside of it: it is neither saved, nor copied, nor moved.
_READY: WeakKeyDictionary[nn.Module, ReadyExperts] = WeakKeyDictionary()


def ready_experts(module: PackedExpertsMixin) -> ReadyExperts:
    """The layer in the hands of its kernel, prepared once for as long as its tensors stay."""
    ready = _READY.get(module)
    if ready is None or not ready.holds():
        ready = _READY[module] = ReadyExperts(module)
    return ready


def forget_ready(module: nn.Module) -> None:
    """Let go of what the kernel holds of a layer."""
    _READY.pop(module, None)


def _bias(projection: PackedProjection, own: Tensor | None) -> Tensor | None:
    """What the experts add to the outputs of a projection, (experts, out): the module's own bias and the packed one."""
    if projection.bias is None:
        return own
    packed = projection.bias.unpack().squeeze(1)
    return packed if own is None else packed + own.float()


def pack_experts(module: nn.Module, layout: ExpertsLayout, gate_up: PackedProjection, down: PackedProjection) -> None:
    """Turn an experts module into a packed one, in place: its two parameters give way to packed buffers.

    Args:
        module: fused experts of transformers; may be on the meta device.
        layout: what ``layout_of(module)`` says.
        gate_up, down: the matrices as (experts, out, in), whatever the orientation of the parameters was. Meta tensors are
            fine: a checkpoint is then loaded into the buffers.
    """
    for name, projection in ((layout.gate_up_name, gate_up), (layout.down_name, down)):
        delattr(module, name)
        module.add_module(name, ProjectionTensors(projection))
    module.packed_layout = layout  # type: ignore[assignment]
    swap(module, PackedExpertsMixin)


def packed_layout(module: nn.Module) -> ExpertsLayout:
    """The layout that the module was packed with."""
    layout: Any = module.packed_layout
    return layout


def packed_projections(module: nn.Module) -> tuple[PackedProjection, PackedProjection]:
    """``gate_up`` and ``down`` of a packed experts module."""
    gate_up, down = _projection_tensors(module)
    return gate_up.packed(), down.packed()


def _projection_tensors(module: nn.Module) -> tuple[ProjectionTensors, ProjectionTensors]:
    layout = packed_layout(module)
    gate_up, down = module.get_submodule(layout.gate_up_name), module.get_submodule(layout.down_name)
    assert isinstance(gate_up, ProjectionTensors) and isinstance(down, ProjectionTensors)
    return gate_up, down


def unpack_experts(module: PackedExpertsMixin, gate_up: Tensor, down: Tensor) -> None:
    """Undo :func:`pack_experts` with these parameters, in the orientation that the module's own class wants."""
    layout = packed_layout(module)
    module.restore_class()
    del module.packed_layout
    for name, weight in ((layout.gate_up_name, gate_up), (layout.down_name, down)):
        delattr(module, name)
        module.register_parameter(name, nn.Parameter(weight, requires_grad=False))
