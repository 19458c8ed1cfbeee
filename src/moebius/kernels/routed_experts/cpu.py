"""On the CPU, from the packed bits as they lie in memory, in C++ (:mod:`moebius.native`); see
:mod:`moebius.kernels.cpu_factors` for how one matrix is multiplied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moebius import native
from moebius.formats.planes import Planes
from moebius.formats.signs import Signs
from moebius.kernels.cpu_factors import Unpacked, kernel_of
from moebius.kernels.routed_experts import reference
from moebius.kernels.routed_experts.activations import recognize
from moebius.kernels.routed_experts.experts import PackedExperts

#: Tokens that go through both projections together where that is not one call: what all their experts compute is held at once.
_TOKENS_AT_ONCE = 1024


def refusal(experts: PackedExperts) -> str | None:
    """What keeps :func:`prepare` from running a layer, in words; None if nothing does. Any activation will do."""
    if native.missing() is not None:
        return native.missing()
    for name, projection in (("gate_up", experts.gate_up), ("down", experts.down)):
        factor = projection.factor
        if not isinstance(factor, (Planes, Signs)):
            return f"{name} is stored as {factor.name}, wanted planes or signs"
    where = experts.devices()
    return None if where == {"cpu"} else f"it is on {', '.join(sorted(where))}, wanted cpu"


def prepare(experts: PackedExperts) -> CpuExperts:
    """Decode the scales of a layer, once for many calls."""
    return CpuExperts(experts)


class CpuExperts:
    """:func:`moebius.kernels.routed_experts.reference.routed_experts` of one layer that :func:`refusal` lets through.

    Attributes:
        compiled: the extension's own object of the whole layer; None where a shared factor has no kernel, there are biases, or
            the activation is not SiLU of the first half of the channels times the second.
        copied: see :class:`moebius.kernels.routed_experts.experts.Run`.
    """

    def __init__(self, experts: PackedExperts) -> None:
        gate_up, down = experts.gate_up, experts.down
        self.packed, self.activation = experts, experts.activation
        biases = experts.gate_up_bias, experts.down_bias
        self.gate_up_bias, self.down_bias = (None if bias is None else bias.detach() for bias in biases)
        self.gate_up, self.down = kernel_of(gate_up.factor), kernel_of(down.factor)
        shared = {
            "gate_up.right": gate_up.right,
            "gate_up.left": gate_up.left,
            "down.right": down.right,
            "down.left": down.left,
        }
        self.shared = {name: kernel_of(packed) for name, packed in shared.items() if packed is not None}
        self.copied = tuple(t for kernel in (self.gate_up, self.down, *self.shared.values()) for t in kernel.copied)
        self.compiled: Any = None
        has_kernels = not any(isinstance(kernel, Unpacked) for kernel in self.shared.values())
        has_silu = recognize(experts.activation, gate_up.shape[1]) == ("silu", True)
        if has_kernels and has_silu and all(bias is None for bias in biases):
            factors = {name: kernel.factor for name, kernel in self.shared.items()}
            self.compiled = native.extension().Experts(
                factors.get("gate_up.right"), self.gate_up.factor, factors.get("gate_up.left"),
                factors.get("down.right"), self.down.factor, factors.get("down.left"),
            )  # fmt: skip

    def __call__(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As the reference: (tokens, hidden), (tokens, top_k), (tokens, top_k) to (tokens, hidden)."""
        self.packed.check_call(hidden, top_k_index, top_k_weights)
        return self._run(hidden.detach(), top_k_index, top_k_weights.detach())

    def _run(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if not top_k_index.numel():
            return hidden.new_zeros(len(hidden), self.packed.down.shape[1])
        few = top_k_index.numel() <= native.extension().FEW_INPUTS
        if self.compiled is not None and (few or native.has_tiles()):
            return self.in_one_call(hidden, top_k_index, top_k_weights)
        if len(hidden) <= _TOKENS_AT_ONCE:
            return self._in_parts(hidden, top_k_index, top_k_weights)
        some = (tensor.split(_TOKENS_AT_ONCE) for tensor in (hidden, top_k_index, top_k_weights))
        return torch.cat([self._run(*part) for part in zip(*some, strict=True)])

    def in_one_call(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The layer where it is ``compiled``."""
        inputs = hidden.detach().float().contiguous()
        outputs = inputs.new_empty(len(inputs), self.compiled.outputs)
        chosen, weights = top_k_index.long().contiguous(), top_k_weights.detach().float().contiguous()
        self.compiled.apply(inputs, chosen, weights, outputs, torch.get_num_threads())
        return outputs.to(hidden.dtype)

    def _in_parts(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Factor by factor, with what the extension does not have in between."""
        tokens, top_k = top_k_index.shape
        dtype = native.product_dtype(hidden.dtype)
        slots, weights = top_k_index.reshape(-1).long().contiguous(), top_k_weights.float()
        inputs = self._shared("gate_up.right", hidden.float(), dtype)
        few, many = (slots, []) if native.has_tiles() else _by_count(slots, self.packed.count)
        if few is None:
            summed = inputs.new_zeros(tokens, self.down.rows)
        else:
            states = self._between(self.gate_up.packed(inputs, few, top_k), few, dtype)
            states = self.down.packed(states, few)
            summed = torch.bmm(weights.unsqueeze(1), states.view(tokens, top_k, self.down.rows)).squeeze(1)
        for expert, mine in many:  # each from end to end: what it computes stays in the cache
            members = mine // top_k
            states = self.gate_up.dense(expert, inputs[members], dtype)
            states = self._between(states, slots[mine], dtype)
            states = self.down.dense(expert, states, dtype)
            summed.index_add_(0, members, states.mul_(weights.reshape(-1, 1)[mine]))
        result = self._shared("down.left", summed, dtype)
        if self.down_bias is not None:
            result = result + reference.routed_bias(top_k_index, top_k_weights, self.down_bias)
        return result.to(hidden.dtype)

    def _between(self, states: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
        """From one expert factor to the other: (n, rows of the first) to (n, columns of the second)."""
        states = self._shared("gate_up.left", states, dtype)
        if self.gate_up_bias is not None:
            states = states + self.gate_up_bias[slots.clamp(0, self.packed.count - 1)].float()
        return self._shared("down.right", self.activation(states), dtype)

    def _shared(self, name: str, states: Tensor, dtype: torch.dtype) -> Tensor:
        kernel = self.shared.get(name)
        if kernel is None:
            return states
        few = len(states) <= native.extension().FEW_INPUTS
        return kernel.packed(states) if few or kernel.has_tiles() else kernel.dense(0, states, dtype)


def _by_count(slots: Tensor, experts: int) -> tuple[Tensor | None, list[tuple[int, Tensor]]]:
    """Experts with many tokens and their slots, and what remains (-1 for slots taken out), or None if nothing does."""
    most = native.extension().FEW_INPUTS
    if len(slots) <= most:
        return slots, []
    known = torch.where((slots >= 0) & (slots < experts), slots, experts)
    ranked, order = known.sort(stable=True)
    ends = torch.searchsorted(ranked, torch.arange(experts + 1), right=True).tolist()
    begins = [0, *ends]
    many = [(e, order[begins[e] : ends[e]]) for e in range(experts) if ends[e] - begins[e] > most]
    if sum(len(mine) for _, mine in many) == ends[experts - 1]:
        return None if many else slots, many
    few = slots.clone()
    for _, mine in many:
        few[mine] = -1
    return few, many
