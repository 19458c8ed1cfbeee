"""A linear layer from its packed matrix."""

from moebius.kernels.packed_linear.dispatch import Linear, prepare

__all__ = ["Linear", "prepare"]
