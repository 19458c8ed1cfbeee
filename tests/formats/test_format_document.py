"""docs/format.md is enough to read a packed checkpoint: a reader written from it agrees with Moebius on every format."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tests.formats import reader
from tests.formats.test_formats import example_integers, example_signs
from tests.formats.test_planes import example_graded, example_planes
from tests.formats.test_trellis import example as example_trellis
from tests.formats.test_vector_formats import packed_examples
from tests.packed import save_packed_tiny
from transformers import AutoModelForCausalLM

import moebius
from moebius.formats import Packed, PackedProjection
from moebius.formats.base import FORMATS
from moebius.formats.dense import Dense
from moebius.formats.planes import AMPLITUDES
from moebius.formats.random_contents import random_projection
from moebius.recipe import Recipe
from moebius.table import METHODS

DOCUMENT = (Path(__file__).parents[2] / "docs" / "format.md").read_text()


def examples() -> list[Packed]:
    numbers = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    return [
        *(Dense.pack(numbers, dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32)),
        *(example_integers(bits, zeros) for bits in (1, 3, 4, 7, 8) for zeros in (False, True)),
        *(example_signs(3, 5, 19, salient) for salient in (0, 4, 19)),
        *packed_examples(),
        *(example_planes(side, bits)[0] for side in ("input", "output") for bits in (5, 8)),
        *(example_graded(side)[0] for side in ("input", "output")),
        example_trellis()[0],
    ]


def write(folder: Path, modules: dict[str, Packed | PackedProjection]) -> None:
    stored = {f"{module}.{name}": t.contiguous() for module, packed in modules.items() for name, t in packed.tensors().items()}
    save_file(stored, folder / "model.safetensors")
    about = {"modules": {module: packed.spec() for module, packed in modules.items()}}
    (folder / "config.json").write_text(json.dumps({"quantization_config": about}))


def agree(found: Any, wanted: torch.Tensor) -> bool:
    wanted = wanted.float().numpy()
    return found.shape == wanted.shape and bool(np.allclose(found, wanted, rtol=2e-6, atol=2e-6 * abs(wanted).max(initial=0)))


@pytest.mark.parametrize("packed", examples(), ids=lambda packed: packed.name)
def test_every_format_is_read(packed: Packed, tmp_path: Path) -> None:
    write(tmp_path, {"layer": packed})
    assert agree(reader.read(tmp_path)["layer"], packed.unpack())


def test_no_format_is_left_out() -> None:
    assert set(FORMATS) == set(reader.FORMATS) == {packed.name for packed in examples()}
    for name, kind in FORMATS.items():
        section = DOCUMENT.split(f"## `{name}`")[1].split("\n## ")[0]
        names = {field.name for field in fields(kind)} - {"batch", "rows", "columns"}
        assert {field for field in names if f"`{field}`" not in section} == set(), name


def test_the_table_of_amplitudes_is_that_of_the_code() -> None:
    assert [list(amplitudes) for amplitudes in AMPLITUDES.values()] == reader.AMPLITUDES


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("projection", ["gate_up", "down"])
def test_what_every_method_plans_is_read(method: str, projection: str, tmp_path: Path) -> None:
    shape = (6, 80, 56)
    bits = 4 if method == "bitsmoe" else None
    planned = METHODS[method].plan(shape, Recipe.make(method, bits), projection)
    filled = random_projection(planned, torch.Generator().manual_seed(1))
    write(tmp_path, {"model.layers.0.mlp.experts.gate_up_proj": filled})
    (found,) = reader.read(tmp_path).values()
    assert agree(found, filled.unpack())


@pytest.mark.parametrize("architecture", ["olmoe", "gpt_oss"])
def test_a_checkpoint_is_read(architecture: str, tmp_path: Path) -> None:
    folder = save_packed_tiny(architecture, tmp_path, everything=True)
    model = moebius.dequantize(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    found = reader.read(folder)
    assert found
    for module, matrices in found.items():
        own = model.get_parameter(module if module.endswith("_proj") and ".experts." in module else f"{module}.weight")
        wanted = own.mT if architecture == "gpt_oss" and own.ndim == 3 else own
        assert agree(matrices if own.ndim == 3 else matrices[0], wanted.detach())
