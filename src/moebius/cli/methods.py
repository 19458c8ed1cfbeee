"""``moebius methods``: which methods there are, and what each can be told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from moebius.cli.options import AsJson
from moebius.cli.output import print_json, print_tables
from moebius.options import Option
from moebius.recipe import COMMON
from moebius.report.tables import TextTable
from moebius.table import METHODS

if TYPE_CHECKING:
    from moebius.methods import Method

EXAMPLES = """[bold]Examples[/bold]

moebius methods

moebius methods mobie

moebius quantize ./model --method mobie --set side=hidden --set gain=true"""


def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="One method, with its options. Default: all.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the methods; or the options of one, their defaults (by bits, where they differ), ranges and what they do.

    Options are given to quantize, plan and bench as --set KEY=VALUE, and to compare as words of a recipe.
    """
    chosen: dict[str, Method] = {known: METHODS[known] for known in METHODS} if name is None else {name: METHODS[name]}
    if as_json:
        print_json({known: _described(method) for known, method in chosen.items()})
    elif name is None:
        print_tables(_overview(chosen))
    else:
        method = chosen[name]
        title = f"{name}: {method.summary}\nbits: {_bits(method)}"
        print_tables(
            _option_table(title, method.options.options), _option_table("Every method: what lies outside the experts", COMMON)
        )


def _overview(chosen: dict[str, Method]) -> TextTable:
    rows = tuple((name, _bits(method), method.summary) for name, method in chosen.items())
    return TextTable("Methods", ("method", "bits", "what it is"), rows, 3, note="moebius methods NAME: the options of one")


def _bits(method: Method) -> str:
    options = method.options
    default = "" if options.low == options.high else f", default {options.default_bits:g}"
    return f"{options.bits_text()}{default}"


def _option_table(title: str, options: tuple[Option, ...]) -> TextTable:
    rows = tuple((option.name, option.default_text(), option.range_text(), option.help) for option in options)
    return TextTable(title, ("--set", "default", "values", "what it does"), rows, text_columns=4)


def _described(method: Method) -> dict[str, Any]:
    """A method, ready for JSON."""
    options = method.options
    return {
        "summary": method.summary,
        "bits": {"low": options.low, "high": options.high, "step": options.step, "default": options.default_bits},
        "options": {option.name: _option(option) for option in (*options.options, *COMMON)},
    }


def _option(option: Option) -> dict[str, Any]:
    defaults = {"default": option.default, "default_from_bits": {f"{bits:g}": value for bits, value in option.from_bits}}
    limits = {} if option.choices or not option.limited else {"low": option.low, "high": option.high}
    choices = {"choices": list(option.choices)} if option.choices else {}
    return {**defaults, **limits, **choices, "help": option.help}
