"""``moebius quantize``: a checkpoint in, a packed checkpoint out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moebius.checks import require_device, require_free
from moebius.cli.options import (
    AsJson,
    Bits,
    Bos,
    Calibration,
    Device,
    Method,
    Model,
    Quiet,
    Rest,
    Seed,
    Set,
    WindowLength,
    Windows,
)
from moebius.cli.output import note, print_json, print_tables, progress_bars
from moebius.recipe import DEFAULT_METHOD, CalibrationSettings, Recipe
from moebius.recipe_text import calibration_from, recipe_from
from moebius.source import display_name, path_or_hub_name
from moebius.unfinished import is_begun

EXAMPLES = """[bold]Examples[/bold] (moebius methods NAME: what a method can be told)

moebius quantize ./model --bits 0.5 --windows 256 --refine

moebius quantize owner/model -m mobie --set gain=true --rest int8 -o out"""


def quantize(
    model: Model = None,
    method: Method = DEFAULT_METHOD,
    bits: Bits = None,
    rest: Rest = "bf16",
    set_: Set = None,
    refine: Annotated[
        bool,
        typer.Option(
            "--refine",
            help="Train scales afterwards (moebius only).",
        ),
    ] = False,
    calibration: Calibration = CalibrationSettings.text,
    windows: Windows = CalibrationSettings.windows,
    window_length: WindowLength = CalibrationSettings.window_length,
    bos: Bos = "auto",
    seed: Seed = CalibrationSettings.seed,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FOLDER", help="Default: ./MODEL-METHOD-BITSbit.", show_default=False),
    ] = None,
    device: Device = "cpu",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Quantize the experts of a model into a checkpoint that transformers loads.

    A run that was stopped goes on where it was. The output folder appears at the end, complete.
    """
    recipe = recipe_from(method, bits, [*(set_ or []), *(["refine=true"] if refine else [])], rest)
    settings = calibration_from(calibration, windows, window_length, seed, bos=bos)
    source = str(path_or_hub_name(model))
    folder = (out or default_folder(source, recipe)).expanduser()
    if not is_begun(folder):  # else the run looks closer: what is there may be what an earlier one left
        require_free(folder)

    from moebius.evaluate.size import packed_checkpoint_size
    from moebius.hf.loading import quiet_transformers
    from moebius.memory import WHILE_QUANTIZING, keep_freed_memory
    from moebius.pipeline import quantize_model

    require_device(device)
    quiet_transformers()
    keep_freed_memory(WHILE_QUANTIZING)
    with progress_bars(hidden=quiet) as progress:
        report = quantize_model(source, folder, recipe, settings, device=device, progress=progress)
    size = packed_checkpoint_size(folder)
    if as_json:
        print_json({"out": str(folder), "size": size.to_dict(), "report": report})
        return

    from moebius.cli.info import size_table

    print_tables(size_table(f"{display_name(model)} → {folder}", size))
    if said := size.not_loaded.line():
        note(said)
    seconds = ", ".join(f"{stage} {value:.1f} s" for stage, value in report["seconds"].items())
    note(f"{seconds}; peak memory {report['peak_memory_bytes'] / 1e9:.2f} GB")
    note(f'AutoModelForCausalLM.from_pretrained("{folder}") loads it; or: moebius generate {folder}')


def default_folder(source: str, recipe: Recipe) -> Path:
    """``./MODEL-METHOD-BITSbit``."""
    return Path(f"{Path(source).resolve().name}-{recipe.method}-{recipe.bits:g}bit")
