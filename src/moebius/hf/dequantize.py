"""From a packed model back to a plain one."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from moebius.errors import UnsupportedModelError
from moebius.formats import PackedProjection
from moebius.models.layout import to_module_orientation
from moebius.private_transformers import forget_quantization, quantizer_of
from moebius.runtime.packed_experts import PackedExpertsMixin, packed_layout, packed_projections, unpack_experts
from moebius.runtime.packed_linear import PackedWeightMixin, unpack_weight
from moebius.types import ExpertsLayout


def dequantize(model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Turn a packed model into a plain one, in place: every weight a parameter again, as the packed tensors say it is.

    Args:
        model: from ``from_pretrained``.
        dtype: of the new parameters; the model's own by default.

    Returns:
        The same model, which ``save_pretrained`` writes as an ordinary checkpoint.

    Raises:
        UnsupportedModelError: a model that Moebius did not pack, or one with output biases that its plain class cannot hold.
    """
    quantizer = quantizer_of(model)
    if getattr(getattr(quantizer, "quantization_config", None), "quant_method", None) != "moebius":
        raise UnsupportedModelError(f"{type(model).__name__}: is not packed by Moebius; there is nothing to dequantize")
    return quantizer.dequantize(model, dtype=dtype)


def unpack_modules(model: nn.Module, dtype: torch.dtype) -> None:
    """Undo the class swaps, one layer in memory twice at a time."""
    for module in list(model.modules()):
        if isinstance(module, PackedExpertsMixin):
            layout = packed_layout(module)
            projections = packed_projections(module)
            _keep_biases(module, layout, projections)
            gate_up, down = (to_module_orientation(p.unpack().to(dtype), layout) for p in projections)
            unpack_experts(module, gate_up, down)
        elif isinstance(module, PackedWeightMixin):
            unpack_weight(module, dtype)
    # What loading remembered belongs to the packed checkpoint: saving is to write the names of an ordinary one.
    forget_quantization(model)
    model.__dict__.pop("save_pretrained", None)


def _keep_biases(module: nn.Module, layout: ExpertsLayout, projections: tuple[PackedProjection, PackedProjection]) -> None:
    """Add packed output biases (BCOS) to those of the module, if it has any."""
    for name, projection in zip((layout.gate_up_name, layout.down_name), projections, strict=True):
        if projection.bias is None:
            continue
        if not layout.has_bias:
            raise UnsupportedModelError(
                f"{type(module).__name__}: the packed experts have output biases (bcos) that the plain class has no place for;"
                " keep the model packed, or quantize it with bcos=variance"
            )
        own = getattr(module, f"{name}_bias")
        with torch.no_grad():
            own += projection.bias.unpack().squeeze(1).to(own.dtype)
