"""``moebius plan``: what a recipe would make of a model, from its config alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from moebius.cli.options import AsJson, Bits, Method, Rest, Set, WindowLength, Windows
from moebius.cli.output import note, print_json, print_tables
from moebius.recipe import DEFAULT_METHOD, CalibrationSettings
from moebius.recipe_text import recipe_from
from moebius.report.tables import TextTable, number
from moebius.report.tables import size as bytes_text
from moebius.source import display_name, path_or_hub_name

if TYPE_CHECKING:
    from moebius.evaluate.plan import Plan

EXAMPLES = """[bold]Examples[/bold]

moebius plan Qwen/Qwen3-30B-A3B --method mobie

moebius plan ./config.json --method gptq --bits 2 --windows 128 --window-length 2048"""


def plan(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A config.json, folder or hub name. Default: the reference model.",
            show_default=False,
        ),
    ] = None,
    method: Method = DEFAULT_METHOD,
    bits: Bits = None,
    rest: Rest = "bf16",
    set_: Set = None,
    windows: Windows = CalibrationSettings.windows,
    window_length: WindowLength = CalibrationSettings.window_length,
    as_json: AsJson = False,
) -> None:
    """Say what a recipe would make of a model, and what it takes to get there, without reading a weight.

    Sizes are exact: they count the tensors that quantize would write. Memory is an estimate from shapes; the interpreter and
    its libraries, half a gigabyte, come on top.
    """
    recipe = recipe_from(method, bits, set_, rest)
    source = str(path_or_hub_name(model))

    from moebius.evaluate.plan import plan_model
    from moebius.hf.loading import quiet_transformers

    quiet_transformers()
    planned = plan_model(source, recipe, CalibrationSettings(windows=windows, window_length=window_length))
    if as_json:
        print_json({"model": source, "recipe": recipe.to_dict(), **planned.to_dict()})
    else:
        print_tables(*plan_tables(display_name(model), recipe.method, planned))
        if said := planned.before.not_loaded.line():
            note(said)


def plan_tables(name: str, method: str, plan: Plan) -> list[TextTable]:
    """Size before and after, and peak memory."""
    before, after = plan.before, plan.after
    rows = (
        ("experts, bytes", bytes_text(before.expert_bits // 8), bytes_text(after.expert_bits // 8)),
        ("experts, bits per weight", number(before.bits_per_expert_weight, 3), number(after.bits_per_expert_weight, 3)),
        ("whole model, bytes", bytes_text(before.bits // 8), bytes_text(after.bits // 8)),
        ("whole model, bits per weight", number(before.bits_per_weight, 3), number(after.bits_per_weight, 3)),
        (
            "activated average (paper, Eq. 46)",
            number(before.activated_bits_per_weight, 3),
            number(after.activated_bits_per_weight, 3),
        ),
    )
    memory = plan.memory
    memory_rows = (
        ("all the time: weights of one layer and what is outside of the layers", bytes_text(memory.model)),
        ("all the time: hidden states of the calibration tokens", bytes_text(memory.hidden_states)),
        ("at the loss: logits of one window", bytes_text(memory.logits)),
        ("at the loss: the head in float32", bytes_text(memory.head)),
        ("per layer: its weights in float32", bytes_text(memory.layer)),
        ("per layer: activations of one batch", bytes_text(memory.activations)),
        ("per layer: statistics", bytes_text(memory.statistics)),
        ("per layer: copies while a projection is quantized", bytes_text(memory.workspace)),
        ("peak", bytes_text(memory.total)),
    )
    title = f"{name}: {before.weights:,} weights, {before.expert_weights:,} in the experts of {plan.moe_layers} layers"
    return [
        TextTable(title, ("", "before", f"after {method}"), rows),
        TextTable("Memory while quantizing", ("", "bytes"), memory_rows),
    ]
