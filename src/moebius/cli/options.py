"""Options that several commands share, and what is read out of them before anything heavy is imported."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from moebius.errors import CalibrationError, ModelNotFoundError, OutputError, RecipeError
from moebius.recipe import METHOD_OPTIONS, CalibrationSettings, Recipe
from moebius.reference_model import reference_path

Model = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="Folder or hub name. Default: the embedded reference model.", show_default=False),
]
Method = Annotated[str, typer.Option("--method", "-m", help=f"How to quantize: {', '.join(METHOD_OPTIONS)}.")]
Bits = Annotated[
    float | None,
    typer.Option("--bits", "-b", help="Bits per expert weight. Default: the method's own (below).", show_default=False),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", "-s", metavar="KEY=VALUE", help="An option of the method (below). May be repeated.", show_default=False
    ),
]
Rest = Annotated[
    Literal["bf16", "int8", "int4"],
    typer.Option("--rest", help="Linear layers outside the experts: as they are, or rounded to integers. The router stays."),
]
Calibration = Annotated[
    str,
    typer.Option(
        "--calibration",
        "-c",
        help='Calibration text: "builtin" (documentation and sources of Python), a .txt or .jsonl file, or a data'
        " set: wikitext2, c4, ptb or owner/name.",
    ),
]
Windows = Annotated[int, typer.Option(min=1, help="Windows of calibration tokens.")]
WindowLength = Annotated[int, typer.Option(min=2, help="Tokens per window.")]
Seed = Annotated[int, typer.Option(help="Which windows are drawn.")]
Temperature = Annotated[
    float, typer.Option("--temperature", min=0.0, help="0: the likeliest token every time; above: tokens are drawn.")
]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1 ...")]
DType = Annotated[Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Arithmetic; auto: as the checkpoint.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]


def model_or_reference(model: str | None) -> str:
    """MODEL as given, or the folder of the embedded reference model; a path that is not there is refused at once."""
    if model is None:
        return str(reference_path())
    path = Path(model).expanduser()
    if not path.exists() and (path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1):
        raise ModelNotFoundError(
            f"{model}: no such file or folder; give the folder of a checkpoint, or a hub name such as owner/model"
        )
    return str(path) if path.exists() else model


#: Words of a recipe that say what it looks at; their fields in :class:`CalibrationSettings`, and what those are.
CALIBRATION_WORDS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "calibration": ("text", str),
    "windows": ("windows", int),
    "window_length": ("window_length", int),
    "seed": ("seed", int),
}


def display_name(model: str | None) -> str:
    """What reports call the model: no path of this machine in the embedded case."""
    return "reference model" if model is None else Path(model).name


def recipe_from(method: str, bits: float | None, settings: list[str] | None, rest: str = Recipe.rest) -> Recipe:
    """The recipe that ``--method``, ``--bits``, ``--rest`` and ``--set`` describe."""
    options = parse_settings(settings or [])
    if rest != Recipe.rest and options.setdefault("rest", rest) != rest:
        raise RecipeError(f"--rest {rest}: --set rest={options['rest']} says otherwise; give one of them")
    return Recipe.make(method, bits, **options)


def recipe_from_text(text: str) -> Recipe:
    """The recipe that ``METHOD[@BITS] [KEY=VALUE ...]`` describes, such as ``"rtn@1 gain=true"``.

    Raises:
        RecipeError: not of that form.
    """
    head, *settings = text.split() or [""]
    method, at, bits = head.partition("@")
    try:
        number = float(bits) if at else None
    except ValueError:
        raise RecipeError(
            f"recipe {text!r}: got {bits!r} bits, wanted METHOD@BITS KEY=VALUE ..., such as 'rtn@1 gain=true'"
        ) from None
    return recipe_from(method, number, settings)


def candidate_from_text(text: str, calibration: CalibrationSettings) -> tuple[Recipe, CalibrationSettings]:
    """A recipe as :func:`recipe_from_text` reads it, and a calibration of its own where words such as ``windows=16`` ask for
    one.

    Raises:
        RecipeError: not of that form.
    """
    words = text.split()
    own = parse_settings([word for word in words if word.partition("=")[0] in CALIBRATION_WORDS])
    recipe = recipe_from_text(" ".join(word for word in words if word.partition("=")[0] not in CALIBRATION_WORDS))
    try:
        changed = {field: kind(own[word]) for word, (field, kind) in CALIBRATION_WORDS.items() if word in own}
    except ValueError:
        raise RecipeError(f"recipe {text!r}: wanted whole numbers for windows, window_length and seed") from None
    merged = {**calibration.to_dict(), **changed}
    return recipe, calibration_from(**merged)


def parse_settings(settings: list[str]) -> dict[str, str]:
    """``KEY=VALUE`` texts as a dictionary.

    Raises:
        RecipeError: a text without ``=``, or a key given twice.
    """
    parsed: dict[str, str] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not (key and equals and value):
            raise RecipeError(f"--set {setting}: got no key and value, wanted KEY=VALUE, such as gain=true")
        if key in parsed:
            raise RecipeError(f"--set {setting}: {key} was already set to {parsed[key]}; give it once")
        parsed[key] = value
    return parsed


def calibration_from(text: str, windows: int, window_length: int, seed: int, split: str = "train") -> CalibrationSettings:
    """The settings, after a look whether a file that is meant is there.

    Raises:
        CalibrationError: a path that does not exist.
    """
    require_text(text)
    return CalibrationSettings(text=text, windows=windows, window_length=window_length, seed=seed, split=split)


def require_text(text: str | None) -> None:
    """A text that is meant as a file is refused if it is not there.

    Raises:
        CalibrationError: a path that does not exist.
    """
    if text is not None and text.endswith((".txt", ".jsonl")) and not Path(text).expanduser().is_file():
        raise CalibrationError(f"{text}: no such file; give a .txt or .jsonl file, the name of a data set, or builtin")


def require_free(out: Path) -> Path:
    """The output folder, refused before any work if something is in it.

    Raises:
        OutputError: it is a file, or a folder that is not empty.
    """
    if (
        out.is_dir()
        and any(path.name != ".partial" for path in out.iterdir())
        and not (out / ".partial" / "moving.json").exists()
    ):
        raise OutputError(f"{out}: this folder is not empty; remove it or choose another with --out")
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: this is a file, wanted a folder; choose another with --out")
    return out


def require_device(device: str) -> str:
    """The device, refused if torch cannot use it.

    Raises:
        RecipeError: no such device here.
    """
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise RecipeError(f"--device {device}: torch cannot use it here; wanted cpu, or cuda where there is one") from None
    return device


def options_help() -> str:
    """Methods, their bits and options, for the end of a help page."""
    paragraphs = []
    for name, spec in METHOD_OPTIONS.items():
        bits = f"{spec.low} bit" if spec.low == spec.high else f"{spec.low} to {spec.high} bits, default {spec.default_bits:g}"
        paragraphs.append(f"[bold]{name}[/bold] ({bits}): {', '.join(sorted(spec.options))}")
    lines = [
        f"[cyan]{option.name}[/cyan]={_shown(option.default)}: {option.metadata['help']}{_choices(option)}"
        for option in dataclasses.fields(Recipe)
        if "help" in option.metadata
    ]
    return "\n\n".join(["[bold]Methods and the options they read[/bold]", *paragraphs, "[bold]Options[/bold] (--set)", *lines])


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _choices(option: dataclasses.Field[Any]) -> str:
    choices = option.metadata["choices"]
    return f" ({', '.join(map(str, choices))})" if choices else ""
