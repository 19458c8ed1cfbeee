"""An experts forward that shows what went in and out of each projection, differentiable in the hidden state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from moebius.calibrate.grouped import Assignment, grouped_linear
from moebius.calibrate.layerwise import replaced_forwards
from moebius.private_transformers import gate
from moebius.types import PROJECTIONS, ExpertsLayout, MoeLayer

#: A projection: sorted rows (rows, in) and which expert each belongs to, to (rows, out).
Product = Callable[[Tensor, Assignment], Tensor]


@dataclass(frozen=True)
class Observation:
    """One forward of the experts of a layer. Rows are (token, expert) pairs, sorted by expert.

    Attributes:
        routing: weight of each row's expert in the output of the layer. (rows,)
        inputs: per projection, (rows, in).
        outputs: per projection, (rows, out), part of the graph: gradients can be asked for.
    """

    assignment: Assignment
    routing: Tensor
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


def observed_forward(
    experts: nn.Module,
    layout: ExpertsLayout,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    products: Mapping[str, Product] | None = None,
) -> tuple[Tensor, Observation]:
    """What the experts module computes, and what its projections saw.

    Args:
        hidden_states: (tokens, hidden).
        top_k_index: (tokens, top_k); an index of ``layout.experts`` or more is skipped.
        top_k_weights: (tokens, top_k).
        products: what takes the place of each projection's matrices; None: the module's own.

    Returns:
        (tokens, hidden), and the observation.
    """
    module: Any = experts
    tokens, choices = top_k_index.shape
    products = _own_products(experts, layout) if products is None else products
    assignment = Assignment.of(top_k_index, layout.experts)
    # Expanded first and picked second, so that no row is picked twice: the gradient of a repeated pick is a scatter-add whose
    # order is left open, and the same seed has to give the same bytes.
    repeated = hidden_states.unsqueeze(1).expand(-1, choices, -1).flatten(0, 1)
    inputs = {"gate_up": repeated.index_select(0, assignment.order)}
    gate_up = products["gate_up"](inputs["gate_up"], assignment)
    gate_up = _with_bias(gate_up, module, layout.gate_up_name, layout, assignment)
    inputs["down"] = gate(experts)(gate_up) if layout.has_gate else module.act_fn(gate_up)
    down = products["down"](inputs["down"], assignment)
    down = _with_bias(down, module, layout.down_name, layout, assignment)
    routing = top_k_weights.reshape(-1)[assignment.order]
    weighted = down * routing.unsqueeze(-1)
    placed = weighted.new_zeros(tokens * choices, layout.hidden).index_copy(0, assignment.order, weighted)
    total = placed.view(tokens, choices, layout.hidden).sum(1).to(hidden_states.dtype)
    return total, Observation(assignment, routing.detach().float(), inputs, {"gate_up": gate_up, "down": down})


def _own_products(experts: nn.Module, layout: ExpertsLayout) -> dict[str, Product]:
    weights = layout.weights("", experts)

    def product(weight: Tensor) -> Product:
        return lambda rows, assignment: grouped_linear(rows, weight, assignment)

    return {name: product(weights.projection(name)) for name in PROJECTIONS}


def _with_bias(rows: Tensor, module: Any, name: str, layout: ExpertsLayout, assignment: Assignment) -> Tensor:
    return rows + getattr(module, name + "_bias")[assignment.expert_of_row] if layout.has_bias else rows


@contextmanager
def observed(layers: Sequence[MoeLayer]) -> Iterator[list[tuple[MoeLayer, Observation]]]:
    """Within the context, the experts of ``layers`` run :func:`observed_forward` and append what they saw to the list."""
    seen: list[tuple[MoeLayer, Observation]] = []

    def watch(layer: MoeLayer) -> Any:
        def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            output, observation = observed_forward(layer.experts, layer.layout, hidden_states, top_k_index, top_k_weights)
            seen.append((layer, observation))
            return output

        return forward

    with replaced_forwards({layer.experts: watch(layer) for layer in layers}):
        yield seen
