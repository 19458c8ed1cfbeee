"""Slow ways are told of: one line for each cause, with what to do about it; a fast run says nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.packed import projection
from tests.runtime.test_direct import needs_kernels, packed
from tests.runtime.test_packed_modules import module_hidden, packed_experts
from tests.tiny import save_tiny, tiny_config, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from moebius import native
from moebius.evaluate.random_checkpoint import write_random_checkpoint
from moebius.formats import PackedProjection
from moebius.formats.dense import Dense
from moebius.formats.integers import Integers
from moebius.kernels import choice
from moebius.models.layout import layout_of
from moebius.models.load import describe
from moebius.progress import Silent
from moebius.recipe import Recipe
from moebius.runtime.generation import Session
from moebius.runtime.packed_experts import pack_experts
from moebius.runtime.packed_linear import pack_weight

IDS = torch.arange(2, 12).view(1, 10)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    monkeypatch.delenv("MOEBIUS_KERNEL", raising=False)
    choice.tell_once.cache_clear()
    return caplog


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING" and "moebius" in record.name]


def write(model: Any, tokens: int = 3) -> None:
    for _ in range(2):
        list(Session(model).stream(IDS, new_tokens=tokens))


@needs_kernels
@pytest.mark.parametrize("rest", ["bf16", "int8", "int4"])
def test_a_fast_run_says_nothing(rest: str, told: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    write(packed("qwen2_moe", tmp_path, rest))
    assert warnings(told) == []


def test_originals_of_known_architectures_say_nothing(told: pytest.LogCaptureFixture) -> None:
    write(tiny_model("qwen3_moe"))
    assert warnings(told) == []


@needs_kernels
def test_layers_that_cpp_does_not_know(told: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """Once, however often."""
    write_random_checkpoint(tiny_config("deepseek_v2"), tmp_path, Recipe.make("moebius", 2.0), progress=Silent())
    write(AutoModelForCausalLM.from_pretrained(tmp_path))
    (line,) = warnings(told)
    assert "the architecture is deepseek_v2" in line and "nothing has to be done" in line


@needs_kernels
def test_layers_with_hooks(told: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    model = packed("olmoe", tmp_path)
    model.model.layers[1].register_forward_hook(lambda *_: None)
    write(model)
    (line,) = warnings(told)
    assert "model.layers.1 has hooks" in line


@needs_kernels
def test_attention_that_stays_transformers_own(told: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    model.config.model_type = "qwen3_moe_sparse"
    write(model)
    (line,) = warnings(told)
    assert "attention of qwen3_moe_sparse" in line and "nothing has to be done" in line


@pytest.mark.parametrize("rest", ["bf16", "int8"])
def test_nothing_compiled(rest: str, told: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One line for experts, linear layers and decoder layers: it is one cause."""
    write_random_checkpoint(tiny_config("olmoe"), tmp_path, Recipe.make("moebius", 2.0, rest=rest), progress=Silent())
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    monkeypatch.setattr(native, "_extension", None)
    monkeypatch.setattr(native, "_MISSING", "the compiled kernels are not there; reinstall moebius", raising=False)
    write(model)
    (line,) = warnings(told)
    assert "the compiled kernels are not there; reinstall moebius" in line and "slow" in line


@needs_kernels
def test_experts_without_kernels(told: pytest.LogCaptureFixture) -> None:
    _, experts = packed_experts("olmoe", ("right", "left"))  # integers
    for _ in range(2):
        with torch.no_grad():
            experts(torch.randn(2, module_hidden(experts)), torch.tensor([[0, 1]] * 2), torch.rand(2, 2))
    (line,) = warnings(told)
    assert "gate_up is stored as integers" in line and "dequantize" in line


@needs_kernels
def test_every_format_speaks_for_itself(told: pytest.LogCaptureFixture) -> None:
    for kind in ("dense", "integers"):
        module = describe(tiny_model("olmoe")).moe_layers[0].experts
        layout = layout_of(module)
        assert layout is not None
        shape = layout.experts, layout.hidden, layout.inner
        down = projection(torch.Generator().manual_seed(0), shape, "plain")
        up = torch.randn(layout.experts, 2 * layout.inner, layout.hidden)
        dense = PackedProjection(Dense.pack(up))
        integers = PackedProjection(
            Integers.pack(torch.ones(up.shape, dtype=torch.int64), torch.ones(*up.shape[:2], 1), None, bits=2, group_size=48)
        )
        pack_experts(module, layout, dense if kind == "dense" else integers, down)
        with torch.no_grad():
            module(torch.randn(2, layout.hidden), torch.tensor([[0, 1]] * 2), torch.rand(2, 2))
    lines = warnings(told)
    assert len(lines) == 2 and "stored as dense" in lines[0] and "stored as integers" in lines[1]


@needs_kernels
def test_what_was_asked_for_is_not_news(
    told: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = packed("olmoe", tmp_path, "int8")
    monkeypatch.setenv("MOEBIUS_KERNEL", "reference")
    write(model)
    assert warnings(told) == []


@needs_kernels
def test_linear_layers_without_kernels(told: pytest.LogCaptureFixture) -> None:
    linear = nn.Linear(64, 24)
    pack_weight(linear, Integers.pack(torch.ones(1, 24, 64).long(), torch.ones(1, 24, 4), None, bits=4, group_size=16))
    with torch.no_grad():
        linear(torch.randn(2, 64))
    (line,) = warnings(told)
    assert "every 16 columns" in line and "--rest int8" in line


def test_gradients(told: pytest.LogCaptureFixture) -> None:
    _, experts = packed_experts("olmoe", ("plain", "plain"))
    linear = nn.Linear(64, 24)
    pack_weight(linear, Integers.pack(torch.ones(1, 24, 64).long(), torch.ones(1, 24, 1), None, bits=8, group_size=64))
    for _ in range(2):
        experts(torch.randn(2, 48, requires_grad=True), torch.tensor([[0, 1]] * 2), torch.rand(2, 2)).sum().backward()
        linear(torch.randn(2, 64, requires_grad=True)).sum().backward()
    (line,) = warnings(told)
    assert "gradients are taken" in line and "torch.no_grad()" in line


@needs_kernels
def test_the_command_line_says_it_once(tmp_path: Path) -> None:
    save_tiny("ernie4_5_moe", tmp_path / "source")  # its tokenizer
    (tmp_path / "packed").mkdir()
    write_random_checkpoint(tiny_config("ernie4_5_moe"), tmp_path / "packed", Recipe.make("moebius", 2.0), progress=Silent())
    for file in (tmp_path / "source").glob("tokenizer*"):
        (tmp_path / "packed" / file.name).write_bytes(file.read_bytes())
    command = [sys.executable, "-m", "moebius.cli", "generate", str(tmp_path / "packed"), "--prompt", "abc", "--tokens", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("tokens go through transformers' modules") == 1
    assert "the architecture is ernie4_5_moe" in done.stderr
