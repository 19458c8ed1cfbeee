"""Packed modules: computed from packed buffers, never cast, copied, pickled, and undone."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from tests.packed import integers, projection, signs
from tests.tiny import ARCHITECTURES, tiny_model
from torch import nn

from moebius.models.layout import layout_of, to_module_orientation
from moebius.models.load import describe
from moebius.runtime.packed_experts import PackedExpertsMixin, pack_experts, packed_projections, unpack_experts
from moebius.runtime.packed_linear import PackedWeightMixin, pack_weight, unpack_weight


def packed_experts(name: str, kinds: tuple[str, str]) -> tuple[nn.Module, nn.Module]:
    """An experts module with dense weights, and the same packed."""
    module = describe(tiny_model(name)).moe_layers[0].experts
    layout = layout_of(module)
    assert layout is not None
    generator = torch.Generator().manual_seed(0)
    channels = layout.inner * (2 if layout.has_gate else 1)
    gate_up = projection(generator, (layout.experts, channels, layout.hidden), kinds[0])
    down = projection(generator, (layout.experts, layout.hidden, layout.inner), kinds[1])
    packed = copy.deepcopy(module)
    pack_experts(packed, layout, gate_up, down)
    with torch.no_grad():
        getattr(module, layout.gate_up_name).copy_(to_module_orientation(gate_up.unpack(), layout))
        getattr(module, layout.down_name).copy_(to_module_orientation(down.unpack(), layout))
    return module, packed


def run(module: nn.Module, tokens: int = 13) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, module_hidden(module), generator=generator)
    scores, index = torch.rand(tokens, 8, generator=generator).topk(3)
    with torch.no_grad():
        return module(hidden, index, scores)


def module_hidden(module: nn.Module) -> int:
    layout = layout_of(module)
    return layout.hidden if layout else packed_projections(module)[1].shape[1]


# The kernels round inputs of several tokens more coarsely than those of one.
@pytest.mark.parametrize(("kernel", "close"), [("reference", (1e-5, 1e-5)), ("", (4e-3, 3e-2))])
@pytest.mark.parametrize("kinds", [("plain", "both"), ("right", "left")])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_computes_what_the_dense_module_computes(
    name: str, kinds: tuple[str, str], kernel: str, close: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOEBIUS_KERNEL", kernel)
    dense, packed = packed_experts(name, kinds)
    for tokens, bound in zip((1, 13), close, strict=True):
        wanted, got = run(dense, tokens), run(packed, tokens)
        assert wanted.norm() > 0
        assert (got - wanted).norm() < bound * wanted.norm()


def test_kernels_see_new_weights() -> None:
    _, packed = packed_experts("olmoe", ("plain", "plain"))
    before = run(packed, 3)
    scales = packed.get_submodule("down_proj.factor").get_buffer("row_scales")
    scales.mul_(2)
    assert torch.allclose(run(packed, 3), 2 * before, rtol=1e-5)
    packed.load_state_dict({name: t.clone() for name, t in packed.state_dict().items()}, assign=True)
    packed.get_submodule("down_proj.factor").get_buffer("row_scales").div_(2)
    assert torch.allclose(run(packed, 3), before, rtol=1e-5)


def test_nothing_dense_stays_and_classes_are_kept() -> None:
    dense, packed = packed_experts("olmoe", ("right", "left"))
    assert isinstance(packed, type(dense)) and isinstance(packed, PackedExpertsMixin)
    assert not list(packed.parameters())
    names = set(packed.state_dict())
    assert {"gate_up_proj.factor.codes", "gate_up_proj.right.values", "down_proj.left.codes", "down_proj.factor.signs"} <= names
    stored = sum(8 * t.numel() * t.element_size() for t in packed.state_dict().values())
    assert stored == sum(p.stored_bits() for p in packed_projections(packed))


def test_casting_the_model_does_not_touch_packed_tensors() -> None:
    _, packed = packed_experts("gpt_oss", ("left", "right"))
    before = {name: t.clone() for name, t in packed.state_dict().items()}
    packed.to(torch.bfloat16)
    for name, tensor in packed.state_dict().items():
        if name.endswith("_bias"):
            assert tensor.dtype == torch.bfloat16
        else:
            assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
    assert packed.to("meta").state_dict()["down_proj.factor.scales"].is_meta


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles(duplicate: Any) -> None:
    _, packed = packed_experts("nemotron_h", ("both", "plain"))
    other = duplicate(packed)
    assert type(other) is type(packed) and other is not packed
    assert torch.equal(run(other), run(packed))
    linear = nn.Linear(20, 7)
    pack_weight(linear, integers(torch.Generator().manual_seed(0), 1, 7, 20))
    states = torch.randn(3, 20)
    assert torch.equal(duplicate(linear)(states), linear(states))


def test_experts_come_back() -> None:
    dense, packed = packed_experts("gpt_oss", ("right", "left"))
    assert isinstance(packed, PackedExpertsMixin)
    unpack_experts(packed, dense.gate_up_proj.detach(), dense.down_proj.detach())
    assert type(packed) is type(dense) and layout_of(packed) == layout_of(dense)
    assert packed.state_dict().keys() == dense.state_dict().keys()
    assert packed.__dict__.keys() - dense.__dict__.keys() <= {"_is_hf_initialized"}
    assert torch.equal(run(packed), run(dense))


def test_linear() -> None:
    linear, packed = nn.Linear(20, 7), signs(torch.Generator().manual_seed(0), 1, 7, 20)
    bias = linear.bias.detach().clone()
    pack_weight(linear, packed)
    assert isinstance(linear, nn.Linear) and isinstance(linear, PackedWeightMixin)
    assert set(dict(linear.named_parameters())) == {"bias"}
    states = torch.randn(5, 20)
    torch.testing.assert_close(linear(states), states @ packed.unpack()[0].T + bias)
    linear.to(torch.bfloat16)
    assert linear.weight.dtype == linear.bias.dtype == linear(states.bfloat16()).dtype == torch.bfloat16
    assert linear.row_scales.dtype == torch.float16 and torch.equal(linear.row_scales, packed.row_scales)
    unpack_weight(linear, torch.float32)
    assert type(linear) is nn.Linear and linear.state_dict().keys() == {"weight", "bias"}
    assert torch.equal(linear.weight, packed.unpack()[0])


def test_router() -> None:
    layer = describe(tiny_model("gpt_oss")).moe_layers[0]
    router: Any = layer.router
    packed = signs(torch.Generator().manual_seed(0), 1, *router.weight.shape)
    dense = copy.deepcopy(router)
    dense.weight.data.copy_(packed.unpack()[0])
    pack_weight(router, packed)
    states = torch.randn(9, router.hidden_dim)
    for got, wanted in zip(router(states), dense(states), strict=True):
        assert torch.equal(got, wanted)
