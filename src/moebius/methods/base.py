"""What a method is, and what several methods share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from moebius.formats.base import Packed, concatenate
from moebius.formats.projection import PackedProjection
from moebius.linalg.hessian import conditioned
from moebius.options import MethodOptions
from moebius.recipe import Recipe
from moebius.types import CalibrationNeeds, ProjectionStats

# Hessians and their factors take a handful of float32 copies of (experts, in, in); this bounds one of them.
_CHUNK_BYTES = 1 << 27


def no_left_factor(weight: Tensor, recipe: Recipe, projection: str) -> Tensor | None:
    """For methods whose expert factors put out what the experts put out."""
    return None


@dataclass(frozen=True)
class Survey:
    """How a method surveys a whole model before it quantizes the first layer.

    Attributes:
        survey: as ``Method.quantize``, to what must be remembered of the projection: tensors by name, kept on disk.
        allocate: from what was remembered of every projection of every layer, in order, to what each is given, in the same
            order. Tensors are read when they are asked for.
        needs: as ``Method.needs``, of ``survey``.
    """

    survey: Callable[[Tensor, ProjectionStats, Recipe, str], dict[str, Tensor]]
    allocate: Callable[[Sequence[Mapping[str, Tensor]], Recipe], list[dict[str, Tensor]]]
    needs: Callable[[Recipe], CalibrationNeeds]


@dataclass(frozen=True)
class Method:
    """One way to quantize the experts of a projection.

    Attributes:
        summary: what it is, in a few words.
        options: what it reads of a recipe, and the bits it has.
        quantize: from weights (experts, out, in) of any float type, statistics (None where nothing is needed), recipe
            and projection (``"gate_up"`` or ``"down"``) to what is stored.
        plan: from the shape (experts, out, in), recipe and projection to what ``quantize`` would return, with tensors on the
            meta device.
        needs: what a recipe wants of calibration.
        left_factor: the shared left factor ``A`` (out, rank) of these weights where the expert factors sit behind one, so
            that calibration can gather ``Aᵀδ``; None elsewhere.
        survey: for methods that survey the whole model first. Their ``quantize`` takes ``seen``, what was remembered of
            the projection, and ``share``, what it was given.
    """

    summary: str
    options: MethodOptions
    quantize: Callable[..., PackedProjection]
    plan: Callable[[tuple[int, int, int], Recipe, str], PackedProjection]
    needs: Callable[[Recipe], CalibrationNeeds]
    left_factor: Callable[[Tensor, Recipe, str], Tensor | None] = no_left_factor
    survey: Survey | None = None

    def all_needs(self, recipe: Recipe) -> CalibrationNeeds:
        """What calibration must gather for the survey and for quantization together."""
        own = self.needs(recipe)
        return own if self.survey is None else own | self.survey.needs(recipe)


def in_chunks(experts: int, inputs: int, quantize: Callable[[slice], Packed]) -> Packed:
    """Quantize some experts at a time, so that their Hessians fit into memory, and put the parts together.

    Args:
        experts: how many there are.
        inputs: width of their Hessians.
        quantize: called with slices that cover the experts in order.
    """
    return concatenate([quantize(chunk) for chunk in chunks(experts, inputs)])


def conditioned_moments(stats: ProjectionStats, chunk: slice, recipe: Recipe, layer: Tensor | None) -> Tensor:
    """Hessians of some experts, shrunk towards ``layer``, the mean of all, and damped as the recipe has it. (some, in, in)"""
    return conditioned(stats.second_moment[chunk], shrinkage=recipe.shrinkage, damping=recipe.damping, layer=layer)


def chunks(experts: int, inputs: int) -> list[slice]:
    """Slices that cover the experts in order, each with as many as have Hessians that fit into memory."""
    step = max(1, _CHUNK_BYTES // (4 * inputs * inputs))
    return [slice(start, min(start + step, experts)) for start in range(0, experts, step)]
