"""KBVQ-MoE (Algorithm 1): shared directions in 16 bit, vector quantization of the rest, corrected outputs. Each is a switch.

With IDRE and BCOS off it is ``gptvq``, and without error feedback plain k-means.

Deviations: codes are chosen with GPTVQ's error feedback, where the paper takes the nearest entry (``error_feedback=false``);
inputs count by their second moments, not around their mean, and those of an expert lean on the layer's; gate and up of an
expert share a codebook and their directions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from moebius.basis.klt_svd import shared_directions
from moebius.correct.bias import channel_correction, input_moments, layer_average
from moebius.correct.gain import row_gain
from moebius.formats.base import Packed, empty_like_spec
from moebius.formats.codebook import Codebook
from moebius.formats.dense import Dense
from moebius.formats.projection import PackedProjection
from moebius.linalg.hessian import feedback_factor, layer_mean
from moebius.methods.base import Method, chunks, conditioned_moments, in_chunks
from moebius.methods.options import CONDITIONING, ERROR_FEEDBACK, off
from moebius.options import MethodOptions, Option
from moebius.quantize.codebook import code_bits, quantize_vectors
from moebius.recipe import Recipe
from moebius.types import CalibrationNeeds, ProjectionStats

VECTOR_LENGTH = 4
ITERATIONS = 100


#: Codes some matrices (experts, rows, columns), with their Hessians (experts, columns, columns) where there is error feedback.
Coder = Callable[[Tensor, Tensor | None, Recipe], Codebook]


def quantize(weight: Tensor, stats: ProjectionStats | None, recipe: Recipe, projection: str) -> PackedProjection:
    """Quantize the experts of one projection."""
    return quantize_special(weight, stats, recipe, _along_rows)


def _along_rows(weight: Tensor, hessians: Tensor | None, recipe: Recipe) -> Codebook:
    factor = None if hessians is None else feedback_factor(hessians)
    return quantize_vectors(weight, factor, bits=recipe.bits, length=VECTOR_LENGTH, iterations=ITERATIONS)


def quantize_special(weight: Tensor, stats: ProjectionStats | None, recipe: Recipe, coder: Coder) -> PackedProjection:
    """Algorithm 1 around any vector quantizer of what is special to each expert (Table 5)."""
    weight = weight.float()
    layer = None if stats is None else layer_mean(stats.second_moment)

    # IDRE: what the experts do with the directions that inputs use most and experts share stays in 16 bit.
    shared = shared_directions(weight, layer if recipe.klt else None, _rank(weight.shape[2], recipe)) if recipe.idre else None
    special = weight if shared is None else weight - shared.matrix()

    # VQ of the rest: a codebook for each expert by k-means, a code for every four columns.
    def encode(chunk: slice) -> Packed:
        hessians = _hessians(stats, layer, chunk, recipe) if recipe.value(ERROR_FEEDBACK) else None
        return coder(special[chunk], hessians, recipe)

    packed = in_chunks(len(weight), weight.shape[2], encode)
    assert isinstance(packed, Codebook)
    if shared is not None:
        packed = packed.with_shared(shared.loadings, shared.directions)

    # BCOS: every output channel gets back its variance and its mean.
    scales, biases = _corrections(weight, packed, stats, layer, recipe)
    return PackedProjection(
        packed if scales is None else packed.with_row_scales(scales),
        bias=None if biases is None else Dense.pack(biases.unsqueeze(1)),
    )


def plan(shape: tuple[int, int, int], recipe: Recipe, projection: str) -> PackedProjection:
    """What :func:`quantize` stores for matrices of this shape, on the meta device."""
    return plan_special(shape, recipe, transposed=False)


def plan_special(shape: tuple[int, int, int], recipe: Recipe, *, transposed: bool) -> PackedProjection:
    """What :func:`quantize_special` stores, with vectors along the rows or, transposed, along the columns."""
    experts, out, inputs = shape
    rank = _rank(inputs, recipe) if recipe.idre else 0
    scaled = recipe.gain or recipe.bcos not in ("off", "mean")
    factor = Codebook(*shape, code_bits(recipe.bits, VECTOR_LENGTH), VECTOR_LENGTH, rank, scaled, transposed=transposed)
    bias = Dense(experts, 1, out) if recipe.bcos not in ("off", "variance") else None
    return PackedProjection(empty_like_spec(factor.spec()), bias=None if bias is None else empty_like_spec(bias.spec()))


def needs(recipe: Recipe) -> CalibrationNeeds:
    """Plain k-means looks at weights alone; KLT, error feedback and corrections look at inputs."""
    looks = recipe.value(ERROR_FEEDBACK) or recipe.gain or recipe.bcos != "off" or (recipe.idre and recipe.klt)
    return CalibrationNeeds(inputs=looks)


def _rank(inputs: int, recipe: Recipe) -> int:
    return max(1, round(recipe.rank_share * inputs))


def _hessians(stats: ProjectionStats | None, layer: Tensor | None, chunk: slice, recipe: Recipe) -> Tensor:
    assert stats is not None
    return conditioned_moments(stats, chunk, recipe, layer)


def _corrections(
    weight: Tensor, packed: Codebook, stats: ProjectionStats | None, layer: Tensor | None, recipe: Recipe
) -> tuple[Tensor | None, Tensor | None]:
    """Row scales and biases (experts, out), None for what the recipe does not ask for."""
    if stats is None or (recipe.bcos == "off" and not recipe.gain):
        return None, None
    average = layer_average(stats)
    scales, biases = torch.ones_like(weight[:, :, 0]), torch.zeros_like(weight[:, :, 0])
    for chunk in chunks(len(weight), weight.shape[2]):
        some, got = weight[chunk], packed.unpack(torch.arange(len(weight), device=weight.device)[chunk])
        if recipe.gain:
            scales[chunk] = row_gain(some, got, _hessians(stats, layer, chunk, recipe).float())
        if recipe.bcos != "off":
            inputs = input_moments(stats, chunk, average, shrinkage=recipe.shrinkage)
            scale, biases[chunk] = channel_correction(some, scales[chunk].unsqueeze(2) * got, inputs, recipe.bcos)
            scales[chunk] *= scale
    return (
        scales if recipe.gain or recipe.bcos not in ("off", "mean") else None,
        biases if recipe.bcos not in ("off", "variance") else None,
    )


IDRE = Option("idre", True, "keep the directions that all experts share in 16 bit and quantize the rest (off: quantize all)")
KLT = Option("klt", True, "find those directions in the coordinates of the inputs (off: in those of the weights)")
RANK_SHARE = Option("rank_share", 1 / 128, "how many of them, as a share of the input channels", low=0, high=1)
BCOS = Option(
    "bcos",
    "mean_variance",
    "give outputs their variance and their mean back, one of them, or what a regression says",
    ("off", "mean", "variance", "mean_variance", "regression"),
)
# A code stands for four weights: quarters of a bit are whole bits of a code.
OPTIONS = MethodOptions(
    (IDRE, KLT, RANK_SHARE, BCOS, ERROR_FEEDBACK, *CONDITIONING), default_bits=2, low=1, high=3, step=1 / VECTOR_LENGTH
)
METHOD = Method("shared directions in 16 bit, vector codes for the rest, corrected outputs", OPTIONS, quantize, plan, needs)

_PLAIN = dataclasses.replace(
    OPTIONS, options=(off(IDRE), KLT, RANK_SHARE, dataclasses.replace(BCOS, default="off"), ERROR_FEEDBACK, *CONDITIONING)
)
GPTVQ = dataclasses.replace(METHOD, summary="vector codes with error feedback (kbvq without its parts)", options=_PLAIN)
