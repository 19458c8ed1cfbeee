"""BitsMoE (2026): a joint basis in 16 bit, and for each direction of each expert as many bits as its energy deserves.

Deviations: gate and up have one basis; levels lie symmetrically around zero, with scales that fit best; what a width loses is
measured on every direction, where the paper fits a curve to all; no expert is kept in 16 bit. Where experts are so few or so
small that the 16-bit basis alone exceeds the budget the recipe is refused: ``shared_bits`` or ``rank`` lower it.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from moebius.allocate.ilp import allocate, allocate_exactly
from moebius.basis.joint_svd import JointBasis, joint_basis, joint_rank, shared_factor_skeleton
from moebius.correct.gain import row_gain
from moebius.errors import RecipeError
from moebius.formats.base import empty_like_spec
from moebius.formats.projection import PackedProjection
from moebius.formats.spectral import MAX_BITS, Spectral
from moebius.linalg.hessian import layer_mean
from moebius.methods.base import Method, chunks, conditioned_moments
from moebius.methods.options import CONDITIONING, GROUP_SIZE, RANK, SHARED_BITS
from moebius.options import MethodOptions, Option
from moebius.quantize.integers import whole_rows
from moebius.quantize.spectral import distortions, round_directions
from moebius.recipe import Recipe
from moebius.types import CalibrationNeeds, ProjectionStats

_SIDE = {"gate_up": "input", "down": "output"}  # where a projection meets the hidden state, which the experts share
_PART = {"input": "right", "output": "left"}
#: Bits that a direction may have.
WIDTHS = range(MAX_BITS + 1)
_SOLVERS = {"lagrangian": allocate, "ilp": allocate_exactly}


def quantize(weight: Tensor, stats: ProjectionStats | None, recipe: Recipe, projection: str) -> PackedProjection:
    """Quantize the experts of one projection under the budget that the recipe gives it."""
    assert stats is not None
    weight, side = weight.float(), _SIDE[projection]
    empty = _skeleton((weight.shape[0], weight.shape[1], weight.shape[2]), recipe, projection)

    basis, factors, directions = spectral_factors(weight, recipe, projection)
    costs = loss_coefficients(basis, factors, directions, stats, recipe, empty.group_size)
    sizes = torch.tensor([empty.record_bytes(bits) for bits in WIDTHS])
    widths = _SOLVERS[recipe.allocation](costs.flatten(0, 1), sizes, empty.payload_bytes).view(costs.shape[:2])

    codes = torch.zeros_like(directions, dtype=torch.uint8)
    values = torch.zeros_like(directions)
    scales = directions.new_zeros(*widths.shape, empty.groups)
    for bits in WIDTHS[1:]:
        rounded = round_directions(directions[widths == bits], bits, empty.group_size)
        codes[widths == bits], scales[widths == bits], values[widths == bits] = rounded.codes, rounded.scales, rounded.values
    row_scales = None
    if recipe.gain:
        gains = _gains(factors, values.mT if side == "input" else values, basis, stats, recipe)
        row_scales, scales = (gains, scales) if side == "input" else (None, scales * gains.unsqueeze(2))
    if side == "output":
        scales = scales * basis.spread.unsqueeze(1)
    return PackedProjection(empty.fill(widths, codes, scales, row_scales), **{_PART[side]: basis.packed})


def spectral_factors(weight: Tensor, recipe: Recipe, projection: str) -> tuple[JointBasis, Tensor, Tensor]:
    """A basis shared by all experts, kept in high precision; each expert's factor falls into directions.

    Args:
        weight: (experts, out, in) float32.

    Returns:
        The basis, the factors that fit it, and their directions (experts, directions, length).
    """
    basis = joint_basis(weight, side=_SIDE[projection], rank=recipe.rank, bits=recipe.shared_bits)
    factors = basis.factors(weight)
    return basis, factors, factors.mT if basis.side == "input" else factors


def loss_coefficients(
    basis: JointBasis, factors: Tensor, directions: Tensor, stats: ProjectionStats, recipe: Recipe, group_size: int
) -> Tensor:
    """What a direction costs at each of :data:`WIDTHS`: its energy in the outputs times the distortion of that width, the
    coefficients of the integer program. float64 (experts, directions, widths)
    """
    lost = distortions(directions, WIDTHS, group_size)
    return _energies(factors, basis, stats, recipe).unsqueeze(2) * lost.double()


def plan(shape: tuple[int, int, int], recipe: Recipe, projection: str) -> PackedProjection:
    """What :func:`quantize` stores for matrices of this shape, on the meta device."""
    side = _SIDE[projection]
    shared = shared_factor_skeleton(shape, side=side, rank=recipe.rank, bits=recipe.shared_bits)
    return PackedProjection(empty_like_spec(_skeleton(shape, recipe, projection).spec()), **{_PART[side]: shared})


def needs(recipe: Recipe) -> CalibrationNeeds:
    """The energy of what each expert takes in."""
    return CalibrationNeeds(inputs=True)


def _skeleton(shape: tuple[int, int, int], recipe: Recipe, projection: str) -> Spectral:
    """The format without tensors. Its payload is what the budget leaves after everything else.

    Raises:
        RecipeError: nothing is left.
    """
    experts, out, inputs = shape
    side = _SIDE[projection]
    rank = joint_rank(shape, side, recipe.rank)
    rows, columns = (out, rank) if side == "input" else (rank, inputs)
    length = rows if side == "input" else columns
    empty = Spectral(experts, rows, columns, side == "input", whole_rows(recipe.group_size, length))
    empty = empty.replace(row_scaled=recipe.gain and side == "input")
    shared = shared_factor_skeleton(shape, side=side, rank=recipe.rank, bits=recipe.shared_bits).stored_bits()
    rest = empty_like_spec(empty.spec()).stored_bits() + shared
    payload = int((recipe.bits * math.prod(shape) - rest) // 8)
    if payload < 0:
        raise RecipeError(
            f"bitsmoe: got {recipe.bits:g} bits, but the shared factor and the widths of {experts} experts of {out} x {inputs}"
            f" alone take {rest / math.prod(shape):.2f}; ask for more bits, fewer shared_bits or a lower rank"
        )
    return empty.replace(payload_bytes=payload)


def _energies(factors: Tensor, basis: JointBasis, stats: ProjectionStats, recipe: Recipe) -> Tensor:
    """What each direction of each expert puts into the layer's outputs, summed over tokens. float64 (experts, directions)"""
    layer, energies = layer_mean(stats.second_moment), []
    for chunk in chunks(len(factors), stats.second_moment.shape[2]):
        moments = conditioned_moments(stats, chunk, recipe, layer).double()
        some = factors[chunk].double()
        if basis.side == "input":
            shared = basis.shared.double()
            energies.append(some.square().sum(1) * ((shared @ moments) * shared).sum(2))
        else:
            energies.append(((some @ moments) * some).sum(2) * basis.shared.double().square().sum(0))
    return torch.cat(energies)


def _gains(factors: Tensor, values: Tensor, basis: JointBasis, stats: ProjectionStats, recipe: Recipe) -> Tensor:
    """See :func:`moebius.correct.gain.row_gain`, in the coordinates of the factors. (experts, rows)"""
    layer, gains = layer_mean(stats.second_moment), []
    for chunk in chunks(len(factors), stats.second_moment.shape[2]):
        moments = conditioned_moments(stats, chunk, recipe, layer)
        if basis.side == "input":
            moments = basis.shared @ moments @ basis.shared.mT
        gains.append(row_gain(factors[chunk], values[chunk], moments))
    return torch.cat(gains)


ALLOCATION = Option("allocation", "lagrangian", "solver that spreads bits over directions", ("lagrangian", "ilp"))
OPTIONS = MethodOptions(
    (ALLOCATION, GROUP_SIZE, RANK, dataclasses.replace(SHARED_BITS, default=16), *CONDITIONING),
    default_bits=2,
    low=0.5,
    high=8,
    step=0,
)
METHOD = Method("a joint basis, and bits for each direction of each expert by its energy", OPTIONS, quantize, plan, needs)
