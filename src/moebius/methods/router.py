"""The router in one bit, held in place by null-space scaling (MoBiE A.3.4, Algorithm 4). Only where a recipe asks for it."""

from __future__ import annotations

from torch import Tensor

from moebius.correct.null_space import null_space_scales
from moebius.formats.base import Packed, empty_like_spec
from moebius.formats.signs import Signs
from moebius.linalg.eigen import used_directions
from moebius.methods.options import ALTERNATIONS, NGES_ITERATIONS, NGES_LAMBDA, NULL_SPACE_THRESHOLD
from moebius.quantize.binary import mixed_order
from moebius.recipe import Recipe


def quantize_router(weight: Tensor, moment: Tensor, recipe: Recipe) -> Packed:
    """Binarize a router to first order and scale its rows and columns so that its error lies where no input points.

    Args:
        weight: (experts, hidden).
        moment: ``Σ x xᵀ`` over all tokens that met the router. (hidden, hidden)
        recipe: its ``alternations`` and null-space options where its method has them, else their defaults.

    Returns:
        Signs with a batch of one.
    """
    matrix = weight.float().unsqueeze(0)
    planes = mixed_order(matrix, matrix.new_zeros(1, matrix.shape[2]).bool(), recipe.value(ALTERNATIONS))
    used = used_directions(moment.unsqueeze(0), recipe.value(NULL_SPACE_THRESHOLD))
    pull, iterations = recipe.value(NGES_LAMBDA), recipe.value(NGES_ITERATIONS)
    rows, columns = null_space_scales(matrix, planes.matrix(), used, pull=pull, iterations=iterations)
    return planes.scaled(rows, columns).pack()


def plan_router(shape: tuple[int, int], recipe: Recipe) -> Packed:
    """What :func:`quantize_router` stores for a router (experts, hidden), on the meta device."""
    return empty_like_spec(Signs(1, *shape).spec())
