"""``moebius quantize``: a checkpoint in, a packed checkpoint out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moebius.cli.options import (
    AsJson,
    Bits,
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
    calibration_from,
    display_name,
    model_or_reference,
    options_help,
    recipe_from,
    require_device,
    require_free,
)
from moebius.cli.output import note, print_json, print_tables, progress_bars
from moebius.recipe import CalibrationSettings, Recipe

EXAMPLES = f"""[bold]Examples[/bold]

moebius quantize

moebius quantize allenai/OLMoE-1B-7B-0924 --method mobie --set gain=true --out OLMoE-1bit

moebius quantize ./model --bits 0.75 --rest int8

moebius quantize ./model --bits 0.5 --windows 256 --refine

moebius quantize ./model --method gptq --bits 2 --calibration wikitext2 --windows 128 --window-length 2048

{options_help()}"""


def quantize(
    model: Model = None,
    method: Method = Recipe.method,
    bits: Bits = None,
    rest: Rest = "bf16",
    set_: Set = None,
    refine: Annotated[
        bool,
        typer.Option(
            "--refine",
            help="Afterwards train scales and bases for some minutes, so that the logits become the original's. The size stays"
            " the same; moebius only; the same as --set refine=true.",
        ),
    ] = False,
    calibration: Calibration = CalibrationSettings.text,
    windows: Windows = CalibrationSettings.windows,
    window_length: WindowLength = CalibrationSettings.window_length,
    seed: Seed = CalibrationSettings.seed,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder to write. Default: ./MODEL-METHOD-BITSbit.", show_default=False),
    ] = None,
    device: Device = "cpu",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Quantize the experts of a model and write a checkpoint that transformers loads.

    Finished layers are kept in a hidden folder beside the output: a run that was stopped goes on where it was when the same
    command is given again. The output folder appears at the end, complete.
    """
    recipe = recipe_from(method, bits, [*(set_ or []), *(["refine=true"] if refine else [])], rest)
    settings = calibration_from(calibration, windows, window_length, seed)
    source = model_or_reference(model)
    # As given in messages; a folder that gave way to another one is found again by its whole path.
    folder = require_free((out or default_folder(source, recipe)).expanduser())
    folder = folder if folder.is_absolute() or str(folder) != "." else folder.absolute()

    from moebius.cli.loading import quiet_transformers
    from moebius.evaluate.size import packed_checkpoint_size
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
    seconds = ", ".join(f"{stage} {value:.1f} s" for stage, value in report["seconds"].items())
    note(f"{seconds}; peak memory {report['peak_memory_bytes'] / 1e9:.2f} GB")
    note(f'import moebius, then AutoModelForCausalLM.from_pretrained("{folder}"); or: moebius generate {folder}')


def default_folder(source: str, recipe: Recipe) -> Path:
    """``./MODEL-METHOD-BITSbit``."""
    return Path(f"{Path(source).resolve().name}-{recipe.method}-{recipe.bits:g}bit")
