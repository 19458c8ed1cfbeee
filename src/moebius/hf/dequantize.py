"""From a packed model back to a plain one."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from moebius.errors import UnsupportedModelError
from moebius.models.layout import to_module_orientation
from moebius.runtime.packed_experts import PackedExpertsMixin, packed_layout, packed_projections, unpack_experts
from moebius.runtime.packed_linear import PackedWeightMixin, unpack_weight


def dequantize(model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Turn a packed model into a plain one, in place: every weight a parameter again, as the packed tensors say it is.

    Args:
        model: from ``from_pretrained``.
        dtype: of the new parameters; the model's own by default.

    Returns:
        The same model, which ``save_pretrained`` writes as an ordinary checkpoint.

    Raises:
        UnsupportedModelError: a model that Moebius did not pack.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if getattr(getattr(quantizer, "quantization_config", None), "quant_method", None) != "moebius":
        raise UnsupportedModelError(f"{type(model).__name__}: is not packed by Moebius; there is nothing to dequantize")
    return quantizer.dequantize(model, dtype=dtype)  # type: ignore[union-attr]


def unpack_modules(model: nn.Module, dtype: torch.dtype) -> None:
    """Undo the class swaps, one layer in memory twice at a time."""
    for module in list(model.modules()):
        if isinstance(module, PackedExpertsMixin):
            layout = packed_layout(module)
            gate_up, down = (to_module_orientation(p.unpack().to(dtype), layout) for p in packed_projections(module))
            unpack_experts(module, gate_up, down)
        elif isinstance(module, PackedWeightMixin):
            unpack_weight(module, dtype)
        if isinstance(module, PreTrainedModel):
            module.config.__dict__.pop("_is_quantized", None)  # some mixers compute in another order where it is there
    # What loading remembered belongs to the packed checkpoint: saving is to write the names of an ordinary one.
    for name in ("save_pretrained", "_weight_conversions"):
        model.__dict__.pop(name, None)
