"""GPTQ (Frantar et al., 2023): rounding with error feedback, for all experts of a projection at once."""

from __future__ import annotations

from torch import Tensor

from moebius.correct.gain import row_gain
from moebius.formats.base import Packed
from moebius.formats.projection import PackedProjection
from moebius.linalg.hessian import feedback_factor, layer_mean
from moebius.methods.base import Method, conditioned_moments, in_chunks
from moebius.methods.options import BLOCK_SIZE, CONDITIONING, INTEGER_GROUP_SIZE
from moebius.methods.rtn import plan
from moebius.options import MethodOptions, Option
from moebius.quantize.integers import IntegerCodes, round_in_order, round_with_feedback, whole_rows
from moebius.recipe import Recipe
from moebius.types import CalibrationNeeds, ProjectionStats


def quantize(weight: Tensor, stats: ProjectionStats | None, recipe: Recipe, projection: str) -> PackedProjection:
    """Round column by column, the error of each pushed into those after it; ``gain`` then restores each row's energy."""
    assert stats is not None
    experts, _, inputs = weight.shape
    layer = layer_mean(stats.second_moment)

    def round_some(chunk: slice) -> Packed:
        some = weight[chunk].float()
        hessians = conditioned_moments(stats, chunk, recipe, layer)
        codes = _rounded(some, hessians, recipe)
        if recipe.gain:
            codes = codes.scaled(row_gain(some, codes.matrix(), hessians))
        return codes.pack()

    return PackedProjection(in_chunks(experts, inputs, round_some))


def _rounded(weight: Tensor, hessians: Tensor, recipe: Recipe) -> IntegerCodes:
    """Column after column, from the first to the last or, in activation order, from the largest input to the smallest."""
    shape = int(recipe.bits), whole_rows(recipe.group_size, weight.shape[2]), recipe.block_size
    if not recipe.act_order:
        return round_with_feedback(weight, feedback_factor(hessians), *shape)
    order = hessians.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    square = order.unsqueeze(1).expand_as(hessians)
    return round_in_order(weight, feedback_factor(hessians.gather(2, square).gather(1, square.mT)), order, *shape)


def needs(recipe: Recipe) -> CalibrationNeeds:
    """The Hessian of the layer's own error."""
    return CalibrationNeeds(inputs=True)


ACT_ORDER = Option("act_order", False, "round the columns of the largest inputs first; groups and bits stay what they are")
OPTIONS = MethodOptions((INTEGER_GROUP_SIZE, ACT_ORDER, BLOCK_SIZE, *CONDITIONING), default_bits=2, low=1, high=8)
METHOD = Method("rounding with error feedback", OPTIONS, quantize, plan, needs)
