"""``moebius info``: what is in a checkpoint, and how many bits it really takes."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moebius.cli.options import AsJson, Model, display_name, model_or_reference
from moebius.cli.output import note, print_json, print_tables
from moebius.errors import CheckpointError
from moebius.json_file import field, read_object
from moebius.report.tables import TextTable, number
from moebius.report.tables import size as bytes_text

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
    source = model_or_reference(model)

    from moebius.checkpoint.manifest import read_packed_config
    from moebius.checkpoint.manifest import verify as verify_manifest
    from moebius.cli.loading import checkpoint_folder, quiet_transformers
    from moebius.evaluate.plan import checkpoint_size
    from moebius.evaluate.size import is_packed, packed_checkpoint_size

    quiet_transformers()
    folder = checkpoint_folder(source)
    packed = is_packed(folder)
    if verify and not packed:
        raise CheckpointError(f"{source}: got a checkpoint that Moebius did not pack, which has no manifest to verify")
    if verify:
        verify_manifest(folder, hashes=True)
    size = packed_checkpoint_size(folder) if packed else checkpoint_size(folder)
    quantization = read_packed_config(folder)[1] if packed else {}
    layers = report_layers(folder) if packed else []
    if as_json:
        recipe = {key: quantization[key] for key in ("format_version", "recipe", "calibration") if key in quantization}
        print_json({"model": source, "verified": verify, **size.to_dict(), **recipe, "layers": layers})
        return
    tables = [size_table(display_name(model), size)]
    if packed:
        tables += [module_table(size), recipe_table(quantization)]
    if counted := [layer for layer in layers if "tokens_per_expert" in layer]:
        tables.append(tokens_table(counted))
    print_tables(*tables)
    if said := size.not_loaded.line():
        note(said)
    if verify:
        note("verified: every tensor is the one that was written")


def report_layers(folder: Path) -> list[dict[str, Any]]:
    """What the report of a packed checkpoint says of its layers; nothing where there is no report.

    Raises:
        CheckpointError: a report that cannot be read, or is none.
    """
    path = folder / "moebius_report.json"
    if not path.exists():
        return []
    layers: list[Any] = field(read_object(path), "layers", list, path, [])
    for layer in layers:
        counts = layer.get("tokens_per_expert", [0]) if isinstance(layer, dict) else None
        named = isinstance(layer, dict) and isinstance(layer.get("name"), str)
        if not named or not isinstance(counts, list) or not counts or not all(isinstance(n, int) for n in counts):
            raise CheckpointError(f"{path}: layers hold {str(layer)[:60]!r}, wanted names and counts; fetch it again")
    return layers


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
        leaned = ", ".join(map(str, layer["leaned_on_layer"])) or "none"
        rows.append((layer["name"], leaned, *(f"{value:,.0f}" for value in (min(tokens), median(tokens), max(tokens)))))
    columns = ("layer", "experts that leaned on their layer", "fewest", "median", "most")
    return TextTable("Tokens per expert during calibration", columns, tuple(rows), text_columns=2)
