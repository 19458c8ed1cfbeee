"""`moebius`: whitened joint bases, one bit budget for the whole model, nested sign planes, gain."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moebius.allocate.budget import Allocation, Units, expected_loss, prefix_values
from moebius.allocate.budget import allocate as within_budget
from moebius.basis.whitened import coordinates, input_basis, loss_metric, output_basis, rounded_basis
from moebius.correct.gain import row_gain
from moebius.errors import RecipeError
from moebius.formats.base import Packed
from moebius.formats.bits import packed_width
from moebius.formats.graded import Graded
from moebius.formats.logarithmic import encode
from moebius.formats.planes import Planes, pack_signs
from moebius.formats.projection import PackedProjection
from moebius.formats.trellis import Trellis, fixed_bytes
from moebius.linalg.hessian import conditioned, layer_mean, solve_unit_upper, unit_upper
from moebius.linalg.products import quadratic_forms, symmetric_product
from moebius.methods.base import Method, Survey, chunks, in_chunks
from moebius.methods.options import BLOCK_SIZE, CONDITIONING, GAIN
from moebius.options import MethodOptions, Option
from moebius.quantize.planes import PlaneLevels, over_directions, over_entries
from moebius.quantize.trellis import expected_loss as expected_trellis_loss
from moebius.quantize.trellis import quantize_columns, rate_values, share_rates
from moebius.recipe import Recipe
from moebius.types import CalibrationNeeds, ProjectionStats

_GRADES: tuple[int, ...] = (8, 6, 5, 4, 3)
_SIDES = {"gate_up": "input", "down": "output"}
# A least-squares approximation that needs a larger gain than this would err more with it than no output at all does.
_LARGEST_GAIN = 2.0
_PRIOR_TOKENS = 8  # an expert's sensitivity shrinks towards its layer's as if it had seen so many average tokens more


def survey(weight: Tensor, stats: ProjectionStats, recipe: Recipe, projection: str) -> dict[str, Tensor]:
    """The basis of a projection, and what the loss would lose without each of its directions in each expert."""
    experts, outputs, inputs = weight.shape
    # What few tokens hide is not free: an expert is also asked about a little of what its neighbours saw.
    moments = stats.second_moment + recipe.shrinkage * layer_mean(stats.second_moment).to(stats.second_moment.dtype)
    found = {"shape": torch.tensor([experts, outputs, inputs])}
    if projection == "gate_up":
        basis = input_basis(weight, moments)
    else:
        found["metric"] = metric = _metric(stats, outputs)
        basis = output_basis(weight, moments, metric)
    sensitivity = _sensitivity(stats, outputs)
    values = basis.energies * sensitivity.unsqueeze(1)
    if recipe.codes != "planes":
        layer, chunked = layer_mean(stats.second_moment), []
        for some in chunks(experts, inputs):
            hessians = conditioned(stats.second_moment[some], shrinkage=recipe.shrinkage, damping=recipe.damping, layer=layer)
            chunked.append(rate_values(weight[some], hessians, sensitivity[some]))
        found["rate_values"] = torch.cat(chunked).cpu()
    return {**found, "directions": basis.directions, "values": prefix_values(values.cpu())}


def allocate(surveys: Sequence[Mapping[str, Tensor]], recipe: Recipe) -> list[dict[str, Tensor]]:
    """One budget over everything that was surveyed, spent on planes behind shared bases or on trellis codes without any,
    whichever is expected to lose less.
    """
    planes, loss = _share_planes(surveys, recipe) if recipe.codes != "trellis" else ([], math.inf)
    if recipe.codes == "planes":
        return planes
    codes, loss_of_codes = _share_codes(surveys, recipe)
    return codes if loss_of_codes < loss else planes


def _share_codes(surveys: Sequence[Mapping[str, Tensor]], recipe: Recipe) -> tuple[list[dict[str, Tensor]], float]:
    shapes = [tuple(seen["shape"].tolist()) for seen in surveys]
    values = [seen["rate_values"] for seen in surveys]
    budget = int(recipe.bits * sum(math.prod(shape) for shape in shapes) / 8) - sum(fixed_bytes(*shape) for shape in shapes)
    if budget < 0:  # not even the scales fit: matrices this narrow are for planes, whose directions share them
        if recipe.codes == "trellis":
            raise RecipeError(f"bits: got {recipe.bits:g}, which does not pay for scales here; use more bits or codes=planes")
        return [], math.inf
    rates = share_rates(values, [packed_width(shape[1], 1) for shape in shapes], budget)
    loss = sum(expected_trellis_loss(*pair) for pair in zip(values, rates, strict=True))
    return [{"rates": some} for some in rates], loss


def _share_planes(surveys: Sequence[Mapping[str, Tensor]], recipe: Recipe) -> tuple[list[dict[str, Tensor]], float]:
    units, weights = [], 0
    for seen in surveys:
        _, outputs, inputs = shape = tuple(seen["shape"].tolist())
        entries, length = (inputs, outputs) if "metric" in seen else (outputs, inputs)
        units.append(Units(seen["values"], entries, length))
        weights += shape[0] * outputs * inputs
    shares = within_budget(units, int(recipe.bits * weights / 8), **_choices(recipe))
    loss = sum(expected_loss(some, share) for some, share in zip(units, shares, strict=True))
    return [_stored_share(share) for share in shares], loss


def _stored_share(share: Allocation) -> dict[str, Tensor]:
    return {"widths": share.widths, "basis_bits": torch.tensor(share.basis_bits, dtype=torch.int64)}


def quantize(
    weight: Tensor,
    stats: ProjectionStats | None,
    recipe: Recipe,
    projection: str,
    seen: Mapping[str, Tensor] | None = None,
    share: Mapping[str, Tensor] | None = None,
) -> PackedProjection:
    """Round the basis, refit each expert to it, and quantize what was given planes. Without a survey and a share of a larger
    budget, the projection is one of its own.
    """
    assert stats is not None
    seen = survey(weight, stats, recipe, projection) if seen is None else seen
    share = allocate([seen], recipe)[0] if share is None else share
    if "rates" in share:
        return _coded(weight, stats, recipe, share["rates"].to(weight.device))
    widths, bits = share["widths"].to(weight.device), share["basis_bits"].tolist()
    directions = seen["directions"][: len(bits)].to(weight.device)
    basis = rounded_basis(directions, bits, _SIDES[projection])
    metric = seen["metric"].to(weight.device) if "metric" in seen else None
    packer = _Packer(weight, stats, recipe, widths, basis, metric)
    return PackedProjection(packer.factor(), **{"right" if projection == "gate_up" else "left": basis})


def _coded(weight: Tensor, stats: ProjectionStats, recipe: Recipe, rates: Tensor) -> PackedProjection:
    """Trellis codes for the weights as they are."""
    layer = layer_mean(stats.second_moment)

    def quantize_some(some: slice) -> Packed:
        moments = conditioned(stats.second_moment[some], shrinkage=recipe.shrinkage, damping=recipe.damping, layer=layer)
        pace = {"sweeps": recipe.sweeps, "block_size": recipe.block_size}
        wanted = weight[some].float()
        found = quantize_columns(wanted, moments, rates[some], **pace)
        if recipe.gain:
            gain = row_gain(wanted, found.values(), moments).clamp_max(_LARGEST_GAIN)
            found = dataclasses.replace(found, row_scales=found.row_scales * gain)
        return found.packed()

    parts = in_chunks(weight.shape[0], weight.shape[2], quantize_some)
    return PackedProjection(parts.replace(code_rows=int(rates.sum())))


class _Packer:
    """The expert factors of one projection, some experts at a time."""

    def __init__(
        self, weight: Tensor, stats: ProjectionStats, recipe: Recipe, widths: Tensor, basis: Graded, metric: Tensor | None
    ) -> None:
        self.weight, self.moments, self.recipe, self.widths, self.side = weight, stats.second_moment, recipe, widths, basis.side
        self.layer = layer_mean(stats.second_moment)
        self.pace = {"sweeps": recipe.sweeps, "block_size": recipe.block_size}
        self.shared = basis.unpack()[0] if basis.side == "input" else basis.unpack()[0].mT  # (kept, length)
        self.coordinates = coordinates(self.shared, metric) if basis.side == "output" else None

    def factor(self) -> Packed:
        experts, outputs, inputs = self.weight.shape
        kept, entries = len(self.shared), outputs if self.side == "input" else inputs
        first = self.widths[:, :1].sum(1)  # there may be no plane at all
        # Experts with similarly many directions together: a chunk is as wide as its widest.
        order = first.argsort(dim=0, descending=True, stable=True)
        none = torch.zeros(0, packed_width(entries, 1), dtype=torch.uint8, device=self.weight.device)
        signs = dict.fromkeys(range(experts), none)
        bits = self.recipe.scale_bits
        entry_codes = torch.zeros(experts, entries, dtype=torch.uint8, device=self.weight.device)
        direction_codes = torch.zeros(experts, kept, dtype=torch.uint8, device=self.weight.device)
        entry_grids, direction_grids = (torch.zeros(experts, 2, dtype=torch.float16, device=self.weight.device) for _ in "ab")
        for chunk in chunks(experts, inputs):
            some = order[chunk]
            width = int(first[some].max())
            if width == 0:
                break
            counts = (torch.arange(width, device=some.device) < self.widths[some].unsqueeze(2)).sum(1)
            planes = self._behind_basis(some, counts) if self.side == "input" else self._before_basis(some, counts)
            entry_codes[some], entry_grids[some] = encode(planes.entry_scales, bits)
            codes, direction_grids[some] = encode(planes.direction_scales, bits, counts > 0)
            direction_codes[some, :width] = codes
            positive = planes.positive()
            for place, expert in enumerate(some.tolist()):
                mine = slice(place, place + 1)
                signs[expert] = pack_signs(positive[mine], self.widths[expert : expert + 1, : positive.shape[1]])
        return Planes.pack(
            torch.cat(list(signs.values())),
            self.widths,
            entry_codes,
            entry_grids,
            direction_codes,
            direction_grids,
            side=self.side,
            directions=kept,
            entries=entries,
            scale_bits=bits,
        )

    def _behind_basis(self, some: Tensor, counts: Tensor) -> PlaneLevels:
        """Factors ``B_e`` of ``W_e ≈ B_e T``: fitted to the outputs, errors pushed from direction to direction."""
        experts, width = counts.shape
        target = self.shared.new_zeros(experts, width, self.weight.shape[1])
        hessian = torch.eye(width, device=target.device).repeat(experts, 1, 1)
        upper, energy = hessian.clone(), torch.empty_like(target[:, 0])
        for place, (expert, kept) in enumerate(zip(some.tolist(), (counts > 0).sum(1).tolist(), strict=True)):
            shared, weight = self.shared[:kept], self.weight[expert].float()
            moments = self._conditioned(slice(expert, expert + 1))[0]
            passed = shared @ moments  # (kept, in)
            mine = symmetric_product(passed, shared.mT)
            hessian[place, :kept, :kept] = mine
            factor, roots = unit_upper(mine.unsqueeze(0))
            upper[place, :kept, :kept] = factor[0]
            target[place, :kept] = solve_unit_upper(factor[0], roots[0], passed @ weight.mT)
            if self.recipe.gain:
                energy[place] = quadratic_forms(weight, moments)
        planes = over_directions(target, hessian, upper, counts, **self.pace)
        if self.recipe.gain:
            planes = planes.rounded_scales(self.recipe.scale_bits)
            planes = planes.scaled(entries=_gain(energy, quadratic_forms(planes.factor().mT, hessian)))
        return planes

    def _before_basis(self, some: Tensor, counts: Tensor) -> PlaneLevels:
        """Factors ``F_e`` of ``W_e ≈ U F_e``: errors pushed from input to input."""
        assert self.coordinates is not None
        target = (self.coordinates[: counts.shape[1]] @ self.weight[some].float()) * (counts > 0).unsqueeze(2)
        moments = self._conditioned(some)
        planes = over_entries(target, moments, counts, **self.pace)
        if self.recipe.gain:
            planes = planes.rounded_scales(self.recipe.scale_bits)
            gain = row_gain(target, planes.factor(), moments)
            planes = planes.scaled(directions=gain.clamp_max(_LARGEST_GAIN))
        return planes

    def _conditioned(self, some: Tensor | slice) -> Tensor:
        recipe = self.recipe
        return conditioned(self.moments[some], shrinkage=recipe.shrinkage, damping=recipe.damping, layer=self.layer)


def plan(shape: tuple[int, int, int], recipe: Recipe, projection: str) -> PackedProjection:
    """What the budget pays for in matrices of this shape, on the meta device.

    Where planes go is decided by the statistics of the whole model; here every expert is alike and energies fall off as
    ``1/k``. The bits are those of the budget either way.
    """
    experts, outputs, inputs = shape
    side = _SIDES[projection]
    entries, length = (outputs, inputs) if side == "input" else (inputs, outputs)
    values = (1 / torch.arange(1, length + 1, dtype=torch.float64)).expand(experts, -1)
    budget = int(recipe.bits * experts * outputs * inputs / 8)
    if recipe.codes == "trellis":
        room = max(0, budget - fixed_bytes(experts, outputs, inputs))
        rates = share_rates([torch.ones(experts, inputs)], [packed_width(outputs, 1)], room)[0]
        return PackedProjection(Trellis.skeleton(rates, outputs))
    share = within_budget([Units(values, entries, length)], budget, **_choices(recipe))[0]
    basis = Graded.skeleton(side=side, bits=share.basis_bits, entries=length)
    factor = Planes.skeleton(
        share.widths, side=side, directions=len(share.basis_bits), entries=entries, scale_bits=recipe.scale_bits
    )
    return PackedProjection(factor, **{"right" if side == "input" else "left": basis})


def needs(recipe: Recipe) -> CalibrationNeeds:
    """Second moments, once the budget is allocated."""
    return CalibrationNeeds(inputs=True, loss_weighted=recipe.loss_weighted)


def survey_needs(recipe: Recipe) -> CalibrationNeeds:
    """The gradient of the global loss is the exchange rate between experts and layers."""
    return CalibrationNeeds(inputs=True, output_fisher=True)


def _choices(recipe: Recipe) -> dict[str, Any]:
    """What a budget may be spent on."""
    return {"scale_bits": recipe.scale_bits, "grades": _GRADES, "most_planes": recipe.planes}


def _sensitivity(stats: ProjectionStats, outputs: int) -> Tensor:
    """``φ_e``: mean squared gradient of the loss at an output of the expert. float64 (experts,)"""
    tokens = stats.tokens.double()
    if stats.fisher_diagonal is None:
        return torch.ones_like(tokens)
    squares = stats.fisher_diagonal.double().sum(1) / outputs
    mean = squares.sum() / tokens.sum().clamp_min(1)
    return (squares + _PRIOR_TOKENS * mean) / (tokens + _PRIOR_TOKENS)


def _metric(stats: ProjectionStats, outputs: int) -> Tensor:
    if stats.output_fisher is None:
        return torch.eye(outputs, dtype=torch.float64, device=stats.second_moment.device)
    return loss_metric(stats.output_fisher)


def _gain(wanted: Tensor, got: Tensor) -> Tensor:
    """What gives outputs the energy ``wanted``, see :func:`moebius.correct.gain.row_gain`; one where nothing is put out."""
    return torch.where(got > 0, (wanted / got).clamp_min(0).sqrt(), 1).clamp_max(_LARGEST_GAIN)


# Where bits are scarce, they do not belong in the fifth plane of what calibration showed most of; where they are not, four
# planes are too few for it, and the more planes there are, the more of what is left is the rounding of scales.
PLANES = Option(
    "planes",
    4,
    "sign planes that a direction of an expert has at most",
    (1, 2, 3, 4, 5, 6, 7),
    from_bits=((1.25, 6), (2.5, 7)),
)
SCALE_BITS = Option(
    "scale_bits",
    5,
    "bits of the scale of a direction or an entry of a sign plane",
    (3, 4, 5, 6, 7, 8),
    from_bits=((1.5, 6), (2, 8)),
)
SWEEPS = Option("sweeps", 1, "passes over the planes after the first, each in view of all errors", low=0, high=1000)
# Where most directions get no bits at all, it matters which tokens the rest is fitted to; later it does not pay.
LOSS_WEIGHTED = Option(
    "loss_weighted",
    True,
    "fit planes to the tokens by how much the loss depends on their outputs",
    from_bits=((1, False),),
    formerly=("felt",),
)
CODES = Option(
    "codes",
    "planes",
    "sign planes behind shared bases, trellis codes without a basis (no kernel yet), or what is expected to lose less",
    ("planes", "trellis", "auto"),
)
RECOVER = Option(
    "recover", False, "train layer after layer, so that each puts out what the original does: less memory than refine"
)
RECOVER_STEPS = Option("recover_steps", 48, "steps of that for each layer, of four calibration windows", low=1, high=1_000_000)
RECOVER_MINUTES = Option("recover_minutes", 0.0, "minutes of that for all layers, if it would take longer; 0: no limit", low=0)
RECOVER_SIGNS = Option("recover_signs", True, "train signs there too, not scales and bases alone")
REFINE = Option("refine", False, "train scales and bases afterwards, so that the logits become the original's")
REFINE_STEPS = Option("refine_steps", 200, "steps of that, of four calibration windows each", low=1, high=1_000_000)
_CONDITIONING = tuple(dataclasses.replace(o, default=True) if o is GAIN else o for o in CONDITIONING)
OPTIONS = MethodOptions(
    (
        PLANES,
        SCALE_BITS,
        SWEEPS,
        LOSS_WEIGHTED,
        CODES,
        RECOVER,
        RECOVER_STEPS,
        RECOVER_MINUTES,
        RECOVER_SIGNS,
        REFINE,
        REFINE_STEPS,
        BLOCK_SIZE,
        *_CONDITIONING,
    ),
    default_bits=1,
    low=0.3,
    high=4,
    step=0,
)
METHOD = Method(
    "a basis that all experts share, nested sign planes, one bit budget for the whole model",
    OPTIONS,
    quantize,
    plan,
    needs,
    survey=Survey(survey, allocate, survey_needs),
)
