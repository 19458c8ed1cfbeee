"""BiLLM (Huang et al., 2024): salient columns in two orders, the rest in two groups of magnitudes. Also the frame of ARB-LLM.

The published 1.1 bits leave out the bitmap of one bit per weight and the scales of every block; here they are stored and
counted. GLAS and NGES of MoBiE plug in (Sec. A.4.7 there).
"""

from __future__ import annotations

from torch import Tensor

from moebius.correct.gain import row_gain
from moebius.correct.null_space import null_space_scales
from moebius.formats.base import Packed, empty_like_spec
from moebius.formats.grouped_signs import GroupedSigns
from moebius.formats.projection import PackedProjection
from moebius.linalg.eigen import used_directions
from moebius.linalg.hessian import conditioned, feedback_factor, inverse_diagonal, layer_mean
from moebius.methods.base import Method, in_chunks
from moebius.methods.options import CONDITIONING, GLAS, GLAS_GROUPS, GROUP_SIZE, NGES, NULL_SPACE, SALIENT_FRACTION, off
from moebius.options import MethodOptions
from moebius.quantize.grouped_signs import grouped_planes
from moebius.quantize.integers import whole_rows
from moebius.quantize.saliency import column_saliency, salient_columns, salient_count
from moebius.recipe import Recipe
from moebius.types import CalibrationNeeds, ProjectionStats


def quantize(weight: Tensor, stats: ProjectionStats | None, recipe: Recipe, projection: str) -> PackedProjection:
    """Binarize the experts of one projection."""
    return quantize_grouped(weight, stats, recipe, alternations=None)


def quantize_grouped(
    weight: Tensor, stats: ProjectionStats | None, recipe: Recipe, *, alternations: int | None
) -> PackedProjection:
    """BiLLM's steps; with ``alternations`` row and column scales take turns, as in ARB-LLM_RC."""
    assert stats is not None
    experts, _, inputs = weight.shape
    block = whole_rows(recipe.group_size, inputs)
    condition = {"shrinkage": recipe.shrinkage, "damping": recipe.damping}
    layer = layer_mean(stats.second_moment)
    weighted = stats.weighted_moment if recipe.glas else None
    weighted_layer = None if weighted is None else layer_mean(weighted)

    def binarize(chunk: slice) -> Packed:
        some = weight[chunk].float()
        hessian = conditioned(stats.second_moment[chunk], layer=layer, **condition)
        # Salient columns by w² / [H⁻¹]²; GLAS weighs the tokens of that Hessian by the gradient of the global loss.
        importance = (
            hessian.unsqueeze(1) if weighted is None else conditioned(weighted[chunk], layer=weighted_layer, **condition)
        )
        salient = salient_columns(column_saliency(some, inverse_diagonal(importance)), recipe.salient_fraction)
        # Block by block: split the magnitudes, set the scales, and push the error of each column into those after it.
        planes = grouped_planes(some, salient, feedback_factor(hessian), block=block, alternations=alternations)
        # NGES: scales that move the error to directions that no input uses; rows alone where columns have no scales.
        if recipe.nges:
            used = used_directions(stats.second_moment[chunk], recipe.null_space_threshold)
            pull, updates = recipe.nges_lambda, recipe.nges_iterations
            planes = planes.scaled(
                *null_space_scales(
                    some, planes.matrix(), used, pull=pull, iterations=updates, rows_only=planes.column_scales is None
                )
            )
        if recipe.gain:
            planes = planes.scaled(row_gain(some, planes.matrix(), hessian))
        return planes.pack()

    return PackedProjection(in_chunks(experts, inputs, binarize))


def plan(shape: tuple[int, int, int], recipe: Recipe, projection: str) -> PackedProjection:
    """What :func:`quantize` stores for matrices of this shape, on the meta device."""
    return plan_grouped(shape, recipe, column_scaled=False)


def plan_grouped(shape: tuple[int, int, int], recipe: Recipe, *, column_scaled: bool) -> PackedProjection:
    """See :func:`plan`."""
    salient = salient_count(shape[2], recipe.salient_fraction)
    block = whole_rows(recipe.group_size, shape[2])
    salient_block = shape[2] if column_scaled else block
    return PackedProjection(empty_like_spec(GroupedSigns(*shape, block, salient_block, salient, column_scaled).spec()))


def needs(recipe: Recipe) -> CalibrationNeeds:
    """The gradient of the global loss for GLAS, else the inputs."""
    return CalibrationNeeds(inputs=True, glas_groups=recipe.glas_groups if recipe.glas else 0)


_NULL_SPACE = tuple(off(option) if option is NGES else option for option in NULL_SPACE)
# What is stored for a matrix depends on its shape: about two and a half bits.
OPTIONS = MethodOptions(
    (GROUP_SIZE, SALIENT_FRACTION, off(GLAS), GLAS_GROUPS, *_NULL_SPACE, *CONDITIONING), default_bits=1, low=1, high=1
)
METHOD = Method("salient columns in two orders, the rest in two groups of magnitudes", OPTIONS, quantize, plan, needs)
