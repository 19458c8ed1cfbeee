"""From a checkpoint to a packed checkpoint, one MoE layer at a time."""

from moebius.pipeline.run import quantize_model

__all__ = ["quantize_model"]
