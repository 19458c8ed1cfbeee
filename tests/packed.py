"""Packed checkpoints of the tiny models, with random factors in every format and on both sides."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tests.tiny import save_tiny
from torch import Generator

from moebius.checkpoint.names import expert_tensor_names
from moebius.checkpoint.reader import SourceCheckpoint
from moebius.checkpoint.writer import CheckpointWriter
from moebius.formats import Packed, PackedProjection
from moebius.formats.base import empty_like_spec
from moebius.formats.dense import Dense
from moebius.formats.graded import Graded
from moebius.formats.integers import Integers
from moebius.formats.planes import Planes
from moebius.formats.random_contents import random_contents, random_projection
from moebius.formats.signs import Signs
from moebius.formats.trellis import Trellis
from moebius.models.load import skeleton
from moebius.pipeline import quantize_model
from moebius.recipe import CalibrationSettings, Recipe

RANK = 30


def integers(generator: Generator, batch: int, rows: int, columns: int, bits: int = 4) -> Integers:
    groups = -(-columns // 16)
    codes = torch.randint(0, 2**bits, (batch, rows, columns), generator=generator)
    zeros = torch.randint(0, 2**bits, (batch, rows, groups), generator=generator)
    scales = (torch.rand(batch, rows, groups, generator=generator) + 0.5) * 2**-bits
    return Integers.pack(codes, scales, zeros, bits=bits, group_size=16)


def signs(generator: Generator, batch: int, rows: int, columns: int) -> Signs:
    salient = torch.zeros(batch, columns, dtype=torch.bool)
    salient[:, torch.randperm(columns, generator=generator)[:3]] = True
    return Signs.pack(
        torch.rand(batch, rows, columns, generator=generator) > 0.5,
        torch.rand(batch, rows, generator=generator) * 0.3,
        torch.rand(batch, columns, generator=generator),
        salient_mask=salient,
        salient_positive=torch.rand(batch, rows, columns, generator=generator) > 0.5,
        salient_column_scales=torch.rand(batch, columns, generator=generator),
    )


def projection(generator: Generator, shape: tuple[int, ...], kind: str) -> PackedProjection:
    """A random projection; ``kind`` says which shared factors it has: ``plain``, ``left``, ``right`` or ``both``."""
    experts, out, inputs = shape
    left = integers(generator, 1, out, RANK, 8) if kind in ("left", "both") else None
    right = Dense.pack(torch.randn(1, RANK, inputs, generator=generator) * 0.2) if kind in ("right", "both") else None
    rows, columns = RANK if left else out, RANK if right else inputs
    make = integers if kind == "right" else signs
    return PackedProjection(make(generator, experts, rows, columns), left, right)


def packed_layers(folder: Path, everything: bool) -> dict[str, dict[str, PackedProjection | Packed]]:
    """Random packed modules for every layer of a checkpoint: experts, and on request routers and linear layers too."""
    moe, generator = skeleton(folder), torch.Generator().manual_seed(0)
    kinds = ("left", "right", "plain", "both")
    layers: dict[str, dict[str, PackedProjection | Packed]] = {}
    for number, layer in enumerate(moe.moe_layers):
        layout = layer.layout
        channels = layout.inner * (2 if layout.has_gate else 1)
        shapes = {layout.gate_up_name: (channels, layout.hidden), layout.down_name: (layout.hidden, layout.inner)}
        layers[layer.name] = {
            f"{layer.name}.{name}": projection(generator, (layout.experts, *shape), kinds[(2 * number + place) % 4])
            for place, (name, shape) in enumerate(shapes.items())
        }
        if everything and layer.router is not None:
            weight: Any = layer.router.weight
            layers[layer.name][str(layer.router_name)] = signs(generator, 1, *weight.shape)
    for name in (*moe.shared_experts, *moe.dense_mlps) if everything else ():
        weight = moe.model.get_submodule(name).weight
        layers[name] = {name: integers(generator, 1, *weight.shape, bits=8)}
    return layers


def write_packed(source: Path, out: Path, everything: bool = False) -> Path:
    """Write the packed checkpoint; returns ``out``."""
    return write_layers(source, out, packed_layers(source, everything))


def write_layers(source: Path, out: Path, layers: Mapping[str, Mapping[str, PackedProjection | Packed]]) -> Path:
    """Write a checkpoint of these packed modules, by layer; returns ``out``."""
    checkpoint = SourceCheckpoint.open(source)
    with CheckpointWriter(out) as writer:
        writer.begin({"test": 1})
        for name, packed in layers.items():
            writer.write_layer(name, packed, {"name": name})
        modules = writer.modules()
        writer.copy_rest(checkpoint, expert_tensor_names(checkpoint, skeleton(source).model, modules))
        about = {"quant_method": "moebius", "format_version": 1, "modules": modules}
        writer.finish(checkpoint, about, {"report.json": "{}\n"})
    return out


def save_packed_tiny(name: str, folder: Path, everything: bool = False, **overrides: Any) -> Path:
    """A tiny model saved in ``folder/source`` and packed in ``folder/packed``; returns the latter."""
    source = save_tiny(name, folder / "source", **overrides)
    return write_packed(source, folder / "packed", everything)


#: The number of layers of :func:`save_every_format`, one for each entry of :func:`_every_format`.
LAYERS = 5


def save_every_format(folder: Path) -> Path:
    """A tiny OLMoE with every format somewhere, in ``folder/packed``; returns that."""
    source = save_tiny("olmoe", folder / "source", num_hidden_layers=LAYERS)
    generator, layers = torch.Generator().manual_seed(0), {}
    for number, (gate_up, down) in enumerate(_every_format(8, 80, 48, 40)):
        name = f"model.layers.{number}.mlp.experts"
        pair = {"gate_up_proj": PackedProjection(**gate_up), "down_proj": PackedProjection(**down)}
        layers[name] = {f"{name}.{key}": random_projection(blank, generator) for key, blank in pair.items()}
    eight = {"batch": 1, "rows": 48, "columns": 48, "bits": 8, "group_size": 48}
    for name, spec in {"q_proj": eight, "o_proj": {**eight, "bits": 4, "group_size": 32}}.items():
        path = f"model.layers.0.self_attn.{name}"
        layers[path] = {path: random_contents(empty_like_spec({"format": "integers", **spec}), generator)}
    return write_layers(source, folder / "packed", layers)


def _every_format(experts: int, channels: int, hidden: int, inner: int) -> list[tuple[dict[str, Packed], dict[str, Packed]]]:
    """Parts of ``gate_up`` and ``down`` of each layer, on the meta device."""

    def blank(kind: str, batch: int, rows: int, columns: int, **fields: Any) -> Packed:
        return empty_like_spec({"format": kind, "batch": batch, "rows": rows, "columns": columns, **fields})

    def planes(side: str, directions: int, entries: int) -> Packed:
        widths = torch.tensor([[directions - e, directions // 2, 3] for e in range(experts)])
        return Planes.skeleton(widths, side=side, directions=directions, entries=entries, scale_bits=5)

    def rates(columns: int) -> torch.Tensor:
        return (torch.arange(columns) + torch.arange(experts).unsqueeze(1)) % 5

    right = Graded.skeleton(side="input", bits=[8] * 10 + [4] * 20, entries=hidden)
    left = Graded.skeleton(side="output", bits=[6] * 24, entries=hidden)
    return [
        (
            {"factor": planes("input", 30, channels), "right": right},
            {"factor": planes("output", 24, inner), "left": left},
        ),
        (
            {
                "factor": blank("signs", experts, 32, 28, salient=3),
                "left": blank("integers", 1, channels, 32, bits=8, group_size=128),
                "right": blank("dense", 1, 28, hidden, dtype="float16"),
            },
            {"factor": blank("signs", experts, hidden, inner), "bias": blank("dense", experts, 1, hidden, dtype="bfloat16")},
        ),
        (
            {
                "factor": blank("spectral", experts, channels, 20, transposed=True, group_size=40, payload_bytes=9000),
                "right": blank("dense", 1, 20, hidden, dtype="float32"),
            },
            {"factor": blank("codebook", experts, hidden, inner, code_bits=5, length=4, rank=2, row_scaled=True)},
        ),
        (
            {
                "factor": blank(
                    "grouped_signs", experts, channels, hidden, block=16, salient_block=48, salient=4, column_scaled=True
                )
            },
            {"factor": blank("integers", experts, hidden, inner, bits=3, group_size=16, zero_points=True)},
        ),
        (
            {"factor": Trellis.skeleton(rates(24), channels), "right": blank("integers", 1, 24, hidden, bits=6, group_size=16)},
            {"factor": Trellis.skeleton(rates(inner), 20), "left": blank("dense", 1, hidden, 20, dtype="float16")},
        ),
    ]


def save_quantized(folder: Path) -> list[Path]:
    """Tiny models as methods pack them, with the layers outside the experts at 8 and at 4 bits; returns their folders."""
    recipes = {
        "olmoe": Recipe.make("moebius", rest="int8"),
        "qwen2_moe": Recipe.make("mobie", router="binary", rest="int4"),
        "mixtral": Recipe.make("bitsmoe", 3),
        "qwen3_moe": Recipe.make("kbvq"),
    }
    settings = CalibrationSettings(windows=2, window_length=32)
    for name, recipe in recipes.items():
        quantize_model(save_tiny(name, folder / f"{name}-source"), folder / name, recipe, settings)
    return [folder / name for name in recipes]
