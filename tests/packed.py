"""Packed checkpoints of the tiny models, with random factors in every format and on both sides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tests.tiny import save_tiny
from torch import Generator

from moebius.checkpoint.names import expert_tensor_names
from moebius.checkpoint.reader import SourceCheckpoint
from moebius.checkpoint.writer import CheckpointWriter
from moebius.formats import Packed, PackedProjection
from moebius.formats.dense import Dense
from moebius.formats.integers import Integers
from moebius.formats.signs import Signs
from moebius.models.load import skeleton

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
    checkpoint = SourceCheckpoint.open(source)
    with CheckpointWriter(out) as writer:
        writer.begin({"test": 1})
        for name, packed in packed_layers(source, everything).items():
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
