"""The nouns that packages exchange: the weights of a layer, what calibration saw of it, and what it became.

Orientation is the same everywhere: an expert linear is ``y = W x`` with ``W`` of shape ``(out, in)``. The order of the
output channels of ``gate_up`` is the checkpoint's own (concatenated or interleaved): nothing below the runtime needs it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

#: The two projections of an expert layer, in the order in which a token meets them.
PROJECTIONS = ("gate_up", "down")


@dataclass(frozen=True)
class ExpertWeights:
    """The expert matrices of one MoE layer.

    Attributes:
        name: module path of the experts in the model, such as ``model.layers.3.mlp.experts``.
        gate_up: (experts, gate_up channels, hidden). Experts without a gate have their ``up`` here.
        down: (experts, hidden, inner).
    """

    name: str
    gate_up: Tensor
    down: Tensor

    def projection(self, name: str) -> Tensor:
        """``gate_up`` or ``down``, (experts, out, in)."""
        return getattr(self, name)


@dataclass(frozen=True)
class ProjectionStats:
    """What calibration saw at one projection of one layer. All sums run over the tokens routed to the expert.

    With ``x`` the projection's input, ``δ`` the gradient of the global loss at its output (routing weight included,
    because it flows back through it):

    Attributes:
        tokens: routed tokens ``n``. (experts,) int64
        mean: mean of ``x``, zero for an expert without tokens. (experts, in)
        second_moment: ``C = Σ x xᵀ``, the GPTQ Hessian up to a factor 2. (experts, in, in)
        weighted_moment: ``S_g = Σ s_g x xᵀ`` with ``s_g`` the mean of ``δ_j²`` over the channels ``j`` of group ``g``: the
            GLAS Hessian (MoBiE Eq. 10). (experts, groups, in, in). ``δ`` is ``Aᵀδ`` where calibration was given a shared
            left factor ``A`` for this projection. None if no gradient was asked for.
        fisher_diagonal: ``γ = Σ δ²``. (experts, out), or None.
        output_fisher: ``G = Σ δ δᵀ`` over all experts, only at ``down``. (out, out), or None.
        sensitivity: ``φ``, the mean of ``δ²`` over routed tokens and output channels of the layer; 0.0 without gradient.
    """

    tokens: Tensor
    mean: Tensor
    second_moment: Tensor
    weighted_moment: Tensor | None = None
    fisher_diagonal: Tensor | None = None
    output_fisher: Tensor | None = None
    sensitivity: float = 0.0

    def to(self, device: torch.device | str) -> ProjectionStats:
        """The same statistics on another device."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        return ProjectionStats(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in values.items()})


@dataclass(frozen=True)
class LayerStats:
    """The statistics of both projections of one MoE layer.

    Attributes:
        name: module path of the experts, as in :class:`ExpertWeights`.
        router_moment: ``Σ x xᵀ`` over *all* tokens that met the router. (hidden, hidden), or None.
    """

    name: str
    gate_up: ProjectionStats
    down: ProjectionStats
    router_moment: Tensor | None = None

    def projection(self, name: str) -> ProjectionStats:
        """``gate_up`` or ``down``."""
        return getattr(self, name)
