"""ARB-LLM_RC (Li et al., 2024): BiLLM's groups and salient columns, with row and column scales that are refined in turn.

A column scale says what a column is like in all rows, so that the few salient columns of every block need no row scales of
their own: they share those of the whole row, and the method takes fewer bits than BiLLM.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from moebius.formats.projection import PackedProjection
from moebius.methods.base import Method
from moebius.methods.billm import OPTIONS as BILLM_OPTIONS
from moebius.methods.billm import needs, plan_grouped, quantize_grouped
from moebius.methods.options import ALTERNATIONS
from moebius.recipe import Recipe
from moebius.types import ProjectionStats


def quantize(weight: Tensor, stats: ProjectionStats | None, recipe: Recipe, projection: str) -> PackedProjection:
    """Binarize the experts of one projection."""
    return quantize_grouped(weight, stats, recipe, alternations=recipe.alternations)


def plan(shape: tuple[int, int, int], recipe: Recipe, projection: str) -> PackedProjection:
    """What :func:`quantize` stores for matrices of this shape, on the meta device."""
    return plan_grouped(shape, recipe, column_scaled=True)


OPTIONS = dataclasses.replace(BILLM_OPTIONS, options=(ALTERNATIONS, *BILLM_OPTIONS.options))
METHOD = Method("as billm, with row and column scales that are refined in turn", OPTIONS, quantize, plan, needs)
