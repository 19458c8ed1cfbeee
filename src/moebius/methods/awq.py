"""AWQ (Lin et al., 2024): input channels that matter are scaled up before rounding to nearest, and weights are clipped.

Per expert and projection the scales are ``s = a^α`` (Eq. 5), ``a`` the size of each input channel, ``α`` from a grid of twenty
points; then the range of every group is shrunk by up to a half. Both searches minimize the error of the outputs (Eq. 4).

Deviations: ``a`` is the root mean square of a channel where AWQ has its mean magnitude; scales are stored, 16 bits per input
channel of every expert, where AWQ divides the operation before by them (the norm before ``gate_up`` is shared by all experts
and the router, and stays as it is here); gate and up of an expert have one set of scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moebius.correct.gain import row_gain
from moebius.formats.base import Packed, empty_like_spec
from moebius.formats.integers import Integers
from moebius.formats.projection import PackedProjection
from moebius.linalg.hessian import layer_mean
from moebius.linalg.products import quadratic_forms
from moebius.methods.base import Method, conditioned_moments, in_chunks
from moebius.methods.options import CONDITIONING, INTEGER_GROUP_SIZE
from moebius.options import MethodOptions, Option
from moebius.quantize.integers import round_to_nearest, whole_rows
from moebius.recipe import Recipe
from moebius.types import CalibrationNeeds, ProjectionStats

_GRID = 20
_MOST_CLIPPED = 0.5


def quantize(weight: Tensor, stats: ProjectionStats | None, recipe: Recipe, projection: str) -> PackedProjection:
    """Scale, clip and round the experts of one projection."""
    assert stats is not None
    experts, _, inputs = weight.shape
    layer = layer_mean(stats.second_moment)

    def round_some(chunk: slice) -> Packed:
        some = weight[chunk].float()
        moments = conditioned_moments(stats, chunk, recipe, layer)
        shape = int(recipe.bits), whole_rows(recipe.group_size, inputs)
        # The inverse of the scales is what is stored: the search runs on scales as they will be.
        inverse = _stored(_scales(some, moments, *shape))
        scaled = some / inverse.unsqueeze(1)
        if recipe.clip:
            scaled = _clipped(scaled, moments * inverse.unsqueeze(1) * inverse.unsqueeze(2), *shape)
        codes = round_to_nearest(scaled, *shape)
        if recipe.gain:
            codes = codes.scaled(row_gain(some, codes.matrix() * inverse.unsqueeze(1), moments))
        return codes.pack().with_column_scales(inverse)

    return PackedProjection(in_chunks(experts, inputs, round_some))


def plan(shape: tuple[int, int, int], recipe: Recipe, projection: str) -> PackedProjection:
    """What :func:`quantize` stores for matrices of this shape, on the meta device."""
    codes = Integers(*shape, int(recipe.bits), whole_rows(recipe.group_size, shape[2]), recipe.bits > 1, column_scaled=True)
    return PackedProjection(empty_like_spec(codes.spec()))


def needs(recipe: Recipe) -> CalibrationNeeds:
    """The size of the inputs, and the metric of the outputs."""
    return CalibrationNeeds(inputs=True)


def _scales(weight: Tensor, moments: Tensor, bits: int, group_size: int) -> Tensor:
    """The scales of the grid whose rounding errs least in the outputs of each expert. (experts, in)"""
    size = moments.diagonal(dim1=1, dim2=2).sqrt()
    best, least = torch.ones_like(size), torch.full_like(size[:, 0], torch.inf)
    for step in range(_GRID):
        tried = size ** (step / _GRID)
        # The geometric middle of the range is one: products stay where fp16 is fine.
        tried = tried / (tried.amax(1, keepdim=True) * tried.amin(1, keepdim=True)).sqrt()
        inverse = _stored(tried).unsqueeze(1)
        rounded = round_to_nearest(weight / inverse, bits, group_size).matrix() * inverse
        error = quadratic_forms(rounded - weight, moments).sum(1)
        better = error < least
        best[better], least = tried[better], torch.minimum(error, least)
    return best


def _clipped(weight: Tensor, moments: Tensor, bits: int, group_size: int) -> Tensor:
    """Every group of every row clipped to the share of its largest magnitude that errs least, the other groups left alone."""
    if bits == 1:
        return weight  # its levels are means, which no peak stretches
    groups = []
    for start in range(0, weight.shape[2], group_size):
        mine = slice(start, start + group_size)
        group, metric = weight[:, :, mine], moments[:, mine, mine]
        peak, best = group.abs().amax(2, keepdim=True), group
        least = torch.full_like(peak[..., 0], torch.inf)
        for step in range(int(_MOST_CLIPPED * _GRID)):
            limit = peak * (1 - step / _GRID)
            tried = group.maximum(-limit).minimum(limit)
            error = quadratic_forms(round_to_nearest(tried, bits, group_size).matrix() - group, metric)
            best = torch.where((error < least).unsqueeze(2), tried, best)
            least = torch.minimum(error, least)
        groups.append(best)
    return torch.cat(groups, 2)


def _stored(scales: Tensor) -> Tensor:
    """The inverse of scales, in the precision of fp16."""
    return (1 / scales).clamp(1e-4, 6e4).half().float()


CLIP = Option("clip", True, "shrink the range of every group to what errs least in the outputs")
OPTIONS = MethodOptions((INTEGER_GROUP_SIZE, CLIP, *CONDITIONING), default_bits=2, low=1, high=8)
METHOD = Method("input channels scaled by their size, clipped and rounded to nearest", OPTIONS, quantize, plan, needs)
