"""VPTQ (Liu et al., 2024): vectors along the outputs, so that each column is coded on its own with error feedback.

Codebooks are trained by k-means weighted with the diagonal of the Hessian (Eq. 8), columns coded one after the other in the
channel-independent second-order way (Eq. 4 to 6, Algorithm 1). IDRE and BCOS of KBVQ-MoE plug in (Table 5 there).

Deviations: vectors of four and one codebook per expert, without the residual codebooks and the separate codebook for outliers
that the paper adds where a matrix is large enough to pay for them; the Hessian of an expert leans on its layer's mean.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from moebius.formats.codebook import Codebook
from moebius.formats.projection import PackedProjection
from moebius.linalg.hessian import feedback_factor
from moebius.methods.base import Method
from moebius.methods.kbvq import GPTVQ, ITERATIONS, VECTOR_LENGTH, plan_special, quantize_special
from moebius.methods.options import ERROR_FEEDBACK
from moebius.quantize.codebook import quantize_columns
from moebius.recipe import Recipe
from moebius.types import CalibrationNeeds, ProjectionStats


def quantize(weight: Tensor, stats: ProjectionStats | None, recipe: Recipe, projection: str) -> PackedProjection:
    """Quantize the experts of one projection."""
    return quantize_special(weight, stats, recipe, _along_columns)


def _along_columns(weight: Tensor, hessians: Tensor | None, recipe: Recipe) -> Codebook:
    assert hessians is not None
    return quantize_columns(
        weight,
        hessians.diagonal(dim1=1, dim2=2),
        feedback_factor(hessians),
        bits=recipe.bits,
        length=VECTOR_LENGTH,
        iterations=ITERATIONS,
    )


def plan(shape: tuple[int, int, int], recipe: Recipe, projection: str) -> PackedProjection:
    """What :func:`quantize` stores for matrices of this shape, on the meta device."""
    return plan_special(shape, recipe, transposed=True)


def needs(recipe: Recipe) -> CalibrationNeeds:
    """Weights of k-means and error feedback look at inputs."""
    return CalibrationNeeds(inputs=True)


OPTIONS = dataclasses.replace(
    GPTVQ.options, options=tuple(option for option in GPTVQ.options.options if option is not ERROR_FEEDBACK)
)
METHOD = Method("vector codes along the outputs, column after column with error feedback", OPTIONS, quantize, plan, needs)
