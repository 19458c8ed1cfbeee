"""``moebius compare``: several recipes on one model, one table, one figure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from moebius.checks import require_device, require_free
from moebius.cli.options import AsJson, Calibration, Device, Model, Quiet, Seed, WindowLength, Windows
from moebius.cli.output import note, print_json, print_tables, progress_bars
from moebius.compare.presets import MATCHED, chosen_recipes
from moebius.recipe import CalibrationSettings
from moebius.recipe_text import calibration_from
from moebius.source import display_name, path_or_hub_name

EXAMPLES = """[bold]Examples[/bold]

moebius compare --preset demo --samples 3 --out demo

moebius compare --preset ablation

moebius compare ./model --add --out demo --recipe awq@2

moebius compare ./model --recipe "mobie gain=true" --recipe "rtn@1 gain=true" --calibration wikitext2 --text wikitext2

[bold]Presets[/bold]

demo: rtn at 1 bit, gptq at 2 bit, mobie, mobie with gain, moebius at 1 bit

ablation: mobie with and without CEJD, GLAS and NGES, the six combinations of the paper's Table 4

plug-and-play: GLAS and NGES on billm and arb, IDRE and BCOS on gptvq and vptq

shared-bits, lambda: the shared factor of mobie at 16, 8 and 4 bit; its null-space pull from 0.1 to 0.9

klt, bcos: the parts of kbvq, with and without the coordinates of the inputs, at several ranks; what BCOS corrects

calibration: mobie with 8 to 128 windows, and with other seeds

methods: every other method at one, two and three bits, and moebius at just below what each of them stores"""

_RECIPE_HELP = (
    'METHOD or METHOD@BITS, followed by KEY=VALUE words, such as "rtn@1 gain=true". The words calibration, windows,'
    " window_length and seed give this recipe a calibration of its own. May be repeated."
)


def compare(
    model: Model = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option("--recipe", "-r", metavar="RECIPE", help=_RECIPE_HELP, show_default=False),
    ] = None,
    preset: Annotated[
        Literal["demo", "ablation", "plug-and-play", "shared-bits", "lambda", "klt", "bcos", "calibration", "methods"] | None,
        typer.Option(help="Recipes that go together. Without --recipe: demo.", show_default=False),
    ] = None,
    calibration: Calibration = CalibrationSettings.text,
    windows: Windows = CalibrationSettings.windows,
    window_length: WindowLength = CalibrationSettings.window_length,
    seed: Seed = CalibrationSettings.seed,
    text: Annotated[str, typer.Option("--text", "-t", help="Held-out text to evaluate on; see moebius evaluate.")] = "builtin",
    text_windows: Annotated[int, typer.Option(min=1, help="Windows of held-out tokens.")] = 64,
    samples: Annotated[int, typer.Option(min=0, max=3, help="Completions per model.")] = 0,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")] = Path("moebius-comparison"),
    add: Annotated[bool, typer.Option("--add", help="Put the recipes into the finished comparison in --out.")] = False,
    device: Device = "cpu",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Quantize a model with several recipes and set the results against each other and the original.

    Every row is measured on the packed checkpoint as transformers loads it, on held-out windows. The output folder gets
    results.json, comparison.md, comparison.png and the packed checkpoints; until all is done they grow, row by row, in a hidden
    folder beside it. Every recipe is checked against the model before the first is quantized.
    """
    settings = calibration_from(calibration, windows, window_length, seed)
    candidates = chosen_recipes(recipe or [], preset, settings)
    held_out = calibration_from(text, text_windows, window_length, seed, split="held-out")
    source = str(path_or_hub_name(model))
    out = out.expanduser() if add else require_free(out)

    from moebius.compare.results import Comparison, has_figures
    from moebius.compare.run import compare_models
    from moebius.generation.complete import PROMPTS
    from moebius.hf.loading import quiet_transformers
    from moebius.memory import WHILE_QUANTIZING, keep_freed_memory

    require_device(device)
    quiet_transformers()
    matched = settings if preset in MATCHED else None
    comparison = Comparison(display_name(model), source, candidates, settings, held_out, PROMPTS[:samples], device, matched)
    keep_freed_memory(WHILE_QUANTIZING)
    with progress_bars(hidden=quiet) as progress:
        result = compare_models(comparison, out, progress, add=add)
    if as_json:
        print_json(result.to_dict())
        return
    print_tables(result.table(), *result.sample_tables())
    if not has_figures():
        note("no figure: matplotlib is not installed; pip install 'moebius[plots]'")
    note(f"written to {out}: {', '.join(sorted(p.name for p in out.iterdir()))}")
