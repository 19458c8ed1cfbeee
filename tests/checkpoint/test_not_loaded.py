"""Tensors that are copied though transformers does not load them are named with their bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import save_tiny
from typer.testing import CliRunner

from moebius.checkpoint.not_loaded import NotLoaded, not_loaded
from moebius.checkpoint.reader import SourceCheckpoint
from moebius.cli.app import app
from moebius.evaluate.plan import checkpoint_size, plan_model
from moebius.evaluate.size import packed_checkpoint_size
from moebius.models.load import skeleton
from moebius.pipeline import quantize_model
from moebius.recipe import CalibrationSettings, Recipe

RTN = Recipe.make("rtn", 1)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = save_tiny("qwen3_next", tmp_path / "original")
    tensors = load_file(folder / "model.safetensors")
    tensors["mtp.layers.0.mlp.experts.0.up_proj.weight"] = torch.zeros(40, 48, dtype=torch.bfloat16)
    tensors["mtp.fc.weight"] = torch.zeros(48, 96, dtype=torch.bfloat16)
    tensors["model.layers.2.mlp.experts.0.up_proj.weight"] = torch.zeros(40, 48, dtype=torch.bfloat16)
    tensors["model.layers.0.self_attn.k_scale"] = torch.ones(1)
    tensors["model.layers.1.self_attn.k_scale"] = torch.ones(1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


NAMES = {"mtp.*", "model.layers.2.*", "model.layers.*.self_attn.k_scale"}
BYTES = 2 * (2 * 40 * 48 + 48 * 96) + 2 * 4


def test_they_are_found_and_grouped(checkpoint: Path) -> None:
    found = not_loaded(SourceCheckpoint.open(checkpoint).tensors, skeleton(checkpoint))
    assert set(found.names) == NAMES
    assert (found.tensors, found.bytes) == (5, BYTES)
    assert all(name in found.line() for name in NAMES)
    assert f"{BYTES:,} bytes" in found.line()
    assert "\n" not in found.line()


def test_nothing_is_said_where_there_are_none(tmp_path: Path) -> None:
    folder = save_tiny("olmoe", tmp_path / "original")
    assert not_loaded(SourceCheckpoint.open(folder).tensors, skeleton(folder)) == NotLoaded()
    assert NotLoaded().line() == ""


def test_plan_counts_what_will_be_copied(checkpoint: Path, tmp_path: Path) -> None:
    planned = plan_model(checkpoint, RTN, CalibrationSettings())
    quantize_model(checkpoint, tmp_path / "packed", RTN, CalibrationSettings())
    size = packed_checkpoint_size(tmp_path / "packed")
    assert planned.before.not_loaded == planned.after.not_loaded == size.not_loaded == checkpoint_size(checkpoint).not_loaded
    assert planned.after.bits == size.bits
    assert size.not_loaded.bytes == BYTES


def test_the_commands_name_them(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    commands = (["plan", str(checkpoint)], ["quantize", str(checkpoint), "--out", str(out), "--quiet"], ["info", str(out)])
    for command in commands:
        options = [] if command[0] == "info" else ["--method", "rtn", "--bits", "1"]
        got = CliRunner().invoke(app, [*command, *options])
        assert got.exit_code == 0, got.output
        assert "mtp.*" in got.output
        assert f"{BYTES:,} bytes" in got.output
    of_original = CliRunner().invoke(app, ["info", str(checkpoint), "--json"])
    assert json.loads(of_original.stdout)["not_loaded"]["bytes"] == BYTES
