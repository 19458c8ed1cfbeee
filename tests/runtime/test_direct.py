"""Tokens through C++ layers: the logits of transformers' modules, and a way out where they are not the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import tiny_config
from torch import Tensor
from transformers import AutoModelForCausalLM

from moebius import native
from moebius.evaluate.random_checkpoint import write_random_checkpoint
from moebius.kernels.decoder_layer import Attention, prompt
from moebius.progress import Silent
from moebius.recipe import Recipe
from moebius.runtime.direct import ARCHITECTURES, DirectForward, direct_forward
from moebius.runtime.generation import Session

needs_kernels = pytest.mark.skipif(native.missing() is not None, reason="nothing was compiled")
needs_tiles = pytest.mark.skipif(
    native.missing() is not None or not native.has_tiles(), reason="prompts go through transformers without AVX-512 VNNI"
)


def packed(name: str, folder: Path, rest: str = "bf16", all_experts: bool = False) -> Any:
    """A random model; with ``all_experts`` for every token, no rounding error can choose others."""
    config = tiny_config(name)
    if all_experts:
        config.num_experts_per_tok = getattr(config, "num_local_experts", None) or config.num_experts
    write_random_checkpoint(config, folder, Recipe.make("moebius", 2.0, rest=rest), progress=Silent())
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():  # every part counts
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if (tensor.ndim == 2 and name.endswith("weight")) or name.endswith("proj.scales"):
                tensor.mul_(50 if "embed" in name else 8)
    return model


def logits(model: Any, texts: int, fast: bool) -> Tensor:
    """Of ten tokens one by one, after a prompt of seven. (10, texts, vocabulary)"""
    ids = torch.randint(0, 250, (texts, 17), generator=torch.Generator().manual_seed(1))
    session = Session(model)
    session._next(ids[:, :7], begins=True)
    if fast:
        session._direct = direct_forward(model)
        assert isinstance(session._direct, DirectForward), session._direct
    return torch.stack([session._next(ids[:, at : at + 1], begins=False) for at in range(7, 17)])


@needs_kernels
@pytest.mark.parametrize(("texts", "rest"), [(1, "bf16"), (3, "int8")])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_those_of_transformers(name: str, texts: int, rest: str, tmp_path: Path) -> None:
    model = packed(name, tmp_path, rest)
    if isinstance(reason := direct_forward(model), str):
        pytest.fail(reason)
    wanted = logits(model, texts, fast=False)
    assert (logits(model, texts, fast=True) - wanted).norm() < 5e-3 * wanted.norm()


@needs_tiles
@pytest.mark.parametrize(("texts", "rest"), [(1, "bf16"), (3, "int8"), (2, "int4")])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_prompts_have_the_logits_of_transformers(name: str, texts: int, rest: str, tmp_path: Path) -> None:
    """A prompt of more than one block of queries, more text behind it, and a token behind that."""
    model = packed(name, tmp_path, rest, all_experts=True)
    ids = torch.randint(0, 250, (texts, 110), generator=torch.Generator().manual_seed(1))
    wanted = Session(model)
    got = Session(model)
    got._direct = direct_forward(model)
    assert isinstance(got._direct, DirectForward), got._direct
    for begin, end in ((0, 67), (67, 109), (109, 110)):
        expected = wanted._next(ids[:, :end] if begin == 0 else ids[:, begin:end], begins=begin == 0)
        found = got._next(ids[:, :end] if begin == 0 else ids[:, begin:end], begins=begin == 0)
        # The last layer of many tokens rounds to bytes what that of one does not.
        assert (found - expected).norm() < 3e-2 * expected.norm(), (begin, end)
    assert got._cache is not None and wanted._cache is not None
    for mine, theirs in zip(got._cache.layers, wanted._cache.layers, strict=True):
        assert mine.keys.dtype == theirs.keys.dtype
        assert (mine.keys - theirs.keys).norm() < 3e-2 * theirs.keys.norm()
        assert (mine.values - theirs.values).norm() < 3e-2 * theirs.values.norm()


@needs_kernels
@pytest.mark.parametrize("before", [0, 5])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_blocks_of_queries_attend_as_pytorch_does(key_heads: int, before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix: Any = None
    attention = Attention(matrix, matrix, matrix, matrix, None, None, heads=4, key_heads=key_heads, width=8, scaling=0.3)
    queries = torch.randn(2, 4, 130, 8, generator=generator)
    keys, values = (torch.randn(2, key_heads, 130 + before, 8, generator=generator) for _ in range(2))
    blocks = prompt._attend(attention, queries, keys, values)
    monkeypatch.setattr(prompt, "_FEW_KEYS", 0)
    torch.testing.assert_close(blocks, prompt._attend(attention, queries, keys, values))


@needs_kernels
def test_a_watched_model_goes_through_its_modules(tmp_path: Path) -> None:
    model = packed("olmoe", tmp_path)
    step = direct_forward(model)
    assert isinstance(step, DirectForward) and step.holds()
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert not step.holds()
    assert "hooks" in str(direct_forward(model))


@needs_kernels
def test_a_changed_weight_ends_a_step(tmp_path: Path) -> None:
    model = packed("olmoe", tmp_path)
    step = direct_forward(model)
    assert isinstance(step, DirectForward)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    assert not step.holds()


def a_wrapped_matrix(layer: Any) -> None:
    layer.self_attn.q_proj = torch.nn.Linear(*reversed(layer.self_attn.q_proj.weight.shape), bias=False)


def another_activation(layer: Any) -> None:
    layer.mlp.experts.act_fn = torch.nn.Tanh()


def a_bias_where_none_was(layer: Any) -> None:
    layer.self_attn.k_proj.bias = torch.nn.Parameter(torch.ones(len(layer.self_attn.k_proj.weight)))


@needs_kernels
@pytest.mark.parametrize("change", [a_wrapped_matrix, another_activation, a_bias_where_none_was])
def test_a_replaced_module_ends_a_step(change: Callable[[Any], None], tmp_path: Path) -> None:
    model = packed("olmoe", tmp_path)
    step = direct_forward(model)
    assert isinstance(step, DirectForward) and step.holds()
    change(model.model.layers[0])
    assert not step.holds()
