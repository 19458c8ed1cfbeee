"""``moebius compare``: several recipes on one model, one table, one figure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moebius.cli.options import (
    AsJson,
    Calibration,
    Device,
    Model,
    Quiet,
    Seed,
    WindowLength,
    Windows,
    calibration_from,
    candidate_from_text,
    display_name,
    model_or_reference,
    require_device,
    require_free,
)
from moebius.cli.output import note, print_json, print_tables, progress_bars
from moebius.errors import OutputError, RecipeError
from moebius.recipe import CalibrationSettings, Recipe
from moebius.report.comparison import ComparisonRow, comparison_table, samples_markdown, verdict
from moebius.report.tables import TextTable

if TYPE_CHECKING:
    from moebius.cli.comparison_run import Comparison

#: Label and recipe of every row of a preset, in the order of the table.
PRESETS = {
    "demo": [(text, text) for text in ("rtn@1", "gptq@2", "mobie", "mobie gain=true", "moebius")],
    # Table 4 of MoBiE: which of its three parts buys what.
    "ablation": [
        (label, f"mobie cejd={cejd} glas={glas} nges={nges}")
        for label, cejd, glas, nges in (
            ("none", "false", "false", "false"),
            ("CEJD", "true", "false", "false"),
            ("GLAS", "false", "true", "false"),
            ("NGES", "false", "false", "true"),
            ("CEJD + GLAS", "true", "true", "false"),
            ("CEJD + GLAS + NGES", "true", "true", "true"),
        )
    ],
    # Table 5 of KBVQ-MoE, figures 10 and 11 of MoBiE: their parts on other methods.
    "plug-and-play": [
        (text, text)
        for text in (
            *(f"{method}{parts}" for method in ("billm", "arb") for parts in ("", " glas=true", " glas=true nges=true")),
            *(
                f"{method}@2{parts}"
                for method in ("gptvq", "vptq")
                for parts in ("", " idre=true", " bcos=mean_variance", " idre=true bcos=mean_variance")
            ),
        )
    ],
    # Table 5 of MoBiE, and the pull of its null-space scales.
    "shared-bits": [(f"{bits} bit", f"mobie shared_bits={bits}") for bits in (16, 8, 4)],
    "lambda": [(f"λ = 0.{tenth}", f"mobie nges_lambda=0.{tenth}") for tenth in range(1, 10)],
    # Tables 4, 7, 14 and 15 of KBVQ-MoE.
    "klt": [
        ("SVD", "kbvq@2 klt=false"),
        ("KLT-SVD", "kbvq@2"),
        *((f"KLT-SVD, rank in/{share}", f"kbvq@2 rank_share={1 / share}") for share in (256, 64, 32)),
    ],
    "bcos": [(mode, f"kbvq@2 bcos={mode}") for mode in ("off", "mean", "variance", "mean_variance", "regression")],
    # Figure 9 of MoBiE: how much it needs to see, and how much it matters what.
    "calibration": [
        *((f"{windows} windows", f"mobie gain=true windows={windows}") for windows in (8, 16, 32, 64, 128)),
        *((f"seed {seed}", f"mobie gain=true seed={seed}") for seed in (1, 2, 3)),
    ],
    "methods": [
        (text, text)
        for text in (
            *(f"{method}@1{gain}" for method in ("rtn", "gptq") for gain in ("", " gain=true")),
            *("mobie", "mobie gain=true", "rtn@2 gain=true", "gptq@2", "gptq@2 act_order=true", "gptq@2 gain=true"),
            *("awq@2", "moequant@2", "mxmoe@2.25"),
            *("gptvq@2 error_feedback=false", "gptvq@2", "vptq@2", "nowag@2", "kbvq@2", "bitsmoe@2"),
            *(f"{method}{parts}" for method in ("arb", "billm") for parts in ("", " gain=true glas=true nges=true")),
            *("gptq@3", "awq@3", "bitsmoe@3"),
        )
    ],
}
#: Presets in which every recipe has a row of ``moebius`` beside it.
MATCHED = ("methods",)

EXAMPLES = """[bold]Examples[/bold]

moebius compare --preset demo --samples 3 --out demo

moebius compare --preset ablation

moebius compare ./model --recipe "mobie gain=true" --recipe "rtn@1 gain=true" --calibration wikitext2 --text wikitext2

moebius compare ./model --recipe vptq@2 --calibration wikitext2 --text wikitext2 --add

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
    add: Annotated[bool, typer.Option("--add", help="Add the recipes to the finished comparison in --out.")] = False,
    device: Device = "cpu",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Quantize a model with several recipes and set the results against each other and the original.

    Every row is measured on the packed checkpoint as transformers loads it, on held-out windows. The output folder gets
    results.json, comparison.md, comparison.png and the packed checkpoints. Recipes are checked against the model before the
    first is quantized; the table grows row by row, hidden beside the output until all are there.
    """
    settings = calibration_from(calibration, windows, window_length, seed)
    candidates = chosen_recipes(recipe or [], preset, settings)
    held_out = calibration_from(text, text_windows, window_length, seed, split="held-out")
    source = model_or_reference(model)
    out = out.expanduser() if add else require_free(out)
    finished = finished_comparison(out) if add else None

    from moebius.checkpoint.reader import SourceCheckpoint
    from moebius.cli.comparison_run import Comparison, WorkFolder, added_to, run_comparison
    from moebius.evaluate.samples import PROMPTS
    from moebius.memory import WHILE_QUANTIZING, keep_freed_memory

    require_device(device)
    comparison = Comparison(source, candidates, held_out, PROMPTS[:samples], device, settings if preset in MATCHED else None)
    about = {"model": display_name(model), "model_sha256": SourceCheckpoint.open(source).fingerprint()}
    if finished is not None:
        if finished.get("model_sha256") != about["model_sha256"]:
            raise OutputError(f"{out}: compares {finished['model']}, whose files are other ones; choose another --out")
        comparison = added_to(comparison, finished)
    work = WorkFolder(out, {"source": source, **comparison.to_dict()}, comparison.finished)
    keep_freed_memory(WHILE_QUANTIZING)
    written = _Written(work.folder, about, settings)
    with progress_bars(hidden=quiet) as progress:
        comparison, rows = run_comparison(comparison, work, progress, written.grown)
    table, results = written.finished(comparison, rows)
    work.finish()
    if as_json:
        print_json(results)
        return
    print_tables(table, *_sample_tables(rows, comparison.prompts))
    note(f"written to {out}: {', '.join(sorted(p.name for p in out.iterdir()))}")


def finished_comparison(out: Path) -> dict[str, Any]:
    """What a finished comparison says of itself.

    Raises:
        OutputError: there is none in this folder.
    """
    try:
        found: dict[str, Any] = json.loads((out / "results.json").read_text())
        _ = [found[name] for name in ("model", "recipes", "text", "prompts", "matched", "rows")]
    except (OSError, ValueError, KeyError, TypeError):
        raise OutputError(f"{out}: has no finished comparison to add to; leave out --add, or name the folder of one") from None
    return found


class _Written:
    """What a comparison writes into its folder, after every row and at the end."""

    def __init__(self, folder: Path, about: dict[str, str], settings: CalibrationSettings) -> None:
        self.folder, self.about, self.settings = folder, about, settings

    def grown(self, comparison: Comparison, rows: Sequence[ComparisonRow]) -> None:
        """The rows so far: results.json and comparison.md."""
        self._write(comparison, rows)

    def finished(self, comparison: Comparison, rows: Sequence[ComparisonRow]) -> tuple[TextTable, dict[str, Any]]:
        """All rows, with the figure where matplotlib is installed."""
        table, results = self._write(comparison, rows)
        if find_spec("matplotlib") is None:
            note("no figure: matplotlib is not installed; pip install 'moebius[plots]'")
        else:
            from moebius.report.figures import comparison_figure

            comparison_figure(rows, self.folder / "comparison.png")
        return table, results

    def _write(self, comparison: Comparison, rows: Sequence[ComparisonRow]) -> tuple[TextTable, dict[str, Any]]:
        from moebius.cli.comparison_run import folder_name

        table = comparison_table(rows, title=self.about["model"], note=self._comment(comparison, rows))
        results = {
            **self.about,
            **comparison.to_dict(),
            "rows": [{**row.to_dict(), "folder": None if row.recipe is None else folder_name(row.label)} for row in rows],
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        samples = f"\n{samples_markdown(rows, comparison.prompts)}" if comparison.prompts else ""
        contents = {
            "results.json": json.dumps(results, indent=1) + "\n",
            "comparison.md": f"{table.markdown()}\n{table.note}\n{samples}",
        }
        for name, content in contents.items():  # readers find the table before or after a row, never half of one
            draft = self.folder / f"{name}.tmp"
            draft.write_text(content)
            draft.replace(self.folder / name)
        return table, results

    def _comment(self, comparison: Comparison, rows: Sequence[ComparisonRow]) -> str:
        held_out, settings = comparison.held_out, self.settings
        others = any(own != settings for _, own in comparison.candidates.values())
        comment = (
            f"{held_out.windows * (held_out.window_length - 1):,} held-out tokens of {held_out.text!r};"
            f" calibration on {settings.windows} windows of {settings.window_length} of {settings.text!r}"
            f"{', unless the recipe says otherwise' if others else ''}"
        )
        return f"{comment}\n{verdict(rows)}" if comparison.matched is not None else comment


def chosen_recipes(
    texts: list[str], preset: str | None, calibration: CalibrationSettings
) -> dict[str, tuple[Recipe, CalibrationSettings]]:
    """Label to recipe and what it looks at, of the preset first.

    Raises:
        RecipeError: two recipes with one label.
    """
    presets = PRESETS[preset or "demo"] if preset or not texts else []
    candidates: dict[str, tuple[Recipe, CalibrationSettings]] = {}
    for label, text in [*presets, *((" ".join(text.split()), text) for text in texts)]:
        if label in candidates:
            raise RecipeError(f"recipe {label!r}: got it twice, wanted every recipe once")
        candidates[label] = candidate_from_text(text, calibration)
    return candidates


def _sample_tables(rows: list[ComparisonRow], prompts: tuple[str, ...]) -> list[TextTable]:
    """For every prompt, what each model wrote after it."""
    return [
        TextTable(
            f"After {prompt!r}", ("model", "completion"), tuple((row.label, row.completions[i].strip()) for row in rows), 2
        )
        for i, prompt in enumerate(prompts)
    ]
