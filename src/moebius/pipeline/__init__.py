"""From a checkpoint to a packed checkpoint, one MoE layer at a time."""

from moebius.pipeline.run import check_recipe, quantize_model

__all__ = ["check_recipe", "quantize_model"]
