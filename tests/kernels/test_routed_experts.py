"""The definition of the expert op against a loop over tokens and their experts, written from the formula."""

from __future__ import annotations

import pytest
import torch
from tests.packed import projection
from torch import Tensor

from moebius.formats import PackedProjection
from moebius.formats.signs import Signs
from moebius.kernels.routed_experts import reference
from moebius.kernels.routed_experts.reference import routed_experts

EXPERTS, HIDDEN, INNER = 6, 20, 12


def gated(states: Tensor) -> Tensor:
    assert states.ndim == 2
    return torch.nn.functional.silu(states[:, :INNER]) * states[:, INNER:]


def by_hand(
    hidden: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, up_bias: Tensor, down_bias: Tensor
) -> Tensor:
    result = torch.zeros_like(hidden, dtype=torch.float64)
    for token in range(len(hidden)):
        for expert, weight in zip(index[token].tolist(), weights[token].double(), strict=True):
            if expert < EXPERTS:
                inner = gated((gate_up[expert] @ hidden[token].double() + up_bias[expert])[None])[0]
                result[token] += weight * (down[expert] @ inner + down_bias[expert])
    return result


def case(
    kinds: tuple[str, str], tokens: int, top_k: int, padding: bool
) -> tuple[PackedProjection, PackedProjection, Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens + top_k)
    gate_up = projection(generator, (EXPERTS, 2 * INNER, HIDDEN), kinds[0])
    down = projection(generator, (EXPERTS, HIDDEN, INNER), kinds[1])
    # Lopsided on purpose: the first experts get most of the tokens, the last one none.
    scores = torch.rand(tokens, EXPERTS - 1, generator=generator) * torch.tensor([8.0, 4.0, 1.0, 1.0, 0.5])
    index = scores.topk(top_k).indices
    if padding:
        index[::3, -1] = EXPERTS
    weights = torch.rand(tokens, top_k, generator=generator)
    hidden = torch.randn(tokens, HIDDEN, generator=generator)
    biases = torch.randn(EXPERTS, 2 * INNER, generator=generator), torch.randn(EXPERTS, HIDDEN, generator=generator)
    return gate_up, down, hidden, index, weights, *biases


@pytest.mark.parametrize("kinds", [("plain", "plain"), ("right", "left"), ("left", "right"), ("both", "both")])
@pytest.mark.parametrize(("tokens", "top_k", "padding"), [(1, 2, False), (17, 3, False), (40, 5, True), (0, 2, False)])
@pytest.mark.parametrize("budget", [1, 1 << 22])
def test_equals_the_formula(
    kinds: tuple[str, str], tokens: int, top_k: int, padding: bool, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_UNPACKED_WEIGHTS", budget)
    gate_up, down, hidden, index, weights, up_bias, down_bias = case(kinds, tokens, top_k, padding)
    got = routed_experts(hidden, index, weights, gate_up, down, gated, up_bias, down_bias)
    wanted = by_hand(hidden, index, weights, gate_up.unpack().double(), down.unpack().double(), up_bias, down_bias)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()) if tokens else 0)
    none = torch.zeros_like
    without = by_hand(hidden, index, weights, gate_up.unpack().double(), down.unpack().double(), none(up_bias), none(down_bias))
    got = routed_experts(hidden, index, weights, gate_up, down, gated)
    torch.testing.assert_close(got.double(), without, rtol=1e-4, atol=1e-4 * float(without.abs().max()) if tokens else 0)


def test_only_padding() -> None:
    gate_up, down, hidden, index, weights, *_ = case(("plain", "plain"), 4, 2, False)
    assert not routed_experts(hidden, torch.full_like(index, EXPERTS), weights, gate_up, down, gated).any()


def test_keeps_the_dtype_of_the_tokens() -> None:
    gate_up, down, hidden, index, weights, *_ = case(("right", "left"), 9, 2, False)
    exact = routed_experts(hidden, index, weights, gate_up, down, gated)
    half = routed_experts(hidden.bfloat16(), index, weights.bfloat16(), gate_up, down, gated)
    assert half.dtype == torch.bfloat16
    assert (half - exact).norm() < 0.02 * exact.norm()


def test_unpacks_only_what_tokens_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    gate_up, down, hidden, _, weights, *_ = case(("plain", "plain"), 5, 2, False)
    seen: list[int] = []
    unpack = Signs.unpack

    def watched(self: Signs, index: Tensor | None = None) -> Tensor:
        assert index is not None, "the whole layer was unpacked"
        seen.extend(index.tolist())
        return unpack(self, index)

    monkeypatch.setattr(Signs, "unpack", watched)
    routed_experts(hidden, torch.tensor([[4, 1]] * 5), weights, gate_up, down, gated)
    assert sorted(seen) == [1, 1, 4, 4]
