"""Calls with anything in them: the compiled kernels give what the definition gives, or both refuse in the same words."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from tests.kernels.test_agreement import Layer, gated, integers, mobie_layer, moebius_layer, needs_build
from torch import Generator, Tensor

from moebius.errors import MoebiusError, ShapeError
from moebius.formats import Packed
from moebius.formats.integers import Integers
from moebius.kernels import packed_linear
from moebius.kernels.routed_experts import PackedExperts, Run, cpu, reference

pytestmark = needs_build

HIDDEN, CALLS = 65, 150
FLOATS = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: Those that no kernel takes are as likely as not in one call of four.
ODD = (torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn)
INDICES = (torch.int64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.float32)


class Dice:
    """Random choices, the same for a seed."""

    def __init__(self, seed: int) -> None:
        self.generator = Generator().manual_seed(seed)

    def below(self, count: int) -> int:
        return int(torch.randint(0, count, (), generator=self.generator))

    def once_in(self, count: int) -> bool:
        return self.below(count) == 0

    def of(self, *choices: object) -> object:
        return choices[self.below(len(choices))]

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def floats(self, tensor: Tensor) -> Tensor:
        kind = self.of(*(ODD if self.once_in(12) else FLOATS))
        assert isinstance(kind, torch.dtype)
        return tensor.to(kind)

    def layout(self, tensor: Tensor) -> Tensor:
        """The same values somewhere else in memory, or the wrong number of dimensions."""
        lying: Callable[[Tensor], Tensor] = self.of(  # type: ignore[assignment]
            lambda t: t,
            lambda t: t,
            lambda t: t.mT.contiguous().mT,
            lambda t: t.repeat_interleave(2, -1)[..., ::2],
            lambda t: torch.cat([t, t])[len(t) :],
            lambda t: t.unsqueeze(0) if self.once_in(3) else t,
            lambda t: t.flatten() if self.once_in(3) else t,
        )
        return lying(tensor)


def call_of(dice: Dice) -> tuple[Tensor, Tensor, Tensor]:
    tokens = [0, 1, 2, 9, 40][dice.below(5)]
    top_k = [0, 1, 2, 3, 7][dice.below(5)]
    width = HIDDEN if not dice.once_in(6) else [0, 1, 64, 66, 130][dice.below(5)]
    hidden = dice.randn(tokens, width) * 10.0 ** (dice.below(3) - 3)  # a gate far out would magnify what is rounded
    index = torch.randint(-2, 8, (tokens, top_k), generator=dice.generator)
    if dice.once_in(3):
        index = index.clamp(0, 4)
    if dice.once_in(8):
        index[dice.below(tokens) if tokens else slice(0)] = dice.of(2**62, -(2**63), 2**31, 2**32, 255)
    weights = dice.randn(tokens, top_k).abs()
    if dice.once_in(8):
        weights = [weights[:, :-1], weights[:-1], weights.repeat(1, 2), weights.mT.contiguous()][dice.below(4)]
    kind = dice.of(*INDICES)
    assert isinstance(kind, torch.dtype)
    return dice.layout(dice.floats(hidden)), dice.layout(index.to(kind)), dice.layout(dice.floats(weights))


def outcome(run: Callable[[], Tensor]) -> Tensor | tuple[type, str]:
    try:
        return run()
    except MoebiusError as error:
        return type(error), str(error)


def check(got: Tensor | tuple[type, str], wanted: Tensor | tuple[type, str], close: float) -> bool:
    """Whether there was a result."""
    if isinstance(wanted, tuple) or isinstance(got, tuple):
        assert got == wanted and isinstance(wanted, tuple) and wanted[0] is ShapeError
        return False
    assert got.shape == wanted.shape and got.dtype == wanted.dtype
    if wanted.numel() and wanted.isfinite().all():
        assert (got.double() - wanted.double()).norm() <= close * wanted.double().norm() + 1e-30
    return True


@cache
def experts_of(kind: str, one_call: bool) -> tuple[PackedExperts, Run]:
    generator = Generator().manual_seed(0)
    layer: Layer = moebius_layer(generator, HIDDEN, 31, 63, 3)
    if kind == "signs":
        layer = mobie_layer(generator, HIDDEN, 31, "output", 5)
    if one_call:
        experts = PackedExperts(*layer, gated)
    else:
        experts = PackedExperts(*layer, lambda states: 2 * gated(states), torch.randn(5, 62), torch.randn(5, HIDDEN))
    run = cpu.prepare(experts)
    assert (run.compiled is not None) == one_call
    return experts, run


@pytest.mark.parametrize("one_call", [True, False])
@pytest.mark.parametrize("kind", ["planes", "signs"])
@pytest.mark.parametrize("seed", range(2))
def test_experts(kind: str, seed: int, one_call: bool) -> None:
    experts, run = experts_of(kind, one_call)
    dice, ran = Dice(seed), 0
    for _ in range(CALLS):
        call = call_of(dice)
        wanted = outcome(lambda call=call: reference.routed_experts(*call, experts))  # type: ignore[misc]
        ran += check(outcome(lambda call=call: run(*call)), wanted, 0.1)  # type: ignore[misc]
    assert CALLS / 8 < ran < CALLS  # both happen


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("seed", range(2))
def test_linear_layers(bits: int, seed: int) -> None:
    generator = Generator().manual_seed(0)
    weight: Packed = integers(generator, 31, HIDDEN)
    if bits == 4:
        codes = torch.randint(0, 16, (1, 31, HIDDEN), generator=generator)
        weight = Integers.pack(codes, torch.rand(1, 31, 3, generator=generator) + 0.1, None, bits=4, group_size=32)
    run, dice, ran = packed_linear.prepare(weight), Dice(seed), 0
    assert type(run).__name__ == "CpuLinear"
    for _ in range(CALLS):
        inputs = call_of(dice)[0]
        wanted = outcome(lambda inputs=inputs: packed_linear.reference.packed_linear(inputs, weight))  # type: ignore[misc]
        ran += check(outcome(lambda inputs=inputs: run(inputs)), wanted, 0.05)  # type: ignore[misc]
    assert CALLS / 8 < ran < CALLS
