"""The definition of the expert op against a loop over tokens and their experts, written from the formula."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from tests.packed import projection, signs
from torch import Tensor

from moebius.formats import Packed, PackedProjection
from moebius.formats.codebook import Codebook
from moebius.formats.integers import Integers
from moebius.formats.signs import Signs
from moebius.formats.spectral import Spectral
from moebius.kernels.routed_experts import PackedExperts, reference
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
    got = routed_experts(hidden, index, weights, PackedExperts(gate_up, down, gated, up_bias, down_bias))
    wanted = by_hand(hidden, index, weights, gate_up.unpack().double(), down.unpack().double(), up_bias, down_bias)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()) if tokens else 0)
    none = torch.zeros_like
    without = by_hand(hidden, index, weights, gate_up.unpack().double(), down.unpack().double(), none(up_bias), none(down_bias))
    got = routed_experts(hidden, index, weights, PackedExperts(gate_up, down, gated))
    torch.testing.assert_close(got.double(), without, rtol=1e-4, atol=1e-4 * float(without.abs().max()) if tokens else 0)


def test_only_padding() -> None:
    gate_up, down, hidden, index, weights, *_ = case(("plain", "plain"), 4, 2, False)
    assert not routed_experts(hidden, torch.full_like(index, EXPERTS), weights, PackedExperts(gate_up, down, gated)).any()


def test_keeps_the_dtype_of_the_tokens() -> None:
    gate_up, down, hidden, index, weights, *_ = case(("right", "left"), 9, 2, False)
    exact = routed_experts(hidden, index, weights, PackedExperts(gate_up, down, gated))
    half = routed_experts(hidden.bfloat16(), index, weights.bfloat16(), PackedExperts(gate_up, down, gated))
    assert half.dtype == torch.bfloat16
    assert (half - exact).norm() < 0.02 * exact.norm()


def test_gradients_reach_the_tokens() -> None:
    gate_up, down, hidden, index, weights, *_ = case(("right", "left"), 9, 2, False)
    probe, direction = torch.randn(9, HIDDEN), torch.randn(9, HIDDEN)
    hidden.requires_grad_()
    routed_experts(hidden, index, weights, PackedExperts(gate_up, down, gated)).backward(probe)
    assert hidden.grad is not None
    with torch.no_grad():
        step = 1e-3 * direction
        ahead, behind = (
            routed_experts(h, index, weights, PackedExperts(gate_up, down, gated)) for h in (hidden + step, hidden - step)
        )
    wanted = float(((ahead - behind) * probe).sum()) / 2e-3
    assert float((hidden.grad * direction).sum()) == pytest.approx(wanted, rel=1e-2)


FORMATS = {
    "integers": lambda g: many_integers(g, 3, zeros=False),
    "integers, zero points": lambda g: many_integers(g, 4, zeros=True),
    "codebook": lambda g: codebook(g),
    "codebook, shared": lambda g: codebook(g).with_shared(torch.randn(MANY, SIDE, 4), torch.randn(4, SIDE)),
    "spectral": lambda g: spectral(g, False),
    "spectral, transposed": lambda g: spectral(g, True),
    "signs": lambda g: signs(g, MANY, SIDE, SIDE),
}
MANY, SIDE = 12, 256  # a batch of 12 matrices, 3 MiB in float32


def many_integers(generator: torch.Generator, bits: int, zeros: bool) -> Integers:
    codes = torch.randint(0, 2**bits, (MANY, SIDE, SIDE), generator=generator)
    points = torch.randint(0, 2**bits, (MANY, SIDE, 4), generator=generator) if zeros else None
    return Integers.pack(codes, torch.rand(MANY, SIDE, 4, generator=generator), points, bits=bits, group_size=80)


def codebook(generator: torch.Generator) -> Codebook:
    codes = torch.randint(0, 256, (MANY, SIDE, SIDE // 4), generator=generator)
    return Codebook.pack(codes, torch.randn(MANY, 256, 4, generator=generator), SIDE)


def spectral(generator: torch.Generator, transposed: bool) -> Spectral:
    widths = torch.randint(0, 9, (MANY, SIDE), generator=generator)
    codes = (torch.rand(MANY, SIDE, SIDE, generator=generator) * 2 ** widths.unsqueeze(2)).floor().long()
    blank = Spectral(MANY, SIDE, SIDE, transposed, 80)
    size = sum(blank.record_bytes(width) for width in widths.flatten().tolist())
    return blank.replace(payload_bytes=size).fill(widths, codes, torch.rand(MANY, SIDE, 4, generator=generator))


@pytest.mark.parametrize("kind", FORMATS)
def test_memory_is_that_of_a_few_experts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many are chosen: one at a time here, into one place, with what unpacking it takes in between."""
    generator = torch.Generator().manual_seed(0)
    packed = FORMATS[kind](generator)
    projection, places = PackedProjection(packed), list[Tensor]()
    monkeypatch.setattr(reference, "_UNPACKED_WEIGHTS", SIDE * SIDE)
    unpack_to = type(packed).unpack_to

    def watched(self: Packed, out: Tensor, index: Tensor | None = None) -> None:
        assert index is not None and out.is_contiguous()
        places.append(out)  # kept, so that no other memory can have this address
        unpack_to(self, out, index)

    monkeypatch.setattr(type(packed), "unpack_to", watched)
    hidden, index = torch.randn(MANY, SIDE, generator=generator), torch.arange(MANY).unsqueeze(1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        routed_experts(hidden, index, torch.ones(MANY, 1), PackedExperts(projection, projection, torch.tanh))
    assert len(places) == 2 * MANY and {(len(out), out.data_ptr()) for out in places} == {(1, places[0].data_ptr())}
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = list(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    assert SIDE * SIDE * 4 < max(held) < 3 * SIDE * SIDE * 4


def test_unpacks_only_what_tokens_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    gate_up, down, hidden, _, weights, *_ = case(("plain", "plain"), 5, 2, False)
    seen: list[int] = []
    unpack_to = Signs.unpack_to

    def watched(self: Signs, out: Tensor, index: Tensor | None = None) -> None:
        assert index is not None, "the whole layer was unpacked"
        seen.extend(index.tolist())
        unpack_to(self, out, index)

    monkeypatch.setattr(Signs, "unpack_to", watched)
    routed_experts(hidden, torch.tensor([[4, 1]] * 5), weights, PackedExperts(gate_up, down, gated))
    assert sorted(seen) == [1, 1, 4, 4]
