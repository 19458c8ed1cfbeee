"""The definition, in plain PyTorch: unpack the experts that tokens chose, then multiply."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from moebius.formats import Packed
from moebius.kernels.choice import wants_gradients
from moebius.kernels.routed_experts.experts import PackedExperts, Prepared, Run

#: Weights that are unpacked at a time: 16 MiB of float32. One expert is unpacked at least.
_UNPACKED_WEIGHTS = 1 << 22


def refusal(experts: PackedExperts) -> str | None:
    """The definition runs everything."""
    return None


def prepare(experts: PackedExperts) -> Run:
    """:func:`routed_experts` of these experts."""
    return Prepared(partial(routed_experts, experts=experts))


def routed_experts(hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, experts: PackedExperts) -> Tensor:
    """``y_t = Σ_k w_tk · down_e(activation(gate_up_e(x_t)))`` with ``e = top_k_index[t, k]``, computed in float32.

    The shared factors are used as rarely as they can be: ``gate_up.right`` once per token before the experts, ``down.left``
    once per token after the weighted sum. Only experts that a token chose are unpacked, a few at a time into one buffer, so the
    layer is never in memory as a whole. Repeats give the same bits on any device: every slot is written once and summed in
    order.

    Args:
        hidden: (tokens, hidden), any floating dtype.
        top_k_index: (tokens, top_k) of integers. An index that is no expert (padding) adds nothing.
        top_k_weights: (tokens, top_k), any floating dtype.
        experts: the layer.

    Returns:
        (tokens, hidden), dtype of ``hidden``.

    Raises:
        ShapeError: inputs of other shapes, dtypes or devices.
    """
    experts.check_call(hidden, top_k_index, top_k_weights, gradients=True)
    gate_up, down = experts.gate_up, experts.down
    tokens, top_k = top_k_index.shape
    slots, weights = top_k_index.reshape(-1).long(), top_k_weights.float().reshape(-1, 1)
    inputs = _shared(gate_up.right, hidden.float())
    outputs = inputs.new_zeros(tokens * top_k, down.factor.rows)
    largest = max(1, *(p.factor.rows * p.factor.columns for p in (gate_up, down)))
    most = min(experts.count, max(1, _UNPACKED_WEIGHTS // largest))
    # Gradients want all matrices once more, and then each has to have memory of its own.
    wanted = wants_gradients(hidden, top_k_weights, experts.gate_up_bias, experts.down_bias)
    buffer = None if wanted else inputs.new_empty(most * largest)
    for group, members, valid in _groups(slots, experts.count, most):
        chosen = members[valid]
        states = torch.bmm(inputs[members // top_k], _unpacked(gate_up.factor, group, buffer).mT)[valid]
        states = _shared(gate_up.left, states)
        if experts.gate_up_bias is not None:
            states = states + experts.gate_up_bias[slots[chosen]].float()
        states = _shared(down.right, experts.activation(states))
        padded = states.new_zeros(*members.shape, states.shape[-1])
        padded[valid] = states
        outputs[chosen] = torch.bmm(padded, _unpacked(down.factor, group, buffer).mT)[valid] * weights[chosen]
    result = _shared(down.left, outputs.view(tokens, top_k, down.factor.rows).sum(1))
    if experts.down_bias is not None:
        result = result + routed_bias(top_k_index, top_k_weights, experts.down_bias)
    return result.to(hidden.dtype)


def routed_bias(top_k_index: Tensor, top_k_weights: Tensor, bias: Tensor) -> Tensor:
    """The weighted sum of what the chosen experts add, (tokens, out), for a bias (experts, out)."""
    experts = len(bias)
    index = top_k_index.long()
    index = torch.where((index >= 0) & (index < experts), index, experts)
    routing = torch.zeros(len(index), experts + 1, device=bias.device)  # the last column takes the padding
    return routing.scatter_add_(1, index, top_k_weights.float())[:, :-1] @ bias.float()


def _unpacked(factor: Packed, experts: Tensor, buffer: Tensor | None) -> Tensor:
    """Some matrices (chosen, rows, columns), where the next ones will be too."""
    if buffer is None:
        return factor.unpack(experts)
    matrices = buffer[: len(experts) * factor.rows * factor.columns].view(len(experts), factor.rows, factor.columns)
    factor.unpack_to(matrices, experts)
    return matrices


def _shared(factor: Packed | None, states: Tensor) -> Tensor:
    """A shared factor applied to (n, in) states."""
    return states if factor is None else states @ factor.unpack()[0].mT


def _groups(slots: Tensor, experts: int, most: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Experts that were chosen, those with similarly many tokens together, so that one batched product does not pad much.

    Yields:
        The experts (group,), the slots of each (group, width), and which of those are real (group, width) bool.
    """
    # Anything that is no expert sorts behind all experts.
    slots = torch.where((slots >= 0) & (slots < experts), slots, experts)
    order = torch.argsort(slots, stable=True)
    counts = torch.bincount(slots, minlength=experts + 1)[:experts]
    starts = counts.cumsum(0) - counts
    by_count = torch.argsort(counts, descending=True, stable=True)
    sizes = counts[by_count].tolist()
    begin = 0
    while begin < experts and sizes[begin]:
        end = begin + 1
        while end < experts and end - begin < most and 2 * sizes[end] > sizes[begin]:
            end += 1
        group = by_count[begin:end]
        step = torch.arange(sizes[begin], device=slots.device)
        valid = step < counts[group].unsqueeze(1)
        yield group, order[(starts[group].unsqueeze(1) + step).clamp(max=len(order) - 1)], valid
        begin = end
