"""Random contents are valid in every format that a method stores, and take what the plan says."""

from __future__ import annotations

import pytest
import torch
from torch import Generator

from moebius.errors import ShapeError
from moebius.formats.base import empty_like_spec
from moebius.formats.random_contents import random_contents, random_projection
from moebius.methods import METHODS
from moebius.recipe import Recipe

EXPERTS, OUT, IN = 6, 80, 56


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("projection", ["gate_up", "down"])
def test_of_every_method(method: str, projection: str) -> None:
    bits = 4 if method == "bitsmoe" else None
    blank = METHODS[method].plan((EXPERTS, OUT, IN), Recipe.make(method, bits), projection)
    packed = random_projection(blank, Generator().manual_seed(0))
    packed.check("layer")
    assert packed.spec() == blank.spec() and packed.stored_bits() == blank.stored_bits()
    weights = packed.unpack()
    assert weights.shape == (EXPERTS, OUT, IN)
    assert weights.isfinite().all() and weights.abs().max() < 1e3
    assert all(weights[expert].any() for expert in range(EXPERTS))
    assert not torch.equal(weights[0], weights[1])


def test_same_seed_same_bytes() -> None:
    blank = METHODS["moebius"].plan((EXPERTS, OUT, IN), Recipe.make("moebius"), "down")
    first, second, other = (random_projection(blank, Generator().manual_seed(seed)).tensors() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["factor.signs"], other["factor.signs"])


def test_planes_without_widths_are_refused() -> None:
    factor = METHODS["moebius"].plan((EXPERTS, OUT, IN), Recipe.make("moebius"), "down").factor
    with pytest.raises(ShapeError, match="widths without values"):
        random_contents(empty_like_spec(factor.spec()), Generator())
