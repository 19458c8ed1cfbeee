"""The expert MLPs of one layer over routed tokens, from packed matrices."""

from moebius.kernels.routed_experts.dispatch import prepare
from moebius.kernels.routed_experts.experts import PackedExperts, Run

__all__ = ["PackedExperts", "Run", "prepare"]
