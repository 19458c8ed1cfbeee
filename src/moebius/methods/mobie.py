"""MoBiE (Algorithm 1): joint decomposition, loss-aligned mixed-order binarization, null-space scaling. Each is a switch.

The shared factor sits at the input side unless asked otherwise: Eq. 4 prints the output side, Algorithm 2 indexes the other,
and on really trained weights signs behind an output-side factor lose what the input side keeps (docs/experiments.md).

Deviations: gate and up have one joint SVD, not one each, which at the input side halves the shared factor and measured better;
the second plane of salient columns shares the row scales of the first; GLAS averages its Hessians over groups of channels;
signs are found inside error feedback; Hessians lean on their layer's mean; λ of NGES counts in the mean energy of a row, as
rows of the factors are far smaller than those of weights and 0.2 as it stands leaves little of NGES (``nges_relative=false``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moebius.basis.joint_svd import JointBasis, joint_basis, joint_rank, shared_factor_skeleton
from moebius.correct.gain import row_gain
from moebius.correct.null_space import null_space_scales
from moebius.formats.base import Packed, empty_like_spec
from moebius.formats.projection import PackedProjection
from moebius.formats.signs import Signs
from moebius.linalg.eigen import used_directions
from moebius.linalg.hessian import conditioned, feedback_weights, inverse_diagonal, layer_mean
from moebius.methods.base import Method, in_chunks
from moebius.methods.options import (
    ALTERNATIONS,
    BLOCK_SIZE,
    CONDITIONING,
    ERROR_FEEDBACK,
    GLAS,
    GLAS_GROUPS,
    NULL_SPACE,
    RANK,
    SALIENT_FRACTION,
    SHARED_BITS,
)
from moebius.options import MethodOptions, Option
from moebius.quantize.binary import SignPlanes, mixed_order
from moebius.quantize.feedback import mixed_order_with_feedback
from moebius.quantize.saliency import column_saliency, salient_columns, salient_count
from moebius.recipe import Recipe
from moebius.types import CalibrationNeeds, ProjectionStats

_PART = {"output": "left", "input": "right"}


def quantize(weight: Tensor, stats: ProjectionStats | None, recipe: Recipe, projection: str) -> PackedProjection:
    """Binarize the experts of one projection."""
    assert stats is not None
    weight = weight.float()

    # Stage 1, CEJD: a basis that all experts share in high precision; what is left to each expert is binarized.
    basis = _basis(weight, recipe, projection)
    factors = basis.factors(weight) if basis else weight
    moments = _Moments(stats.second_moment, basis, recipe)
    weighted = _Moments(stats.weighted_moment, basis, recipe) if recipe.glas else None

    def binarize(chunk: slice) -> Packed:
        factor, hessian = factors[chunk], moments.conditioned(chunk)
        # Stage 2, GLAS: columns that the loss feels get a second plane; signs make up for the errors of those before them.
        importance = hessian.unsqueeze(1) if weighted is None else weighted.conditioned(chunk)
        planes = _mixed_order(factor, hessian, importance, recipe)
        # Stage 3, NGES: scales that move the error to directions that no input uses.
        if recipe.nges:
            planes = planes.scaled(*_null_space_scales(factor, planes, moments, chunk, recipe))
        if recipe.gain:
            planes = planes.scaled(row_gain(factor, planes.matrix(), hessian))
        if basis and basis.side == "output":
            planes = planes.scaled(basis.spread)
        return planes.pack()

    factor = in_chunks(len(factors), factors.shape[2], binarize)
    return PackedProjection(factor, **{_PART[basis.side]: basis.packed} if basis else {})


def plan(shape: tuple[int, int, int], recipe: Recipe, projection: str) -> PackedProjection:
    """What :func:`quantize` stores for matrices of this shape, on the meta device."""
    experts, out, inputs = shape
    shared = {}
    if recipe.cejd:
        side = _side(recipe, projection)
        shared[_PART[side]] = shared_factor_skeleton(shape, side=side, rank=recipe.rank, bits=recipe.shared_bits)
        rank = joint_rank(shape, side, recipe.rank)
        out, inputs = (rank, inputs) if side == "output" else (out, rank)
    factor = Signs(experts, out, inputs, salient_count(inputs, recipe.salient_fraction))
    return PackedProjection(empty_like_spec(factor.spec()), **shared)


def needs(recipe: Recipe) -> CalibrationNeeds:
    """The gradient of the global loss for GLAS; error feedback, null spaces and gains look at inputs."""
    return CalibrationNeeds(inputs=True, glas_groups=recipe.glas_groups if recipe.glas else 0)


def left_factor(weight: Tensor, recipe: Recipe, projection: str) -> Tensor | None:
    """The shared factor ``A`` at the output side: GLAS wants the gradient behind it, ``Aᵀδ``."""
    basis = _basis(weight, recipe, projection)
    return basis.shared if basis and basis.side == "output" else None


def _side(recipe: Recipe, projection: str) -> str:
    """``hidden`` and ``inner``: where the projection meets the hidden state, or the inner state of the expert."""
    if recipe.side in _PART:
        return recipe.side
    return "input" if (recipe.side == "hidden") == (projection == "gate_up") else "output"


def _basis(weight: Tensor, recipe: Recipe, projection: str) -> JointBasis | None:
    if not recipe.cejd:
        return None
    return joint_basis(weight, side=_side(recipe, projection), rank=recipe.rank, bits=recipe.shared_bits)


class _Moments:
    """Sums over tokens of outer products of inputs, in the coordinates of the expert factors, some experts at a time."""

    def __init__(self, moments: Tensor | None, basis: JointBasis | None, recipe: Recipe) -> None:
        assert moments is not None, "calibration did not gather what needs() asked for"
        self.moments, self.recipe = moments, recipe
        self.right = basis.shared if basis and basis.side == "input" else None
        self.layer = self._turn(layer_mean(moments))

    def raw(self, chunk: slice) -> Tensor:
        """(chunk, ..., columns, columns)"""
        return self._turn(self.moments[chunk])

    def conditioned(self, chunk: slice) -> Tensor:
        """See :func:`moebius.linalg.hessian.conditioned`."""
        recipe = self.recipe
        return conditioned(self.raw(chunk), shrinkage=recipe.shrinkage, damping=recipe.damping, layer=self.layer)

    def _turn(self, moments: Tensor) -> Tensor:
        if self.right is None:
            return moments
        right = self.right.to(moments.dtype)
        return right @ moments @ right.mT


def _mixed_order(factor: Tensor, hessian: Tensor, importance: Tensor, recipe: Recipe) -> SignPlanes:
    saliency = column_saliency(factor, inverse_diagonal(importance))
    salient = salient_columns(saliency, recipe.salient_fraction)
    if not recipe.error_feedback:
        return mixed_order(factor, salient, recipe.alternations)
    return mixed_order_with_feedback(
        factor, salient, feedback_weights(hessian), alternations=recipe.alternations, block_size=recipe.block_size
    )


def _null_space_scales(
    factor: Tensor, planes: SignPlanes, moments: _Moments, chunk: slice, recipe: Recipe
) -> tuple[Tensor, Tensor]:
    # Algorithm 1 has one null space for a layer; each expert's own is a choice.
    of_layer = used_directions(moments.layer[None], recipe.null_space_threshold) if recipe.null_space == "layer" else None
    of_experts = moments.raw(chunk) if of_layer is None else None
    found = []
    for expert, weight in enumerate(factor.split(1)):  # one at a time: fifteen passes over matrices that stay in the cache
        used = of_layer
        if of_experts is not None:
            used = used_directions(of_experts[expert : expert + 1], recipe.null_space_threshold)
        assert used is not None
        binary = planes.one(expert).matrix()
        pull = recipe.nges_lambda * (float(binary.square().sum(2).mean()) if recipe.nges_relative else 1.0)
        found.append(null_space_scales(weight, binary, used, pull=pull, iterations=recipe.nges_iterations))
    rows, columns = zip(*found, strict=True)
    return torch.cat(rows), torch.cat(columns)


CEJD = Option("cejd", True, "cross-expert joint decomposition (off: each expert's own weight is binarized)")
SIDE = Option(
    "side",
    "input",
    "where the shared factor of the joint SVD sits; hidden: before gate_up and behind down; inner: behind gate_up, before down",
    ("output", "input", "hidden", "inner"),
)
NULL_SPACE_OF = Option("null_space", "layer", "whose inputs span the null space", ("layer", "expert"))
NGES_RELATIVE = Option("nges_relative", True, "λ counts in the mean energy of a row (off: as it stands)")
OPTIONS = MethodOptions(
    (
        *(CEJD, SIDE, RANK, SHARED_BITS),
        *(GLAS, GLAS_GROUPS, SALIENT_FRACTION),
        *(*NULL_SPACE, NULL_SPACE_OF, NGES_RELATIVE),
        *(ALTERNATIONS, ERROR_FEEDBACK, BLOCK_SIZE),
        *CONDITIONING,
    ),
    default_bits=1,
    low=1,
    high=1,
)
METHOD = Method(
    "joint decomposition, loss-aligned mixed-order binarization, null-space scaling",
    OPTIONS,
    quantize,
    plan,
    needs,
    left_factor,
)
