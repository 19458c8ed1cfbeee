"""Linear layers outside the experts: which are packed, and what rounding does to them."""

from __future__ import annotations

import pytest
import torch
from tests.tiny import ARCHITECTURES, tiny_model
from torch import Generator, nn

from moebius.formats.bits import pack, unpack
from moebius.methods.linear import packed_linears, plan_linear, quantize_linear
from moebius.models.load import describe
from moebius.quantize.integers import round_symmetrically
from moebius.recipe import Recipe


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_everything_but_experts_routers_and_single_outputs_is_packed(name: str) -> None:
    moe = describe(tiny_model(name))
    packed = packed_linears(moe, Recipe.make("rtn", rest="int8"))
    assert set(packed.values()) == {8} and "lm_head" in packed
    routers = {layer.router_name for layer in moe.moe_layers}
    for path, module in moe.model.named_modules():
        if isinstance(module, nn.Linear):
            left_out = path in routers or module.out_features == 1
            assert (path in packed) is not left_out, path
    assert packed_linears(moe, Recipe.make("rtn")) == {}


def test_a_head_that_is_tied_to_the_embeddings_stays() -> None:
    moe = describe(tiny_model("olmoe", tie_word_embeddings=True))
    packed = packed_linears(moe, Recipe.make("rtn", rest="int4"))
    assert packed and "lm_head" not in packed


def test_bits_of_their_own_come_first() -> None:
    moe = describe(tiny_model("qwen2_moe"))
    packed = packed_linears(moe, Recipe.make("rtn", rest="int8", shared_experts=4))
    assert {packed[name] for name in moe.shared_experts} == {4}
    assert {packed[name] for name in moe.dense_mlps} == {8}


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("shape", [(70, 300), (7, 40)])
def test_layers_are_rounded_as_planned(bits: int, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=Generator().manual_seed(0))
    packed = quantize_linear(weight, bits)
    packed.check("layer")
    assert packed.spec() == plan_linear(shape, bits).spec()
    assert packed.tensors()["scales"].shape == (1, shape[0], 1 if bits == 8 else -(-shape[1] // 64))
    assert (packed.unpack()[0] - weight).norm() / weight.norm() < 2 / (2**bits - 1)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_no_code_is_nearer_and_no_wider_span_errs_less(bits: int) -> None:
    weight = torch.randn(1, 6, 96, generator=Generator().manual_seed(bits))
    rounded = round_symmetrically(weight, bits, 32)
    values, most = rounded.matrix(), 2**bits - 1
    for step in (-1, 1):
        other = (rounded.codes.float() + step).clamp(0, most)
        spread = rounded.scales.repeat_interleave(32, dim=2)
        assert ((values - weight).abs() <= ((other - most / 2) * spread - weight).abs() + 1e-6).all()
    error = (values - weight).square().unflatten(2, (3, 32)).sum(3)
    whole = (weight.unflatten(2, (3, 32)).abs().amax(3) * 2 / most).half().float()
    clipped = (weight / whole.repeat_interleave(32, 2) + most / 2).round().clamp(0, most) - most / 2
    plain = (clipped * whole.repeat_interleave(32, 2) - weight).square().unflatten(2, (3, 32)).sum(3)
    assert (error <= plain * 1.0001).all()


def test_zeros_stay_finite() -> None:
    assert torch.equal(quantize_linear(torch.zeros(3, 130), 4).unpack(), torch.zeros(1, 3, 130))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 3, 8, 31, 65])
def test_packed_codes_come_back(bits: int, columns: int) -> None:
    codes = torch.randint(0, 2**bits, (2, 3, columns), generator=Generator().manual_seed(bits))
    assert torch.equal(unpack(pack(codes, bits), bits, columns).long(), codes)
