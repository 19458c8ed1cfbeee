"""Options that several commands share, and what is read out of them before anything heavy is imported."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from moebius.errors import CalibrationError, ModelNotFoundError, OutputError, RecipeError
from moebius.recipe import REST, CalibrationSettings, Recipe
from moebius.reference_model import reference_path

Model = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="Folder or hub name. Default: the reference model.", show_default=False),
]
Method = Annotated[str, typer.Option("--method", "-m", metavar="NAME", help="See moebius methods.")]
Bits = Annotated[
    float | None,
    typer.Option("--bits", "-b", metavar="N", help="Default: the method's own.", show_default=False),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="KEY=VALUE",
        help="An option of the method, see moebius methods NAME. May be repeated.",
        show_default=False,
    ),
]
Rest = Annotated[
    Literal["bf16", "int8", "int4"],
    typer.Option(
        "--rest",
        metavar="TYPE",
        help="Linear layers outside the experts: bf16 (default), int8, int4.",
        show_default=False,
    ),
]
Calibration = Annotated[
    str,
    typer.Option(
        "--calibration",
        "-c",
        metavar="TEXT",
        help="builtin (default), a .txt or .jsonl file, wikitext2, c4, ptb, redpajama, owner/name.",
        show_default=False,
    ),
]
Windows = Annotated[int, typer.Option(metavar="N", min=1, help="Windows to look at.")]
WindowLength = Annotated[int, typer.Option(metavar="N", min=2, help="Tokens per window.")]
Bos = Annotated[
    Literal["auto", "on", "off"],
    typer.Option("--bos", metavar="WHEN", help="Begin with BOS: auto (default), on, off.", show_default=False),
]
#: As far as PyTorch's generators and numpy's agree on.
LARGEST_SEED = 2**63 - 1


def _seed(value: int) -> int:
    if value > LARGEST_SEED:
        raise typer.BadParameter(f"{value} is not in the range 0<=x<={LARGEST_SEED}.")
    return value


Seed = Annotated[int, typer.Option(metavar="N", min=0, callback=_seed, help="Of what is drawn.")]
Temperature = Annotated[
    float, typer.Option("--temperature", min=0.0, help="0: the likeliest token every time; above: tokens are drawn.")
]
Device = Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1 ...")]
DType = Annotated[Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Arithmetic; auto: as the checkpoint.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on stdout, and nothing else there.")]
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
    "bos": ("bos", str),
}


def display_name(model: str | None) -> str:
    """What reports call the model: no path of this machine in the embedded case."""
    return "reference model" if model is None else Path(model).name


def recipe_from(method: str, bits: float | None, settings: list[str] | None, rest: str = REST.default) -> Recipe:
    """The recipe that ``--method``, ``--bits``, ``--rest`` and ``--set`` describe."""
    options = parse_settings(settings or [])
    if rest != REST.default and options.setdefault("rest", rest) != rest:
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


def calibration_from(
    text: str, windows: int, window_length: int, seed: int, split: str = "train", bos: str = "auto"
) -> CalibrationSettings:
    """The settings, after a look whether a file that is meant is there.

    Raises:
        CalibrationError: a path that does not exist.
    """
    require_text(text)
    if bos not in ("auto", "on", "off"):
        raise RecipeError(f"bos={bos}: wanted auto, on or off")
    return CalibrationSettings(text=text, windows=windows, window_length=window_length, seed=seed, split=split, bos=bos)


def require_text(text: str | None) -> None:
    """A text that is meant as a file is refused if it is not there.

    Raises:
        CalibrationError: a path that does not exist.
    """
    if text is not None and text.endswith((".txt", ".jsonl")) and not Path(text).expanduser().is_file():
        raise CalibrationError(f"{text}: no such file; give a .txt or .jsonl file, the name of a data set, or builtin")


def require_free(out: Path) -> Path:
    """The output folder, a home directory written as ``~`` found, refused before any work if something is in it.

    Raises:
        OutputError: it is a file, or a folder that is not empty.
    """
    out = out.expanduser()
    if out.is_dir() and any(out.iterdir()):
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


def require_temperature(temperature: float) -> None:
    """Refuse what is no number.

    Raises:
        RecipeError: NaN, which every comparison lets through.
    """
    if math.isnan(temperature):
        raise RecipeError(f"--temperature {temperature}: wanted 0 or more")
