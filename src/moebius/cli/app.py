"""The commands put together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from moebius.cli import errors
from moebius.cli.bench import EXAMPLES as BENCH_EXAMPLES
from moebius.cli.bench import bench
from moebius.cli.chat import EXAMPLES as CHAT_EXAMPLES
from moebius.cli.chat import chat
from moebius.cli.compare import EXAMPLES as COMPARE_EXAMPLES
from moebius.cli.compare import compare
from moebius.cli.evaluate import EXAMPLES as EVALUATE_EXAMPLES
from moebius.cli.evaluate import evaluate
from moebius.cli.generate import EXAMPLES as GENERATE_EXAMPLES
from moebius.cli.generate import generate
from moebius.cli.info import EXAMPLES as INFO_EXAMPLES
from moebius.cli.info import info
from moebius.cli.methods import EXAMPLES as METHODS_EXAMPLES
from moebius.cli.methods import methods
from moebius.cli.plan import EXAMPLES as PLAN_EXAMPLES
from moebius.cli.plan import plan
from moebius.cli.quantize import EXAMPLES as QUANTIZE_EXAMPLES
from moebius.cli.quantize import quantize
from moebius.cli.reproduce import EXAMPLES as REPRODUCE_EXAMPLES
from moebius.cli.reproduce import reproduce

_ABOUT = (
    "Mixture-of-Experts language models at one bit: quantize, pack, load and run them.\n\n"
    "MODEL is the folder of a transformers checkpoint or its name on the Hugging Face hub. Without it, every command takes the"
    " reference model that is part of this package."
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"moebius {version('moebius')}")
        raise typer.Exit


@app.callback(help=_ABOUT)
def moebius(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="MOEBIUS_DEBUG", help="Show the traceback of an unexpected error.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What comes before the command."""
    errors.show_tracebacks(debug)


def _paragraphs(command: Callable[..., None]) -> str:
    """The docstring of a command with one line per paragraph: the terminal breaks lines where it likes."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in (command.__doc__ or "").split("\n\n"))


for command, examples in (
    (quantize, QUANTIZE_EXAMPLES),
    (evaluate, EVALUATE_EXAMPLES),
    (generate, GENERATE_EXAMPLES),
    (chat, CHAT_EXAMPLES),
    (info, INFO_EXAMPLES),
    (plan, PLAN_EXAMPLES),
    (compare, COMPARE_EXAMPLES),
    (reproduce, REPRODUCE_EXAMPLES),
    (bench, BENCH_EXAMPLES),
    (methods, METHODS_EXAMPLES),
):
    resumes = command in (quantize, compare, reproduce)
    app.command(help=_paragraphs(command), epilog=examples)(errors.reported(command, resumes))
