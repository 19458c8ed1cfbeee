"""The experts of one layer as one object, and what a call of them has to look like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from moebius.errors import KernelError, ShapeError
from moebius.formats import PackedProjection
from moebius.kernels.choice import FLOATS, wants_gradients

#: What an index may be.
_INDICES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Run(Protocol):
    """One layer, ready to run. It reads the tensors of the layer as they lie in memory.

    Attributes:
        copied: but of these it holds something made of them: once they are written to, prepare the layer anew.
    """

    @property
    def copied(self) -> tuple[Tensor, ...]: ...

    def __call__(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Hidden states (tokens, hidden), indices of experts and their weights (tokens, top_k), to (tokens, hidden).

        See :func:`moebius.kernels.routed_experts.reference.routed_experts`.
        """


@dataclass(frozen=True, eq=False)
class Prepared:
    """A :class:`Run` made of a function."""

    function: Callable[[Tensor, Tensor, Tensor], Tensor]
    copied: tuple[Tensor, ...] = ()

    def __call__(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return self.function(hidden, top_k_index, top_k_weights)


@dataclass(frozen=True, eq=False)
class PackedExperts:
    """All that the experts of a layer compute with. Whether its parts fit each other is checked when it is made.

    Attributes:
        gate_up: (experts, channels, hidden).
        down: (experts, hidden, inner).
        activation: (n, channels) to (n, inner).
        gate_up_bias: (experts, channels), or None. Biases that the projections hold packed are not looked at here.
        down_bias: (experts, hidden), or None.

    Raises:
        CheckpointError: a packed tensor that is not what its format says.
        ShapeError: parts that do not fit each other.
    """

    gate_up: PackedProjection
    down: PackedProjection
    activation: Callable[[Tensor], Tensor]
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    def __post_init__(self) -> None:
        for name, projection, bias in (("gate_up", self.gate_up, self.gate_up_bias), ("down", self.down, self.down_bias)):
            projection.check(name)
            if bias is not None and tuple(bias.shape) != (self.count, projection.shape[1]):
                raise ShapeError(f"{name} bias: got {tuple(bias.shape)}, wanted {(self.count, projection.shape[1])}")
        if self.down.factor.batch != self.count:
            raise ShapeError(f"experts: got {self.count} of gate_up and {self.down.factor.batch} of down, wanted as many")
        inner = self._activated()
        if inner is not None and inner != self.down.shape[2]:
            channels, wanted = self.gate_up.shape[1], self.down.shape[2]
            raise ShapeError(f"experts: got {inner} units out of {channels} channels, wanted the {wanted} that down takes")

    @property
    def count(self) -> int:
        """How many experts there are."""
        return self.gate_up.factor.batch

    @cached_property
    def device(self) -> torch.device:
        """Where the experts are."""
        return next(iter(self.gate_up.factor.tensors().values())).device

    def devices(self) -> set[str]:
        """The types of the devices that parts of it are on."""
        return {tensor.device.type for projection in (self.gate_up, self.down) for tensor in projection.tensors().values()}

    def check_call(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *, gradients: bool = False) -> None:
        """Refuse what the definition does not take, the same for every backend.

        Args:
            gradients: whether the backend has them.

        Raises:
            ShapeError: another shape, dtype or device than is wanted.
            KernelError: gradients are wanted of a backend that has none.
        """
        width = self.gate_up.shape[2]
        if hidden.dim() != 2 or hidden.shape[1] != width or hidden.dtype not in FLOATS:
            raise ShapeError(f"hidden states: got {hidden.dtype} {tuple(hidden.shape)}, wanted floats (tokens, {width})")
        if top_k_index.dim() != 2 or len(top_k_index) != len(hidden) or top_k_index.dtype not in _INDICES:
            got = f"{top_k_index.dtype} {tuple(top_k_index.shape)}"
            raise ShapeError(f"indices of experts: got {got}, wanted integers ({len(hidden)}, top_k)")
        if top_k_weights.shape != top_k_index.shape or top_k_weights.dtype not in FLOATS:
            got = f"{top_k_weights.dtype} {tuple(top_k_weights.shape)}"
            raise ShapeError(f"weights of experts: got {got}, wanted floats {tuple(top_k_index.shape)}")
        if any(tensor.layout != torch.strided for tensor in (hidden, top_k_index, top_k_weights)):
            raise ShapeError("hidden states, indices and weights of experts: got a sparse tensor, wanted dense ones")
        where = self.device
        if hidden.device != where or top_k_index.device != where or top_k_weights.device != where:
            got = f"{hidden.device}, {top_k_index.device} and {top_k_weights.device}"
            raise ShapeError(f"hidden states, indices and weights of experts: got them on {got}, wanted {where}")
        if not gradients and wants_gradients(hidden, top_k_weights):
            raise KernelError("packed experts: kernels have no gradients; use the reference, or torch.no_grad()")

    @torch.no_grad()
    def _activated(self) -> int | None:
        """What the activation makes of the channels of a token; None if that cannot be found out without one."""
        try:
            return self.activation(torch.zeros(1, self.gate_up.shape[1], device=self.device)).shape[-1]
        except Exception:  # it speaks for itself when it is called
            return None
