"""Packed tensors that are written to after a first run, in every way there is: what comes next computes from what they hold."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.kernels.test_agreement import planes
from tests.packed import projection
from tests.runtime.test_direct import needs_kernels, packed
from tests.runtime.test_packed_modules import module_hidden, packed_experts
from tests.tiny import tiny_model
from torch import Tensor, nn

from moebius import native
from moebius.errors import CheckpointError
from moebius.formats.dense import Dense
from moebius.formats.integers import Integers
from moebius.kernels.cpu_factors import kernel_of
from moebius.models.layout import layout_of
from moebius.models.load import describe
from moebius.runtime.direct import DirectForward, direct_forward
from moebius.runtime.generation import Session
from moebius.runtime.packed_experts import PackedExpertsMixin, pack_experts
from moebius.runtime.packed_linear import pack_weight


def by_numpy(module: nn.Module, name: str, tensor: Tensor, values: Tensor) -> None:
    tensor.detach().numpy()[...] = values.numpy()


def by_state_dict(module: nn.Module, name: str, tensor: Tensor, values: Tensor) -> None:
    module.load_state_dict({**module.state_dict(), name: values})


def by_data(module: nn.Module, name: str, tensor: Tensor, values: Tensor) -> None:
    tensor.data = values


def by_owner(module: nn.Module, name: str, tensor: Tensor, values: Tensor) -> None:
    path, _, last = name.rpartition(".")
    owner = module.get_submodule(path)
    (owner._buffers if last in owner._buffers else owner._parameters)[last] = values  # type: ignore[assignment]


WRITES: dict[str, Callable[[nn.Module, str, Tensor, Tensor], Any]] = {
    "a write to .data": lambda module, name, tensor, values: tensor.data.copy_(values),
    "copy_": lambda module, name, tensor, values: tensor.detach().copy_(values),
    "other .data": by_data,
    "set_": lambda module, name, tensor, values: tensor.detach().set_(values) if tensor.requires_grad else tensor.set_(values),
    "NumPy": by_numpy,
    "a state dict": by_state_dict,
    "another tensor": by_owner,
}
#: Say where others lie: not any value will do.
PLACES = ("widths", "salient_mask")


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: t for name, t in [*module.named_buffers(), *module.named_parameters()] if name.split(".")[-1] not in PLACES}


def others(tensor: Tensor) -> Tensor:
    """Values as good as these."""
    tensor = tensor.detach()
    return torch.where(tensor == 0, 0.25, tensor * 0.9) if tensor.is_floating_point() else tensor ^ 1


def check_writes(module: Any, given: tuple[Tensor, ...]) -> int:
    """Every tensor of a module, in every way, against a copy that no kernel has seen before."""
    count = 0
    for name in tensors_of(module):
        for way, write in WRITES.items():
            before = module(*given)
            tensor = tensors_of(module)[name]
            write(module, name, tensor, others(tensor))
            got, wanted = module(*given), copy.deepcopy(module)(*given)
            assert torch.equal(got, wanted), (name, way)
            count += not torch.equal(got, before)
    return count


@pytest.fixture(params=["reference", *native.levels()[:1]])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MOEBIUS_KERNEL", "reference" if request.param == "reference" else "cpu")
    return str(request.param)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 20])
def test_experts_of_planes(backend: str, tokens: int, tmp_path: Path) -> None:
    model = packed("olmoe", tmp_path)
    experts = next(module for module in model.modules() if isinstance(module, PackedExpertsMixin))
    given = torch.randn(tokens, 48), torch.randint(0, 8, (tokens, 2)), torch.rand(tokens, 2)
    assert check_writes(experts, given) > 50


@torch.no_grad()
@pytest.mark.parametrize(("name", "kinds"), [("gpt_oss", ("plain", "both")), ("olmoe", ("plain", "left"))])
def test_experts_of_signs_and_their_biases(backend: str, name: str, kinds: tuple[str, str]) -> None:
    _, experts = packed_experts(name, kinds)
    for bias in experts.parameters():
        bias.normal_()
    hidden = module_hidden(experts)
    assert check_writes(experts, (torch.randn(3, hidden), torch.randint(0, 8, (3, 2)), torch.rand(3, 2))) > 50


@torch.no_grad()
@pytest.mark.parametrize("name", ["olmoe", "gpt_oss"])
def test_biases_that_are_packed(backend: str, name: str) -> None:
    """Alone, and beside biases of the module's own, of which a kernel holds the sum."""
    module = describe(tiny_model(name)).moe_layers[0].experts
    layout = layout_of(module)
    assert layout is not None
    generator = torch.Generator().manual_seed(0)
    gate_up = projection(generator, (layout.experts, 2 * layout.inner, layout.hidden), "plain")
    down = projection(generator, (layout.experts, layout.hidden, layout.inner), "plain")
    bias = Dense.pack(torch.randn(layout.experts, 1, layout.hidden, generator=generator))
    pack_experts(module, layout, gate_up, replace(down, bias=bias))
    given = torch.randn(3, layout.hidden), torch.randint(0, 8, (3, 2)), torch.rand(3, 2)
    assert "down_proj.bias.values" in tensors_of(module)
    assert check_writes(module, given) > 40


@torch.no_grad()
@pytest.mark.parametrize(("bits", "group"), [(8, 64), (4, 32)])
@pytest.mark.parametrize("count", [1, 40])
def test_linear_layers(backend: str, bits: int, group: int, count: int) -> None:
    generator, linear = torch.Generator().manual_seed(0), nn.Linear(64, 24)
    codes = torch.randint(0, 2**bits, (1, 24, 64), generator=generator)
    pack_weight(linear, Integers.pack(codes, torch.rand(1, 24, 64 // group) + 0.1, None, bits=bits, group_size=group))
    assert check_writes(linear, (torch.randn(count, 64),)) > 15


@torch.no_grad()
def test_inference_tensors(backend: str) -> None:
    """They count no versions."""
    _, experts = packed_experts("olmoe", ("plain", "plain"))
    given = torch.randn(3, 48), torch.randint(0, 8, (3, 2)), torch.rand(3, 2)
    with torch.inference_mode():
        for name, tensor in tensors_of(experts).items():
            by_owner(experts, name, tensor, tensor.clone())
        experts(*given)
        for name, tensor in tensors_of(experts).items():
            tensor.copy_(others(tensor))
            assert torch.equal(experts(*given), copy.deepcopy(experts)(*given)), name


def test_written_places_are_refused_and_not_followed() -> None:
    """Where signs are read comes from tensors that anybody may write to."""
    _, experts = packed_experts("olmoe", ("plain", "plain"))
    with torch.no_grad():
        given = torch.randn(3, 48), torch.randint(0, 8, (3, 2)), torch.rand(3, 2)
        experts(*given)
        experts.get_submodule("down_proj.factor").get_buffer("salient_mask").data.fill_(255)
        with pytest.raises(CheckpointError, match="salient_mask"):
            experts(*given)


@needs_kernels
def test_widths_that_are_written_to_are_not_followed() -> None:
    packed = planes(torch.Generator().manual_seed(0), "input", 31, 65, 3)
    factor, states = kernel_of(packed).factor, torch.randn(2, 31)
    before, after = torch.empty(2, 65), torch.empty(2, 65)
    factor.apply(states, before, torch.tensor([0, 3]), 1, 1)
    assert packed.widths is not None
    packed.widths.fill_(30000)
    factor.apply(states, after, torch.tensor([0, 3]), 1, 1)
    assert torch.equal(before, after)


@needs_kernels
@pytest.mark.parametrize("rest", ["bf16", "int8"])
def test_whole_models_in_decoder_layers(rest: str, tmp_path: Path) -> None:
    """Between two texts: every tensor that the layers may hold something made of."""
    model = packed("qwen2_moe", tmp_path, rest).to(torch.bfloat16)
    ids = torch.arange(2, 12).view(1, 10)
    session_of_model = Session(model)
    list(session_of_model.stream(ids, new_tokens=2))
    direct = session_of_model._direct
    assert isinstance(direct, DirectForward) and direct.holds()
    seen = 0
    for name, tensor in tensors_of(model).items():
        if "layers.1" in name or name.startswith("model.norm") or "embed" in name:
            tensor.data.copy_(others(tensor))
            seen += 1
            if tensor.dim() < 2 or name.rsplit(".", 1)[-1] in ("entry_codes", "direction_codes", "scale_codes", "scale_grid"):
                assert not direct.holds(), name
                direct = direct_forward(model)
                assert isinstance(direct, DirectForward) and direct.holds()
    assert seen > 13
    again, fresh = Session(model), Session(copy.deepcopy(model))
    with torch.no_grad():
        wanted = [token.tolist() for token in fresh.stream(ids, new_tokens=4)]
        session_of_model._cache = session_of_model._read = None
        assert [token.tolist() for token in session_of_model.stream(ids, new_tokens=4)] == wanted
        assert [token.tolist() for token in again.stream(ids, new_tokens=4)] == wanted
