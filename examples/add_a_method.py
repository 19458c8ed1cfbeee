"""A method of one's own, from outside of the package: round to nearest with the largest entries of every row clipped.

usage: python examples/add_a_method.py [MODEL [OUT]]      without a model: the reference model of this package

From then on it is a method like the others: in recipes, plans, comparisons, and on the command line of a process that imports
this file.
"""

from __future__ import annotations

import sys

from torch import Tensor

import moebius
from moebius.formats import PackedProjection
from moebius.formats.base import empty_like_spec
from moebius.formats.integers import Integers
from moebius.methods.base import Method
from moebius.options import MethodOptions, Option
from moebius.quantize.integers import round_to_nearest, whole_rows
from moebius.recipe import Recipe
from moebius.table import METHODS
from moebius.types import CalibrationNeeds, ProjectionStats

GROUP_SIZE = 128
CLIP = Option("clip", 0.9, "Share of a row's largest entry from which on entries are clipped.", low=0.1, high=1.0)


def quantize(weight: Tensor, stats: ProjectionStats | None, recipe: Recipe, projection: str) -> PackedProjection:
    """From weights (experts, out, in) to what is stored."""
    limit = weight.float().abs().amax(2, keepdim=True) * recipe.clip
    clipped = weight.float().clamp(-limit, limit)
    return PackedProjection(round_to_nearest(clipped, int(recipe.bits), whole_rows(GROUP_SIZE, weight.shape[2])).pack())


def plan(shape: tuple[int, int, int], recipe: Recipe, projection: str) -> PackedProjection:
    """What ``quantize`` stores for matrices of this shape, without having them."""
    group_size = whole_rows(GROUP_SIZE, shape[2])
    return PackedProjection(empty_like_spec(Integers(*shape, int(recipe.bits), group_size, recipe.bits > 1).spec()))


def needs(recipe: Recipe) -> CalibrationNeeds:
    """It looks at no text."""
    return CalibrationNeeds()


OPTIONS = MethodOptions((CLIP,), default_bits=4, low=2, high=8)
METHODS.register("clipped", Method("round to nearest, clipped", OPTIONS, quantize, plan, needs))


def main(model: str | None = None, out: str = "clipped") -> None:
    packed = moebius.quantize(model, out, method="clipped", bits=4, clip=0.8)
    result = moebius.evaluate(packed.folder, reference=model or moebius.reference_path(), windows=8)
    print(f"{packed.size.bits_per_expert_weight:.2f} bits, perplexity {result.perplexity:.2f}, KL {result.kl:.4f} nats")


if __name__ == "__main__":
    main(*sys.argv[1:])
