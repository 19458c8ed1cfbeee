"""MxMoE (Duanmu et al., 2025): gate, up and down of every expert have widths of their own, chosen by an integer program.

For every linear block and width the loss that its rounding causes is estimated alone (Sec. 4.1), then one width for each is
chosen under the budget of the layer (Eq. 7, solved by HiGHS), and the blocks are rounded with error feedback.

Deviations: the paper measures what a block changes in the output of its layer; here the error of the block's own outputs is
weighed with the squared gradient of the loss there, which is one unit for gate, up and down. Accuracy alone decides
(``r = 1``): run times of mixed kernels are not modelled. Widths are 1 to 8 bits of weights, with symmetric levels; activations
stay in 16 bit. Gate and up are the two halves of the channels of ``gate_up``: where a model interleaves them, each half has
some of both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moebius.allocate.ilp import allocate_exactly
from moebius.correct.gain import row_gain
from moebius.errors import RecipeError
from moebius.formats.base import empty_like_spec
from moebius.formats.bits import packed_width
from moebius.formats.projection import PackedProjection
from moebius.formats.spectral import MAX_BITS, Spectral
from moebius.linalg.hessian import feedback_factor, layer_mean
from moebius.linalg.products import quadratic_forms
from moebius.methods.base import Method, Survey, chunks, conditioned_moments
from moebius.methods.options import BLOCK_SIZE, CONDITIONING, GROUP_SIZE
from moebius.options import MethodOptions
from moebius.quantize.integers import whole_rows
from moebius.quantize.spectral import round_directions, round_rows_with_feedback
from moebius.recipe import Recipe
from moebius.types import CalibrationNeeds, ProjectionStats

_WIDTHS = range(1, MAX_BITS + 1)
_PRIOR_TOKENS = 8  # how many average tokens an expert's gradient leans on


def survey(weight: Tensor, stats: ProjectionStats, recipe: Recipe, projection: str) -> dict[str, Tensor]:
    """What each block of each expert would cost the loss at each width, float64 (experts, blocks, widths), and the shape."""
    experts, outputs, inputs = weight.shape
    blocks, layer, costs = _blocks(outputs, projection), layer_mean(stats.second_moment), []
    felt = _gradients(stats, experts, blocks)
    for chunk in chunks(experts, inputs):
        some, moments = weight[chunk].float(), conditioned_moments(stats, chunk, recipe, layer)
        group_size = whole_rows(recipe.group_size, inputs)
        lost = [quadratic_forms(some - round_directions(some, bits, group_size).values, moments) for bits in _WIDTHS]
        of_block = torch.stack(lost, 2).double().unflatten(1, (blocks, -1)).sum(2)  # (chunk, blocks, widths)
        costs.append(of_block * felt[chunk].unsqueeze(2))
    return {"shape": torch.tensor([experts, outputs, inputs]), "costs": torch.cat(costs).cpu()}


def allocate(surveys: Sequence[Mapping[str, Tensor]], recipe: Recipe) -> list[dict[str, Tensor]]:
    """Widths for the blocks of every layer, each layer under a budget of its own."""
    shares = []
    for start in range(0, len(surveys), 2):  # the two projections of a layer
        layer = surveys[start : start + 2]
        costs, sizes, budget = [], [], 0
        for seen in layer:
            experts, outputs, _ = shape = tuple(seen["shape"].tolist())
            empty, blocks = _skeleton(shape, recipe), seen["costs"].shape[1]
            of_width = torch.tensor([empty.record_bytes(bits) for bits in _WIDTHS]) * (outputs // blocks)
            costs.append(seen["costs"].flatten(0, 1))
            sizes.append(of_width.expand(experts * blocks, -1))
            budget += int(recipe.bits * math.prod(shape) / 8) - experts * packed_width(outputs, 4)
        chosen = allocate_exactly(torch.cat(costs), torch.cat(sizes), budget) + _WIDTHS[0]
        parts = chosen.split([len(part) for part in costs])
        shares += [{"widths": part.view(seen["costs"].shape[:2])} for part, seen in zip(parts, layer, strict=True)]
    return shares


def quantize(
    weight: Tensor,
    stats: ProjectionStats | None,
    recipe: Recipe,
    projection: str,
    seen: Mapping[str, Tensor] | None = None,
    share: Mapping[str, Tensor] | None = None,
) -> PackedProjection:
    """Round every block at its width. Without a survey and a share of a layer's budget, the projection has one of its own."""
    assert stats is not None
    experts, outputs, inputs = weight.shape
    if share is None:
        share = allocate([survey(weight, stats, recipe, projection) if seen is None else seen], recipe)[0]
    of_block = share["widths"].to(weight.device)
    widths = of_block.repeat_interleave(outputs // of_block.shape[1], 1)  # (experts, out)
    empty, layer = _skeleton((experts, outputs, inputs), recipe), layer_mean(stats.second_moment)
    codes, scales = torch.empty_like(weight, dtype=torch.uint8), torch.empty(*widths.shape, empty.groups, device=weight.device)
    for chunk in chunks(experts, inputs):
        some, moments = weight[chunk].float(), conditioned_moments(stats, chunk, recipe, layer)
        rounded = round_rows_with_feedback(some, feedback_factor(moments), widths[chunk], empty.group_size, recipe.block_size)
        codes[chunk], scales[chunk] = rounded.codes, rounded.scales
        if recipe.gain:
            scales[chunk] *= row_gain(some, rounded.values, moments).unsqueeze(2)
    taken = sum(empty.record_bytes(bits) * int((widths == bits).sum()) for bits in _WIDTHS)
    return PackedProjection(empty.replace(payload_bytes=taken).fill(widths, codes, scales))


def plan(shape: tuple[int, int, int], recipe: Recipe, projection: str) -> PackedProjection:
    """What the budget pays for, on the meta device; how it is divided between the projections, statistics decide."""
    empty, widths = _skeleton(shape, recipe), shape[0] * packed_width(shape[1], 4)
    taken = int(recipe.bits * math.prod(shape) / 8) - widths
    least = shape[0] * shape[1] * empty.record_bytes(_WIDTHS[0])
    if taken < least:
        raise RecipeError(
            f"mxmoe: got {recipe.bits:g} bits, but {shape[0]} experts of {shape[1]} x {shape[2]} take"
            f" {8 * (least + widths) / math.prod(shape):.2f} with one bit for every weight; ask for more bits or larger groups"
        )
    return PackedProjection(empty_like_spec(empty.replace(payload_bytes=taken).spec()))


def needs(recipe: Recipe) -> CalibrationNeeds:
    """The Hessian of the error feedback, once widths are chosen."""
    return CalibrationNeeds(inputs=True)


def survey_needs(recipe: Recipe) -> CalibrationNeeds:
    """The gradient of the loss at the outputs of every block."""
    return CalibrationNeeds(inputs=True, output_fisher=True)


def _blocks(outputs: int, projection: str) -> int:
    """Gate and up, or down alone."""
    return 2 if projection == "gate_up" and outputs % 2 == 0 else 1


def _skeleton(shape: tuple[int, int, int], recipe: Recipe) -> Spectral:
    """The format without tensors: rows are the directions."""
    return Spectral(*shape, False, whole_rows(recipe.group_size, shape[2]))


def _gradients(stats: ProjectionStats, experts: int, blocks: int) -> Tensor:
    """Mean squared gradient of the loss at the outputs of each block. float64 (experts, blocks)"""
    tokens = stats.tokens.double()
    if stats.fisher_diagonal is None:
        return torch.ones(experts, blocks, dtype=torch.float64, device=tokens.device)
    squares = stats.fisher_diagonal.double().unflatten(1, (blocks, -1)).mean(2)
    mean = squares.sum(0) / tokens.sum().clamp_min(1)
    return (squares + _PRIOR_TOKENS * mean) / (tokens.unsqueeze(1) + _PRIOR_TOKENS)


OPTIONS = MethodOptions((GROUP_SIZE, BLOCK_SIZE, *CONDITIONING), default_bits=2.25, low=1.25, high=8, step=0)
METHOD = Method(
    "gate, up and down of every expert at widths of their own, by an integer program",
    OPTIONS,
    quantize,
    plan,
    needs,
    survey=Survey(survey, allocate, survey_needs),
)
