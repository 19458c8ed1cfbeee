"""How transformers lays out fused experts. The only file that reads the flags of its expert classes.

Since version 5 the experts of a layer are one module with two 3-D parameters, and ``use_experts_implementation`` puts flags
on it that say how they lie: concatenated or interleaved gate and up, transposed or not, with or without bias and gate.
"""

from __future__ import annotations

from torch import Tensor, nn

from moebius.errors import UnsupportedModelError
from moebius.types import ExpertsLayout, ExpertWeights

_FLAGS = ("is_transposed", "is_concatenated", "has_bias", "has_gate", "has_post_expert_norm")


def layout_of(module: nn.Module) -> ExpertsLayout | None:
    """The layout of a fused experts module, or None if the module is something else.

    Raises:
        UnsupportedModelError: fused experts of a kind that Moebius does not know how to run, or whose shapes contradict
            their flags.
    """
    if not all(isinstance(getattr(module, flag, None), bool) for flag in _FLAGS):
        return None
    gate_up_name = "gate_up_proj" if module.has_gate else "up_proj"
    gate_up, down = getattr(module, gate_up_name, None), getattr(module, "down_proj", None)
    if not (isinstance(gate_up, nn.Parameter) and isinstance(down, nn.Parameter) and gate_up.ndim == down.ndim == 3):
        return None
    kind = type(module).__name__
    if module.has_post_expert_norm:
        raise UnsupportedModelError(
            f"{kind}: its experts end in a norm of their own, which a factor shared by all experts cannot pass through; "
            "Moebius has no method for such experts yet"
        )
    experts, inputs, outputs = _canonical_shape(down, bool(module.is_transposed))
    layout = ExpertsLayout(
        gate_up_name=gate_up_name,
        down_name="down_proj",
        is_transposed=bool(module.is_transposed),
        is_concatenated=bool(module.is_concatenated),
        has_bias=bool(module.has_bias),
        has_gate=bool(module.has_gate),
        experts=experts,
        hidden=outputs,
        inner=inputs,
    )
    wanted = (experts, layout.hidden, layout.inner * (2 if layout.has_gate else 1))
    if (got := _canonical_shape(gate_up, layout.is_transposed)) != wanted:
        raise UnsupportedModelError(
            f"{kind}.{gate_up_name}: got (experts, in, out) = {got}, wanted {wanted} to match down_proj; "
            "are its flags right for this version of transformers?"
        )
    return layout


def _canonical_shape(parameter: Tensor, is_transposed: bool) -> tuple[int, int, int]:
    """(experts, in, out) of a parameter."""
    experts, rows, columns = parameter.shape
    return (experts, rows, columns) if is_transposed else (experts, columns, rows)


def read_weights(name: str, module: nn.Module) -> ExpertWeights:
    """The matrices of a fused experts module as (experts, out, in), in its own dtype and without a copy.

    Args:
        name: module path, kept in the result.
        module: one that :func:`layout_of` knows.

    Raises:
        UnsupportedModelError: the module holds no fused experts.
    """
    layout = layout_of(module)
    if layout is None:
        raise UnsupportedModelError(f"{name}: {type(module).__name__} holds no fused experts")
    return layout.weights(name, module)


def to_module_orientation(weight: Tensor, layout: ExpertsLayout) -> Tensor:
    """A matrix (experts, out, in) as the module keeps it, contiguous."""
    return (weight.mT if layout.is_transposed else weight).contiguous()
