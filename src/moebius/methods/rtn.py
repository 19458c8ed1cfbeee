"""Round to nearest: the method that needs no calibration, and the floor that others are measured from."""

from __future__ import annotations

from torch import Tensor

from moebius.correct.gain import row_gain
from moebius.formats.base import Packed, empty_like_spec
from moebius.formats.integers import Integers
from moebius.formats.projection import PackedProjection
from moebius.linalg.hessian import layer_mean
from moebius.methods.base import Method, conditioned_moments, in_chunks
from moebius.methods.options import CONDITIONING, INTEGER_GROUP_SIZE
from moebius.options import MethodOptions
from moebius.quantize.integers import round_to_nearest, whole_rows
from moebius.recipe import Recipe
from moebius.types import CalibrationNeeds, ProjectionStats


def quantize(weight: Tensor, stats: ProjectionStats | None, recipe: Recipe, projection: str) -> PackedProjection:
    """Round every entry to the levels of its group; with ``gain``, give each row its output energy back."""
    experts, _, inputs = weight.shape
    layer = layer_mean(stats.second_moment) if stats is not None and recipe.gain else None

    def round_some(chunk: slice) -> Packed:
        some = weight[chunk].float()
        codes = round_to_nearest(some, int(recipe.bits), whole_rows(recipe.group_size, inputs))
        if recipe.gain:
            assert stats is not None
            moments = conditioned_moments(stats, chunk, recipe, layer)
            codes = codes.scaled(row_gain(some, codes.matrix(), moments))
        return codes.pack()

    return PackedProjection(in_chunks(experts, inputs, round_some))


def plan(shape: tuple[int, int, int], recipe: Recipe, projection: str) -> PackedProjection:
    """What :func:`quantize` stores for matrices of this shape, on the meta device."""
    group_size = whole_rows(recipe.group_size, shape[2])
    return PackedProjection(empty_like_spec(Integers(*shape, int(recipe.bits), group_size, recipe.bits > 1).spec()))


def needs(recipe: Recipe) -> CalibrationNeeds:
    """Only the gain looks at inputs."""
    return CalibrationNeeds(inputs=recipe.gain)


OPTIONS = MethodOptions((INTEGER_GROUP_SIZE, *CONDITIONING), default_bits=2, low=1, high=8)
METHOD = Method("round to nearest, without calibration", OPTIONS, quantize, plan, needs)
