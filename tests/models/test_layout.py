"""The experts of ten architectures are read as (experts, out, in), whatever way they lie."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.tiny import ARCHITECTURES, tiny_model
from torch import nn

from moebius.errors import UnsupportedModelError
from moebius.models.layout import layout_of, read_weights, to_module_orientation
from moebius.models.load import describe


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_reproduce_the_module(name: str) -> None:
    """One token sent to one expert comes out as ``down(gate(gate_up(x)))`` of the matrices that were read."""
    layer = describe(tiny_model(name)).moe_layers[0]
    module: Any = layer.experts
    layout, weights = layer.layout, read_weights(layer.name, layer.experts)
    assert weights.name == layer.name
    assert weights.gate_up.shape == (8, 80 if layout.has_gate else 40, layout.hidden)
    assert weights.down.shape == (8, layout.hidden, 40)
    x = torch.randn(1, layout.hidden, generator=torch.Generator().manual_seed(1))
    expert = 5
    up = x @ weights.gate_up[expert].T
    if layout.has_bias:
        up = up + getattr(module, layout.gate_up_name + "_bias")[expert]
    inner = module._apply_gate(up) if layout.has_gate else module.act_fn(up)
    wanted = inner @ weights.down[expert].T
    if layout.has_bias:
        wanted = wanted + getattr(module, layout.down_name + "_bias")[expert]
    with torch.no_grad():
        got = module(x, torch.tensor([[expert]]), torch.ones(1, 1))
    torch.testing.assert_close(got, wanted.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_orientation_round_trip(name: str) -> None:
    layer = describe(tiny_model(name)).moe_layers[0]
    weights = read_weights(layer.name, layer.experts)
    for parameter, weight in ((layer.layout.gate_up_name, weights.gate_up), (layer.layout.down_name, weights.down)):
        kept = to_module_orientation(weight, layer.layout)
        assert kept.is_contiguous()
        assert torch.equal(kept, layer.experts.get_parameter(parameter))


def test_flags_differ_between_architectures() -> None:
    """The ten are no ten copies of one layout."""
    layouts = {name: describe(tiny_model(name)).moe_layers[0].layout for name in ARCHITECTURES}
    assert [n for n, layout in layouts.items() if layout.is_transposed] == ["gpt_oss"]
    assert [n for n, layout in layouts.items() if layout.has_bias] == ["gpt_oss"]
    assert [n for n, layout in layouts.items() if not layout.is_concatenated] == ["gpt_oss"]
    assert [n for n, layout in layouts.items() if not layout.has_gate] == ["nemotron_h"]
    assert layouts["nemotron_h"].gate_up_name == "up_proj"


def test_other_modules_have_no_layout() -> None:
    assert layout_of(nn.Linear(4, 4)) is None
    with pytest.raises(UnsupportedModelError, match="head: Linear holds no fused experts"):
        read_weights("head", nn.Linear(4, 4))


def test_experts_with_a_norm_of_their_own_are_refused() -> None:
    experts = describe(tiny_model("olmoe")).moe_layers[0].experts
    experts.has_post_expert_norm = True  # type: ignore[assignment]
    with pytest.raises(UnsupportedModelError, match="end in a norm of their own"):
        layout_of(experts)


def test_flags_that_contradict_the_shapes_are_refused() -> None:
    experts = describe(tiny_model("olmoe")).moe_layers[0].experts
    experts.is_transposed = True  # type: ignore[assignment]
    with pytest.raises(UnsupportedModelError, match="to match down_proj"):
        layout_of(experts)
