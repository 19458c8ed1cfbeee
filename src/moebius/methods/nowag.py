"""NoWag-VQ (Liu et al., 2025): normalized matrices, vectors of four by k-means weighted with the size of the inputs.

Columns and then rows are divided by their norms (Eq. 3); codebooks and codes minimize ``Σ_ij (W̄_ij − Ŵ_ij)² ‖X_j‖²`` (Eq. 4):
no Hessian beyond its diagonal, and no error feedback. The norms are stored as scales of rows and columns.

Deviations: vectors of four columns where the paper has six, as the codebook belongs to one expert and 4,096 entries of six
would cost it a good part of a bit; k-means++ in place of random seeds; the size of the inputs leans on the layer's mean.
"""

from __future__ import annotations

from torch import Tensor

from moebius.correct.gain import row_gain
from moebius.formats.base import Packed, empty_like_spec
from moebius.formats.codebook import Codebook
from moebius.formats.projection import PackedProjection
from moebius.linalg.hessian import layer_mean
from moebius.methods.base import Method, conditioned_moments, in_chunks
from moebius.methods.kbvq import ITERATIONS, VECTOR_LENGTH
from moebius.methods.options import CONDITIONING
from moebius.options import MethodOptions
from moebius.quantize.codebook import code_bits, quantize_weighted
from moebius.recipe import Recipe
from moebius.types import CalibrationNeeds, ProjectionStats

_TINY = 1e-6  # a column or row of zeros is divided by this and stays zero


def quantize(weight: Tensor, stats: ProjectionStats | None, recipe: Recipe, projection: str) -> PackedProjection:
    """Normalize and code the experts of one projection."""
    assert stats is not None
    experts, _, inputs = weight.shape
    layer = layer_mean(stats.second_moment)

    def encode(chunk: slice) -> Packed:
        some = weight[chunk].float()
        moments = conditioned_moments(stats, chunk, recipe, layer)
        columns = some.norm(dim=1).clamp_min(_TINY).half().float()
        rows = (some / columns.unsqueeze(1)).norm(dim=2).clamp_min(_TINY).half().float()
        normalized = some / columns.unsqueeze(1) / rows.unsqueeze(2)
        # The root of the width keeps the entries of a codebook near one, where fp16 is fine.
        width = inputs**0.5
        codes = quantize_weighted(
            normalized * width,
            moments.diagonal(dim1=1, dim2=2),
            bits=recipe.bits,
            length=VECTOR_LENGTH,
            iterations=ITERATIONS,
        ).with_column_scales(columns)
        packed = codes.with_row_scales(rows / width)
        return packed.with_row_scales(rows / width * row_gain(some, packed.unpack(), moments)) if recipe.gain else packed

    return PackedProjection(in_chunks(experts, inputs, encode))


def plan(shape: tuple[int, int, int], recipe: Recipe, projection: str) -> PackedProjection:
    """What :func:`quantize` stores for matrices of this shape, on the meta device."""
    bits = code_bits(recipe.bits, VECTOR_LENGTH)
    return PackedProjection(empty_like_spec(Codebook(*shape, bits, VECTOR_LENGTH, row_scaled=True, column_scaled=True).spec()))


def needs(recipe: Recipe) -> CalibrationNeeds:
    """The size of the inputs."""
    return CalibrationNeeds(inputs=True)


OPTIONS = MethodOptions(CONDITIONING, default_bits=2, low=1, high=3, step=1 / VECTOR_LENGTH)
METHOD = Method("normalized matrices, vector codes weighted with the size of the inputs", OPTIONS, quantize, plan, needs)
