"""A token through C++ layers: the logits of transformers' modules, and a way out where they are not the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import tiny_config
from torch import Tensor
from transformers import AutoModelForCausalLM

from moebius.evaluate.random_checkpoint import write_random_checkpoint
from moebius.kernels.routed_experts import cpu
from moebius.progress import Silent
from moebius.recipe import Recipe
from moebius.runtime.generation import Session
from moebius.runtime.token_step import ARCHITECTURES, TokenStep, token_step

needs_kernels = pytest.mark.skipif(cpu.missing() is not None, reason="nothing was compiled")


def packed(name: str, folder: Path, rest: str = "bf16") -> Any:
    write_random_checkpoint(tiny_config(name), folder, Recipe.make("moebius", 2.0, rest=rest), progress=Silent())
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: Any, texts: int, fast: bool) -> Tensor:
    """Of ten tokens one by one, after a prompt of seven. (10, texts, vocabulary)"""
    ids = torch.randint(0, 250, (texts, 17), generator=torch.Generator().manual_seed(1))
    session = Session(model)
    session._next(ids[:, :7], begins=True)
    if fast:
        session._step = token_step(model)
        assert isinstance(session._step, TokenStep), session._step
    return torch.stack([session._next(ids[:, at : at + 1], begins=False) for at in range(7, 17)])


@needs_kernels
@pytest.mark.parametrize(("texts", "rest"), [(1, "bf16"), (3, "int8")])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_those_of_transformers(name: str, texts: int, rest: str, tmp_path: Path) -> None:
    model = packed(name, tmp_path, rest)
    if isinstance(reason := token_step(model), str):
        pytest.fail(reason)
    wanted = logits(model, texts, fast=False)
    assert (logits(model, texts, fast=True) - wanted).norm() < 5e-3 * wanted.norm()


@needs_kernels
def test_a_watched_model_goes_through_its_modules(tmp_path: Path) -> None:
    model = packed("olmoe", tmp_path)
    step = token_step(model)
    assert isinstance(step, TokenStep) and step.holds()
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert not step.holds()
    assert "hooks" in str(token_step(model))


@needs_kernels
def test_a_changed_weight_ends_a_step(tmp_path: Path) -> None:
    model = packed("olmoe", tmp_path)
    step = token_step(model)
    assert isinstance(step, TokenStep)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    assert not step.holds()
