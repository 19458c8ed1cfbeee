"""The nouns that packages exchange: the weights of a layer, what calibration saw of it, and what it became.

Orientation is the same everywhere: an expert linear is ``y = W x`` with ``W`` of shape ``(out, in)``. The order of the
output channels of ``gate_up`` is the checkpoint's own (concatenated or interleaved): nothing below the runtime needs it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
class CalibrationNeeds:
    """What calibration must gather of every MoE layer; as it stands, nothing. Needs are put together with ``|``.

    Attributes:
        inputs: what enters each projection: ``n``, mean and ``C`` of :class:`ProjectionStats`. The other needs include it.
        loss_weighted: tokens count in ``C`` by how much the loss depends on their outputs, instead of once each.
        affinity: tokens count in ``C`` by the routing weight of the expert (MoEQuant Eq. 18), instead of once each.
        self_sampled: windows of tokens that the model writes itself, so that experts are used evenly (MoEQuant Eq. 13), in
            place of the calibration text.
        glas_groups: groups of output channels with a GLAS Hessian ``S_g`` of their own; 0: no such Hessians.
        output_fisher: ``G`` at ``down``, and ``γ``.
        router_moment: ``Σ x xᵀ`` over what met the router, where the model has a router that can be found.
    """

    inputs: bool = False
    loss_weighted: bool = False
    affinity: bool = False
    self_sampled: bool = False
    glas_groups: int = 0
    output_fisher: bool = False
    router_moment: bool = False

    @property
    def anything(self) -> bool:
        """Whether there is to be a calibration at all."""
        return self.inputs or self.gradients or self.router_moment

    @property
    def gradients(self) -> bool:
        """Whether the backward pass has to run; ``γ`` is gathered where it does."""
        return self.loss_weighted or self.glas_groups > 0 or self.output_fisher

    def __or__(self, other: CalibrationNeeds) -> CalibrationNeeds:
        return CalibrationNeeds(
            inputs=self.inputs or other.inputs,
            loss_weighted=self.loss_weighted or other.loss_weighted,
            affinity=self.affinity or other.affinity,
            self_sampled=self.self_sampled or other.self_sampled,
            glas_groups=max(self.glas_groups, other.glas_groups),
            output_fisher=self.output_fisher or other.output_fisher,
            router_moment=self.router_moment or other.router_moment,
        )


@dataclass(frozen=True)
class ProjectionStats:
    """What calibration saw at one projection of one layer. All sums run over the tokens routed to the expert.

    With ``x`` the projection's input, ``δ`` the gradient of the global loss at its output (routing weight included,
    because it flows back through it):

    Attributes:
        tokens: routed tokens ``n``. (experts,) int64
        mean: mean of ``x``, zero for an expert without tokens. (experts, in)
        second_moment: ``C = Σ x xᵀ``, the GPTQ Hessian up to a factor 2; where calibration was asked to weigh tokens by the
            loss, ``Σ c x xᵀ`` with ``c`` how much the loss feels the token's output, or by affinity, with ``c`` the routing
            weight. (experts, in, in)
        weighted_moment: ``S_g = Σ s_g x xᵀ`` with ``s_g`` the mean of ``δ_j²`` over the channels ``j`` of group ``g``: the
            GLAS Hessian (MoBiE Eq. 10). (experts, groups, in, in). Channel ``j`` is in group ``j · groups // channels``.
            ``δ`` is ``Aᵀδ`` where calibration was given a shared left factor ``A`` for this projection. None if no gradient
            was asked for.
        fisher_diagonal: ``γ = Σ δ²``. (experts, out), or None.
        output_fisher: ``G = Σ δ δᵀ`` over all experts, only at ``down``. (out, out), or None.
    """

    tokens: Tensor
    mean: Tensor
    second_moment: Tensor
    weighted_moment: Tensor | None = None
    fisher_diagonal: Tensor | None = None
    output_fisher: Tensor | None = None

    def to(self, device: torch.device | str) -> ProjectionStats:
        """The same statistics on another device."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in values.items()}
        return ProjectionStats(**moved)


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


@dataclass(frozen=True)
class ExpertsLayout:
    """How one fused experts module keeps its matrices.

    Attributes:
        gate_up_name: parameter of the first projection, ``gate_up_proj``, or ``up_proj`` for experts without a gate.
        down_name: parameter of the second projection.
        is_transposed: parameters are (experts, in, out) instead of (experts, out, in).
        is_concatenated: gate channels come first, then up channels; otherwise they alternate.
        has_bias: each projection has a bias (experts, out), named like it with ``_bias`` appended.
        has_gate: the first projection holds gate and up channels; otherwise up alone.
        experts: number of routed experts.
        hidden: inputs of the first and outputs of the second projection.
        inner: outputs of one expert's ``up``, inputs of ``down``.
    """

    gate_up_name: str
    down_name: str
    is_transposed: bool
    is_concatenated: bool
    has_bias: bool
    has_gate: bool
    experts: int
    hidden: int
    inner: int

    def weights(self, name: str, module: nn.Module) -> ExpertWeights:
        """The matrices of the module as (experts, out, in), in its own dtype and without a copy, under the given name."""
        gate_up, down = getattr(module, self.gate_up_name).detach(), getattr(module, self.down_name).detach()
        if self.is_transposed:
            gate_up, down = gate_up.mT, down.mT
        return ExpertWeights(name=name, gate_up=gate_up, down=down)


@dataclass(frozen=True)
class MoeLayer:
    """One fused experts module.

    Attributes:
        name: module path of the experts, such as ``model.layers.3.mlp.experts``.
        router_name: module path of the router, whose ``weight`` is (experts, hidden). None if the model hides it elsewhere.
        decoder_layer: index of the decoder layer it is part of.
    """

    name: str
    experts: nn.Module
    layout: ExpertsLayout
    router_name: str | None
    router: nn.Module | None
    decoder_layer: int


@dataclass(frozen=True)
class MoeModel:
    """A causal language model and what Moebius knows about it.

    Attributes:
        moe_layers: its fused experts, in forward order.
        decoder: its decoder layers, found at module path ``decoder_name``.
        shared_experts: module paths of the linear layers of experts that see every token.
        dense_mlps: module paths of the linear layers of MLPs in decoder layers without experts.
        linears: module paths of all linear layers outside the experts, those above included; not routers, not a head that
            is tied to the embeddings, and nothing with a single output.
    """

    model: PreTrainedModel
    moe_layers: tuple[MoeLayer, ...]
    decoder: nn.ModuleList
    decoder_name: str
    shared_experts: tuple[str, ...]
    dense_mlps: tuple[str, ...]
    linears: tuple[str, ...]
