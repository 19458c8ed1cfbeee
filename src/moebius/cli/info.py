"""``moebius info``: what is in a checkpoint, and how many bits it really takes."""

from __future__ import annotations

import json
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moebius.cli.options import AsJson, Model
from moebius.cli.output import note, print_json, print_tables
from moebius.report.tables import TextTable, number
from moebius.report.tables import size as bytes_text
from moebius.source import display_name, path_or_hub_name

if TYPE_CHECKING:
    from moebius.evaluate.size import ModelSize

EXAMPLES = """[bold]Examples[/bold]

moebius info ./OLMoE-1bit --verify

moebius info ./OLMoE-1bit --json"""


def info(
    model: Model = None,
    verify: Annotated[bool, typer.Option("--verify", help="Compare every tensor with the manifest's hash.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say what a checkpoint holds: bits of experts, of the whole model and on disk, recipe, and tokens per expert.

    Every stored byte counts: signs, masks, scales, shared factors, padding. The paper's activated average (MoBiE Eq. 46) is
    what one token touches; it is smaller than what is stored, and labelled as such.
    """
    source = path_or_hub_name(model)

    from moebius.evaluate.info import checkpoint_info
    from moebius.hf.loading import quiet_transformers

    quiet_transformers()
    found = checkpoint_info(source, verified=verify)
    if as_json:
        print_json({"model": str(source), **found.to_dict()})
        return
    tables = [size_table(display_name(model), found.size)]
    if found.packed:
        tables += [module_table(found.size), recipe_table(found.quantization)]
    if counted := [layer for layer in found.layers if "tokens_per_expert" in layer]:
        tables.append(tokens_table(counted))
    print_tables(*tables)
    if said := found.size.not_loaded.line():
        note(said)
    if verify:
        note("verified: every tensor is the one that was written")


def size_table(name: str, size: ModelSize) -> TextTable:
    """The three figures that belong together, and the paper's."""
    activated = number(size.activated_bits_per_weight, 3) if size.top_k else "top-k not in the config"
    rows = [
        ("experts", f"{size.expert_weights:,}", bytes_text(size.expert_bits // 8), number(size.bits_per_expert_weight, 3)),
        ("whole model", f"{size.weights:,}", bytes_text(size.bits // 8), number(size.bits_per_weight, 3)),
    ]
    if size.file_bytes is not None:
        rows.append(("safetensors files", "", bytes_text(size.file_bytes), number(8 * size.file_bytes / size.weights, 3)))
    if size.folder_bytes is not None:
        rows.append(("on disk, all files", "", bytes_text(size.folder_bytes), number(8 * size.folder_bytes / size.weights, 3)))
    rows.append(("activated average (paper, Eq. 46)", "", "", activated))
    return TextTable(name, ("", "weights", "bytes", "bits per weight"), tuple(rows))


def module_table(size: ModelSize) -> TextTable:
    """One row per quantized module."""
    rows = tuple(
        (m.name, m.description, "×".join(map(str, m.shape)), bytes_text(m.stored_bits // 8), number(m.bits_per_weight, 3))
        for m in size.modules
    )
    return TextTable("Quantized modules", ("module", "stored as", "weights", "bytes", "bits per weight"), rows, text_columns=2)


def recipe_table(quantization: dict[str, Any]) -> TextTable:
    """Recipe and calibration."""
    settings = {
        **quantization.get("recipe", {}),
        **{f"calibration {k}": v for k, v in quantization.get("calibration", {}).items()},
    }
    rows = tuple((key, json.dumps(value) if isinstance(value, bool) else str(value)) for key, value in settings.items())
    return TextTable("Recipe", ("setting", "value"), rows, text_columns=2)


def tokens_table(layers: list[dict[str, Any]]) -> TextTable:
    """How many calibration tokens the experts of each layer saw, and which saw too few to stand alone."""
    rows = []
    for layer in layers:
        tokens = layer["tokens_per_expert"]
        shrunk = ", ".join(map(str, layer.get("leaned_on_layer", []))) or "none"
        rows.append((layer["name"], shrunk, *(f"{value:,.0f}" for value in (min(tokens), median(tokens), max(tokens)))))
    columns = ("layer", "experts shrunk towards their layer", "fewest", "median", "most")
    return TextTable("Tokens per expert during calibration", columns, tuple(rows), text_columns=2)
