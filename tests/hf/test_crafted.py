"""Checkpoints from somebody who wants to see the process die: files and manifest agree, only the numbers contradict each other.

Whatever a description claims is what the tensors are resized to (where that is a size at all), so that no comparison of shapes
with files helps: each of these must be refused for what its numbers say, in one line, by every way to open it.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.opening import WAYS, logits
from tests.packed import save_every_format
from transformers import AutoModelForCausalLM

from moebius.checkpoint.manifest import write_manifest
from moebius.formats.base import FORMATS

EXPERTS = "model.layers.{}.mlp.experts."
PLANES = EXPERTS.format(0) + "gate_up_proj.factor"
GRADED = EXPERTS.format(0) + "gate_up_proj.right"
DOWN_PLANES = EXPERTS.format(0) + "down_proj.factor"
DOWN_GRADED = EXPERTS.format(0) + "down_proj.left"
SIGNS = EXPERTS.format(1) + "gate_up_proj.factor"
LEFT = EXPERTS.format(1) + "gate_up_proj.left"
DENSE = EXPERTS.format(1) + "gate_up_proj.right"
BIAS = EXPERTS.format(1) + "down_proj.bias"
SPECTRAL = EXPERTS.format(2) + "gate_up_proj.factor"
CODEBOOK = EXPERTS.format(2) + "down_proj.factor"
GROUPED = EXPERTS.format(3) + "gate_up_proj.factor"
INTEGERS = EXPERTS.format(3) + "down_proj.factor"
EIGHT = "model.layers.0.self_attn.q_proj"
FOUR = "model.layers.0.self_attn.o_proj"

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_every_format(tmp_path_factory.mktemp("crafted"))


@pytest.fixture
def packed(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "packed"))


def describe(folder: Path, path: str, change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """Change the description of a part, or of a linear layer, in ``config.json``; returns it."""
    config = json.loads((folder / "config.json").read_text())
    modules = config["quantization_config"]["modules"]
    module, _, part = path.rpartition(".")
    spec: dict[str, Any] = modules[path] if path in modules else modules[module][part]
    change(spec)
    (folder / "config.json").write_text(json.dumps(config))
    return spec


def rewrite(folder: Path, path: str, change: Callable[[Tensors], object]) -> None:
    """Change the tensors of a part; index and manifest follow."""
    shard = next(file for file in folder.glob("packed-*") if any(name.startswith(f"{path}.") for name in load_file(file)))
    tensors = load_file(shard)
    own = {name.removeprefix(f"{path}."): tensors.pop(name) for name in list(tensors) if name.startswith(f"{path}.")}
    change(own)
    tensors |= {f"{path}.{name}": tensor.contiguous() for name, tensor in own.items()}
    save_file(tensors, shard, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    kept = {name: file for name, file in content["weight_map"].items() if file != shard.name}
    index.write_text(json.dumps({**content, "weight_map": {**kept, **dict.fromkeys(tensors, shard.name)}}))
    write_manifest(folder)


def resize(folder: Path, path: str, spec: dict[str, Any]) -> None:
    """Give the tensors of a part the shapes that its description claims, where these are any that can be written."""
    fields = {name: value for name, value in spec.items() if name != "format"}
    try:
        expected = FORMATS[spec["format"]](**fields).expected()
        if sum(math.prod(shape) for shape, _ in expected.values()) > 1 << 20:
            return
        blank = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in expected.items()}
    except Exception:
        return

    def change(tensors: Tensors) -> None:
        for name, tensor in blank.items():
            if name in tensors and tensors[name].dtype == tensor.dtype:
                count = min(tensors[name].numel(), tensor.numel())
                tensor.view(-1)[:count] = tensors[name].reshape(-1)[:count]
        tensors.clear()
        tensors.update(blank)

    rewrite(folder, path, change)


NUMBERS: list[tuple[str, dict[str, Any]]] = [
    # Sign planes, between a shared basis at the input side.
    *[(PLANES, {"batch": v}) for v in (0, -1, 7, 9, 10**9, 8.0, True, "8", None)],
    *[(PLANES, {"rows": v}) for v in (0, -80, 79, 10**9, 1 << 70)],
    *[(PLANES, {"columns": v}) for v in (0, 29, 31, 10**9)],  # the basis has 30 rows
    *[(PLANES, {"side": v}) for v in ("left", "", 1)],
    *[(PLANES, {"planes": v}) for v in (0, 1, 8, -1, 10**9)],
    *[(PLANES, {"scale_bits": v}) for v in (0, 9, -5, 5.0)],
    *[(PLANES, {"sign_rows": v}) for v in (-1, 0, 10**9, 10**30)],
    *[(PLANES, {"live": v}) for v in (-1, 0, 241, 10**9)],
    *[(PLANES, {"live_matrices": v}) for v in (-1, 0, 9)],
    (PLANES, {"format": "dense"}),
    (PLANES, {"format": "runes"}),
    (PLANES, {"format": ["planes"]}),
    (PLANES, {"widths": 3}),
    (PLANES, {"color": "red"}),
    (DOWN_PLANES, {"rows": 25}),  # the basis has 24 columns
    (DOWN_PLANES, {"rows": 23}),
    # Shared bases.
    (GRADED, {"rows": 0, "grades": ""}),
    (GRADED, {"rows": 20, "grades": "8:20"}),
    (GRADED, {"rows": 40, "grades": "8:40"}),
    *[(GRADED, {"batch": v}) for v in (0, 2, 8, -1)],
    *[(GRADED, {"columns": v}) for v in (0, 47, 49, -48)],
    *[(GRADED, {"grades": v}) for v in ("", "8:-10 4:40", "9:30", "0:30", "8:30x", "8:1000000000", "-8:30", 8, None)],
    (GRADED, {"side": "output"}),
    (DOWN_GRADED, {"columns": 25, "grades": "6:25"}),  # reads more than the factor gives
    (DOWN_GRADED, {"rows": 50}),
    *[(LEFT, {"bits": v}) for v in (0, 9, 16, -8, 8.5, True)],
    *[(LEFT, {"group_size": v}) for v in (0, -128, "128")],
    *[(LEFT, {"columns": v}) for v in (31, 33, 0, 10**9)],
    *[(LEFT, {"batch": v}) for v in (0, 8)],
    (LEFT, {"zero_points": 1}),
    *[(DENSE, {"dtype": v}) for v in ("int8", "int32", "nn", "__name__", None)],
    (DENSE, {"rows": 27}),
    (BIAS, {"batch": 1}),
    (BIAS, {"columns": 47}),
    (BIAS, {"rows": 2}),
    # The other factors.
    *[(SIGNS, {"salient": v}) for v in (-1, 29, 10**9, "3")],
    *[(SPECTRAL, {"payload_bytes": v}) for v in (-1, 10**12, 1.5)],
    *[(SPECTRAL, {"group_size": v}) for v in (0, -40)],
    *[(SPECTRAL, {"transposed": v}) for v in (1, "yes")],
    *[(CODEBOOK, {"code_bits": v}) for v in (0, -5, 17, 10**9)],
    *[(CODEBOOK, {"length": v}) for v in (0, -4, 1 << 19)],
    *[(CODEBOOK, {"rank": v}) for v in (-1, 41, 10**9)],
    *[(GROUPED, {name: v}) for name in ("block", "salient_block") for v in (0, -16, 1 << 40)],
    *[(GROUPED, {"salient": v}) for v in (-1, 49, 10**9)],
    *[(INTEGERS, {"bits": v}) for v in (0, 9, 10**9)],
    *[(INTEGERS, {"group_size": v}) for v in (0, -1)],
    *[(EIGHT, {"batch": v}) for v in (0, 2, -1)],
    *[(EIGHT, {"rows": v}) for v in (0, 47, 10**9)],
    *[(EIGHT, {"bits": v}) for v in (0, 9)],
    *[(FOUR, {"group_size": v}) for v in (0, -32)],
    (FOUR, {"columns": 0}),
]


def refused_by(folder: Path, *ways: str) -> None:
    """Every way ends in one line of a Moebius error, and none of them is a refusal of the file's own JSON or headers."""
    for way in ways:
        message = WAYS[way](folder)
        assert message, f"{way}: went on"
        assert "no safetensors" not in message and "not a JSON" not in message, message


@pytest.mark.parametrize(("path", "change"), NUMBERS, ids=lambda value: str(value).removeprefix("model.layers.")[:60])
def test_numbers_that_contradict_each_other(packed: Path, path: str, change: dict[str, Any]) -> None:
    resize(packed, path, describe(packed, path, lambda spec: spec.update(change)))
    refused_by(packed, *WAYS)


def fill(name: str, value: float) -> Callable[[Tensors], object]:
    return lambda tensors: tensors[name].view(-1)[:1].fill_(value)


def put(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: change(tensors[name])})


def payload_of_infinities(tensors: Tensors) -> None:
    tensors["payload"].fill_(0xFF)  # as float16: NaN


VALUES: list[tuple[str, str, Callable[[Tensors], object]]] = [
    ("more directions than there are", PLANES, fill("widths", 31)),
    ("a negative number of directions", PLANES, fill("widths", -1)),
    ("a plane wider than the one before", PLANES, put("widths", lambda t: t.flip(1))),
    ("fewer rows of signs than planes ask for", PLANES, fill("widths", 29)),
    ("matrices in another order than their planes", DOWN_PLANES, put("widths", lambda t: t.clamp(max=20))),
    ("scales that are NaN", PLANES, fill("entry_grids", math.nan)),
    ("scales that are Inf", DOWN_PLANES, fill("direction_grids", math.inf)),
    ("scales beyond float32", PLANES, fill("entry_grids", 60000.0)),
    ("steps beyond float32", DOWN_PLANES, put("direction_grids", lambda t: t.index_fill(1, torch.tensor([1]), 900.0))),
    ("a basis that is NaN", GRADED, fill("scale_grid", math.nan)),
    ("a basis beyond float32", GRADED, fill("scale_grid", 100.0)),
    ("another number of salient columns", SIGNS, put("salient_mask", lambda t: t | 0x0F)),
    ("no salient column", SIGNS, put("salient_mask", torch.zeros_like)),
    ("one matrix with too few salient columns", GROUPED, fill("salient_mask", 0)),
    ("row scales that are NaN", SIGNS, fill("row_scales", math.nan)),
    ("a dense factor that is Inf", DENSE, fill("values", math.inf)),
    ("biases that are NaN", BIAS, fill("values", math.nan)),
    ("integers with scales that are Inf", INTEGERS, fill("scales", math.inf)),
    ("a codebook that is NaN", CODEBOOK, fill("codebooks", math.nan)),
    ("shared directions that are Inf", CODEBOOK, fill("directions", math.inf)),
    ("directions of fifteen bits", SPECTRAL, put("widths", lambda t: torch.full_like(t, 0xFF))),
    ("more codes than the payload holds", SPECTRAL, put("widths", lambda t: torch.full_like(t, 0x88))),
    ("scales inside the payload that are NaN", SPECTRAL, payload_of_infinities),
    ("a linear layer with scales that are NaN", EIGHT, fill("scales", math.nan)),
]


@pytest.mark.parametrize(("path", "change"), [case[1:] for case in VALUES], ids=[case[0] for case in VALUES])
def test_values_that_point_beside_what_they_belong_to(packed: Path, path: str, change: Callable[[Tensors], object]) -> None:
    rewrite(packed, path, change)
    refused_by(packed, "from_pretrained", "verify", "generate")


SHAPES: list[tuple[str, str, Callable[[Tensors], object]]] = [
    ("fewer entries in a codebook than codes", CODEBOOK, put("codebooks", lambda t: t[:, :16])),
    ("codes of another type", PLANES, put("signs", lambda t: t.view(torch.int8))),
    ("widths of another type", PLANES, put("widths", lambda t: t.int())),
    ("scales of another type", SIGNS, put("row_scales", lambda t: t.bfloat16())),
    ("grids with one number", PLANES, put("entry_grids", lambda t: t[:, :1])),
    ("a row of codes less", LEFT, put("codes", lambda t: t[:, 1:])),
    ("zero points that are missing", INTEGERS, lambda tensors: tensors.pop("zeros")),
    ("column scales that nothing announces", SPECTRAL, lambda tensors: tensors.update(row_scales=torch.ones(8, 80).half())),
    ("one stream of all matrices", INTEGERS, put("codes", lambda t: t.flatten())),
]


@pytest.mark.parametrize(("path", "change"), [case[1:] for case in SHAPES], ids=[case[0] for case in SHAPES])
def test_tensors_that_are_not_what_the_description_says(packed: Path, path: str, change: Callable[[Tensors], object]) -> None:
    rewrite(packed, path, change)
    refused_by(packed, *WAYS)


def configure(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "change",
    [
        *[{"num_experts_per_tok": v} for v in (0, -1, 9, 10**9)],
        {"num_experts": 7},
        {"num_experts": 10**9},
        {"moe_k": 9},
        {"n_group": 3, "topk_group": 2},
        {"n_group": 2, "topk_group": 4},
        {"n_group": 0, "topk_group": 0},
    ],
    ids=str,
)
def test_experts_that_are_not_there(packed: Path, change: dict[str, Any]) -> None:
    configure(packed, lambda config: config.update(change))
    refused_by(packed, "from_pretrained", "generate", *(() if "num_experts" in change else ("info", "verify")))


MODULES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no factor": lambda modules: modules[PLANES.removesuffix(".factor")].pop("factor"),
    "an unknown part": lambda modules: modules[PLANES.removesuffix(".factor")].update(middle={"format": "dense"}),
    "a part that is a word": lambda modules: modules[PLANES.removesuffix(".factor")].update(left="dense"),
    "a part that is null": lambda modules: modules[PLANES.removesuffix(".factor")].update(factor=None),
    "a module that is a list": lambda modules: modules.update({EIGHT: [1]}),
    "a module that is null": lambda modules: modules.update({EIGHT: None}),
    "half a layer": lambda modules: modules.pop(PLANES.removesuffix(".factor")),
    "a module that is not there": lambda modules: modules.update({"model.nothing": modules[EIGHT]}),
    "a description without a format": lambda modules: modules[EIGHT].pop("format"),
    "a description without rows": lambda modules: modules[EIGHT].pop("rows"),
    "a linear layer described as experts": lambda modules: modules.update({EIGHT: {"factor": modules[EIGHT]}}),
}


@pytest.mark.parametrize("what", MODULES)
def test_modules_that_are_no_modules(packed: Path, what: str) -> None:
    configure(packed, lambda config: MODULES[what](config["quantization_config"]["modules"]))
    refused_by(packed, "from_pretrained", "generate")


def test_the_original_opens_in_every_way(original: Path) -> None:
    assert {way: opened(original) for way, opened in WAYS.items()} == dict.fromkeys(WAYS, "")


def test_tensors_at_odd_places_are_read_as_they_are(original: Path, packed: Path) -> None:
    for file in packed.glob("*.safetensors"):
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        file.write_bytes((length + 1).to_bytes(8, "little") + content[8 : 8 + length] + b" " + content[8 + length :])
    model = AutoModelForCausalLM.from_pretrained(packed)
    assert [name for name, t in model.state_dict().items() if t.data_ptr() % t.element_size()] == []
    assert torch.equal(logits(packed), logits(original))
