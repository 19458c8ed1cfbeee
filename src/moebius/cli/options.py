"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from moebius.checks import LARGEST_SEED

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
