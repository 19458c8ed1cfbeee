"""The expert MLPs of one layer over routed tokens, from packed matrices."""

from moebius.kernels.routed_experts.dispatch import Experts, prepare, routed_experts

__all__ = ["Experts", "prepare", "routed_experts"]
