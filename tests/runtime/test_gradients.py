"""Gradients through packed modules are those of the same weights unpacked, and graphs see the weights that are there."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.packed import integers, save_packed_tiny
from tests.runtime.test_packed_modules import packed_experts
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import moebius
from moebius.errors import ShapeError, UnsupportedModelError
from moebius.runtime.attention import attend, use_single_query_attention
from moebius.runtime.packed_linear import pack_weight


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts, a router and dense MLPs packed."""
    return save_packed_tiny("qwen2_moe", tmp_path_factory.mktemp("gradients"), everything=True)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def loss_and_gradients(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    ids = torch.randint(0, 257, (2, 12), generator=torch.Generator().manual_seed(0))
    states = model.get_input_embeddings()(ids).detach().requires_grad_()
    model.zero_grad()
    loss = model(inputs_embeds=states).logits.square().mean()
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), {"inputs": states.grad, **found}


@pytest.mark.parametrize("kernel", ["", "reference"])
def test_gradients_are_those_of_the_unpacked_weights(packed: Path, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEBIUS_KERNEL", kernel)
    model = load(packed)
    with torch.no_grad():
        model(input_ids=torch.arange(9)[None])  # the kernels are ready before gradients are asked for
    loss, got = loss_and_gradients(model)
    wanted_loss, wanted = loss_and_gradients(moebius.dequantize(load(packed)))
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-4, atol=0)
    for name, gradient in got.items():
        assert (gradient - wanted[name]).norm() < 1e-3 * wanted[name].norm(), name
    assert got["model.layers.0.post_attention_layernorm.weight"].norm() > 0


def test_routing_weights_and_biases_have_gradients_where_the_hidden_state_has_none() -> None:
    dense, experts = packed_experts("gpt_oss", ("right", "left"))
    index = torch.tensor([[0, 3], [2, 3], [7, 1]])
    gradients = []
    for module in (dense, experts):
        weights = torch.rand(3, 2, generator=torch.Generator().manual_seed(1)).requires_grad_()
        module.down_proj_bias.requires_grad_()
        hidden = torch.randn(3, 48, generator=torch.Generator().manual_seed(2))
        module(hidden, index, weights).square().sum().backward()
        gradients.append((weights.grad, module.down_proj_bias.grad))
    for wanted, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


def test_a_compiled_model_computes_with_the_experts_of_each_layer(packed: Path) -> None:
    model, ids = load(packed), torch.arange(9)[None]
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-5)
        scales = model.model.layers[2].mlp.experts.get_submodule("down_proj.factor").get_buffer("row_scales")
        scales.mul_(2)
        changed = model(input_ids=ids).logits
        assert (changed - wanted).norm() > 1e-2 * wanted.norm()
        torch.testing.assert_close(compiled(input_ids=ids).logits, changed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "write",
    [
        lambda linear: linear.weight.data.add_(1),
        lambda linear: linear.weight.add_(1),
        lambda linear: linear.weight.__setitem__(0, 1.0),
        lambda linear: linear.weight.detach().mul_(2),
        lambda linear: setattr(linear.weight, "data", torch.zeros(7, 20)),
        lambda linear: torch.add(linear.weight, 1, out=linear.weight),
        lambda linear: nn.init.zeros_(linear.weight),
    ],
)
def test_a_write_to_the_weight_of_a_packed_layer_is_refused(write: Any) -> None:
    linear = nn.Linear(20, 7)
    pack_weight(linear, integers(torch.Generator().manual_seed(0), 1, 7, 20))
    before = linear(torch.ones(1, 20))
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match=r"would be lost.*dequantize"):
        write(linear)
    weight = linear.weight
    assert torch.equal(linear(torch.ones(1, 20)), before) and type(weight + 1) is Tensor and torch.equal(weight, linear.weight)


def test_inputs_of_another_width_are_refused() -> None:
    linear = nn.Linear(20, 7)
    pack_weight(linear, integers(torch.Generator().manual_seed(0), 1, 7, 20))
    with pytest.raises(ShapeError, match=r"got inputs \(3, 24\), wanted \(\.\.\., 20\)"):
        linear(torch.ones(3, 24))


def test_an_adapter_trains_beside_packed_experts_and_is_not_merged_into_packed_layers(packed: Path) -> None:
    peft = pytest.importorskip("peft")
    model = load(packed)
    before = copy.deepcopy(model.state_dict())
    config = peft.LoraConfig(target_modules=["q_proj", "gate_proj"], r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    ids = torch.randint(0, 257, (2, 12), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = adapted(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    with pytest.raises(UnsupportedModelError, match="would be lost"):
        adapted.merge_and_unload()
    assert all(torch.equal(before[name], t) for name, t in load(packed).state_dict().items())


def test_only_attention_that_is_known_is_renamed(packed: Path) -> None:
    model = load(packed)
    model.config.model_type = "deepseek_v32"
    use_single_query_attention(model)
    assert model.config._attn_implementation == "sdpa"
    model.config.model_type = "qwen2_moe"
    use_single_query_attention(model)
    assert model.config._attn_implementation == "moebius_sdpa"


def test_options_that_change_attention_are_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def theirs(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> tuple[Tensor, None]:
        seen.append(options)
        return query, None

    monkeypatch.setattr("moebius.runtime.attention.sdpa_attention_forward", theirs)
    states = torch.randn(1, 2, 5, 4)
    attend(nn.Identity(), states[:, :, :1], states, states, None, scaling=0.5, dropout=0.0, sliding_window=None)
    assert not seen
    attend(nn.Identity(), states[:, :, :1], states, states, None, scaling=0.5, sinks=torch.zeros(2))
    assert list(seen[0]) == ["scaling", "sinks"]
