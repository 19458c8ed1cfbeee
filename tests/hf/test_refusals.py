"""A packed checkpoint that is not what was written is refused, with the name of the tensor or file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.packed import save_packed_tiny
from transformers import AutoModelForCausalLM

import moebius
from moebius.checkpoint.manifest import MANIFEST_NAME
from moebius.errors import CheckpointError

EXPERTS = "model.layers.0.mlp.experts"
SHARD = f"packed-{EXPERTS}.safetensors"
SCALES = f"{EXPERTS}.gate_up_proj.factor.row_scales"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_packed_tiny("olmoe", tmp_path_factory.mktemp("refusals"))


@pytest.fixture
def packed(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "packed"))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object], everywhere: bool = False) -> None:
    """Change the tensors of a shard; ``everywhere`` makes index and manifest agree with the change."""
    tensors = load_file(folder / SHARD)
    change(tensors)
    save_file(tensors, folder / SHARD)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if f != SHARD} | dict.fromkeys(tensors, SHARD)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if everywhere:
        from moebius.checkpoint.manifest import write_manifest

        write_manifest(folder)


def edit(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def configure(folder: Path, change: Callable[[Any], object]) -> None:
    edit(folder / "config.json", lambda config: change(config["quantization_config"]))


def truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)


def spoil(value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors[SCALES].view(-1)[3:4].fill_(value)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda f: (f / SHARD).unlink(), f"{SHARD}"),
    "truncated shard": (lambda f: truncate(f / SHARD), f"{SHARD}.*truncated"),
    "truncated rest": (lambda f: truncate(f / "rest-00000.safetensors"), r"rest-00000\.safetensors.*truncated"),
    "missing tensor": (lambda f: rewrite(f, lambda t: t.pop(SCALES)), f"{SCALES}: missing"),
    "missing tensor, in manifest too": (lambda f: rewrite(f, lambda t: t.pop(SCALES), True), f"{SCALES}: missing"),
    "extra tensor": (lambda f: rewrite(f, lambda t: t.update(extra=torch.ones(2))), "^extra: in .* not in the manifest"),
    "wrong shape": (lambda f: rewrite(f, lambda t: t.update({SCALES: t[SCALES][:, :-1].clone()})), f"{SCALES}: got"),
    "wrong shape, in manifest too": (
        lambda f: rewrite(f, lambda t: t.update({SCALES: t[SCALES][:, :-1].clone()}), True),
        f"{SCALES}: got",
    ),
    "wrong dtype": (
        lambda f: rewrite(f, lambda t: t.update({SCALES: t[SCALES].float()})),
        f"{SCALES}: got .* F32, wanted .* F16",
    ),
    "wrong dtype, in manifest too": (
        lambda f: rewrite(f, lambda t: t.update({SCALES: t[SCALES].bfloat16()}), True),
        f"{SCALES}: got .* BF16, wanted .* F16",
    ),
    "NaN": (lambda f: rewrite(f, spoil(float("nan"))), f"{SCALES}: holds NaN or Inf"),
    "Inf": (lambda f: rewrite(f, spoil(float("inf"))), f"{SCALES}: holds NaN or Inf"),
    "no manifest": (lambda f: (f / MANIFEST_NAME).unlink(), f"{MANIFEST_NAME}: missing"),
    "manifest not JSON": (lambda f: (f / MANIFEST_NAME).write_text("{"), f"{MANIFEST_NAME}: cannot be read"),
    "manifest of the future": (
        lambda f: edit(f / MANIFEST_NAME, lambda m: m.update(format_version=2)),
        f"{MANIFEST_NAME}: got format_version 2, wanted 1",
    ),
    "checkpoint of the future": (
        lambda f: configure(f, lambda q: q.update(format_version=2)),
        "got format_version 2, wanted 1",
    ),
    "no version": (lambda f: configure(f, lambda q: q.update(format_version=None)), "got format_version None, wanted 1"),
    "unknown format": (
        lambda f: configure(f, lambda q: q["modules"][f"{EXPERTS}.down_proj"]["factor"].update(format="runes")),
        f"{EXPERTS}.down_proj: .*no format named 'runes'",
    ),
    "half a layer": (lambda f: configure(f, lambda q: q["modules"].pop(f"{EXPERTS}.down_proj")), f"{EXPERTS}: .* only"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_by_name(packed: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    change(packed)
    with pytest.raises(CheckpointError, match=message) as caught:
        AutoModelForCausalLM.from_pretrained(packed)
    assert "\n" not in str(caught.value)


def test_undamaged_copy_loads(packed: Path) -> None:
    assert moebius.verify(packed, hashes=True) > 0
    AutoModelForCausalLM.from_pretrained(packed)


def test_config_of_another_model(packed: Path) -> None:
    edit(packed / "config.json", lambda config: config.update(num_experts=4))
    with pytest.raises(
        CheckpointError, match=rf"{EXPERTS}\.gate_up_proj: packed as \(8, 80, 48\), but the model wants \(4, 80, 48\)"
    ):
        AutoModelForCausalLM.from_pretrained(packed)


def test_a_module_that_the_model_does_not_have(packed: Path) -> None:
    def move(quantization: Any) -> None:
        modules = quantization["modules"]
        for projection in ("gate_up_proj", "down_proj"):
            del modules[f"model.layers.1.mlp.experts.{projection}"]

    configure(packed, move)
    edit(packed / "config.json", lambda config: config.update(num_hidden_layers=1))
    model = AutoModelForCausalLM.from_pretrained(packed)
    assert len(model.model.layers) == 1
    configure(
        packed, lambda q: q["modules"].update({"model.nothing": {"format": "dense", "batch": 1, "rows": 2, "columns": 2}})
    )
    with pytest.raises(CheckpointError, match=r"^model\.nothing\.values: missing"):
        AutoModelForCausalLM.from_pretrained(packed)


def test_verify_refuses_what_moebius_did_not_pack(original: Path) -> None:
    with pytest.raises(CheckpointError, match="did not pack"):
        moebius.verify(original.parent / "source")
    with pytest.raises(CheckpointError, match=r"config\.json: missing"):
        moebius.verify(original.parent)
