"""The expert MLPs of one layer over routed tokens, from packed matrices."""

from moebius.kernels.routed_experts.reference import routed_experts

__all__ = ["routed_experts"]
