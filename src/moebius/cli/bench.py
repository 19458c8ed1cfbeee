"""``moebius bench``: how fast a packed model runs and what it takes of memory, beside its original."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from moebius.bench.request import BenchRequest
from moebius.checks import require_device
from moebius.cli.options import AsJson, Bits, Device, DType, Method, Quiet, Rest, Set
from moebius.cli.output import note, print_json, print_tables, progress_bars
from moebius.errors import OutputError
from moebius.recipe import DEFAULT_METHOD
from moebius.recipe_text import recipe_from
from moebius.report.tables import TextTable, number, percent
from moebius.report.tables import size as bytes_text
from moebius.source import path_or_hub_name

EXAMPLES = """[bold]Examples[/bold]

moebius bench

moebius bench ./OLMoE-1bit --original allenai/OLMoE-1B-7B-0924

moebius bench --shape olmoe-1b-7b --rest int4 --threads 2

moebius bench --shape qwen3-30b-a3b --original-layers 8

moebius bench --shape qwen1.5-moe --batch 4 --prompt 1024 --context 1024 --new 256 --device cuda

The last one is the setting of MoBiE's paper, for a GPU.

[bold]What is measured[/bold]

Each model runs in a process of its own, one after the other. The packed one is decoded by the loop of moebius generate and
by transformers' generate, the original by transformers' generate. Prompts are random tokens.

Files are mapped into memory and read when they are first used: loading ends with the first short run, 64 tokens and 4 more.
In memory: what the process holds after it more than before it loaded the model. Peak: the most it held.

A step reads the experts that its tokens choose, the factors they share, and everything else but the embedding; keys and
values come on top. What memory alone would allow is the measured speed of plain reading over these bytes."""

ShapeName = Annotated[
    str | None,
    typer.Option(
        help="A model of this shape with random weights, packed from the start, instead of a checkpoint:"
        " olmoe-1b-7b, qwen1.5-moe, qwen3-30b-a3b or mixtral-8x7b.",
        show_default=False,
    ),
]


def bench(
    packed: Annotated[
        str | None,
        typer.Argument(
            metavar="PACKED",
            help="A packed checkpoint. Default: the reference model, packed for the occasion.",
            show_default=False,
        ),
    ] = None,
    original: Annotated[
        str | None, typer.Option("--original", "-r", help="The model that PACKED was made from.", show_default=False)
    ] = None,
    shape: ShapeName = None,
    method: Method = DEFAULT_METHOD,
    bits: Bits = None,
    rest: Rest = "bf16",
    set_: Set = None,
    original_layers: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="With --shape, for an original that does not fit: time so many of its layers and half as many, and draw the"
            " line through both. It flatters the original: OLMoE from 4 layers came out a third faster than all 16.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompts.")] = 512,
    context: Annotated[int, typer.Option(min=1, help="Tokens before the first one that is decoded.")] = 16,
    new: Annotated[int, typer.Option(min=2, help="Tokens to decode.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="How often each is timed.")] = 3,
    threads: Annotated[int | None, typer.Option(min=1, help="Of PyTorch. Default: its own.", show_default=False)] = None,
    dtype: DType = "auto",
    device: Device = "cpu",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="JSON file to write.", show_default=False)] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Time a packed model and its original in one run: tokens per second, memory, loading, and what memory would allow.

    With --shape, checkpoints of random weights are written to the temporary folder (TMPDIR) and loaded from it, the packed one
    without ever being dense; the original only if memory and disk have room for it. --method, --bits, --rest and --set
    say how the reference model or the shape is packed; a checkpoint is as it is.
    """
    request = BenchRequest(packed, original, shape, recipe_from(method, bits, set_, rest), original_layers)
    for named in (packed, original):
        path_or_hub_name(named)
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise OutputError(f"--out {out}: wanted a file in a folder that exists")

    from moebius.bench.measure import Conditions
    from moebius.bench.run import run_bench
    from moebius.evaluate.speed import SpeedSettings
    from moebius.hf.loading import quiet_transformers

    require_device(device)
    quiet_transformers()
    conditions = Conditions(SpeedSettings(prompt, context, new, batch, repeats), device, dtype, threads)
    with progress_bars(hidden=quiet) as progress:
        results = run_bench(request, conditions, progress)
    if out is not None:
        out.write_text(json.dumps(results, indent=1) + "\n")
    if as_json:
        print_json(results)
    else:
        print_tables(speed_table(results))
    for words in results["missing"]:
        note(f"not measured: {words}")


def speed_table(results: dict[str, Any]) -> TextTable:
    """What was measured in rows, the models in columns, and what the packed one gains at the end."""
    rows, settings, machine = results["rows"], results["settings"], results["machine"]
    gains = results["speedups"].get("packed, moebius", {})
    figures: list[tuple[str, list[str], float | None]] = [
        ("decode, tokens/s", [_rate(row, "decode") for row in rows], gains.get("decode")),
        ("decode, best of the repeats", [_rate(row, "decode", "best_") for row in rows], None),
        ("prompt, tokens/s", [_rate(row, "prompt") for row in rows], gains.get("prompt")),
        ("prompt, best of the repeats", [_rate(row, "prompt", "best_") for row in rows], None),
        ("load, s", [number(row["load_seconds"], 1) for row in rows], None),
        ("load and a first short run, s", [number(row["ready_seconds"], 1) for row in rows], gains.get("ready")),
        ("in memory", [bytes_text(row["resident_bytes"]) for row in rows], gains.get("memory")),
        ("files", [bytes_text(row["file_bytes"]) for row in rows], None),
        ("in memory, of its files", [percent(row["resident_to_files"]) for row in rows], None),
        ("peak memory", [bytes_text(row["peak_bytes"]) for row in rows], None),
        ("bits per expert weight", [number(row["bits_per_expert_weight"], 2) for row in rows], None),
        ("a step reads", [_roofline(row, "bytes_per_step") for row in rows], None),
        ("decode if reading were all, tokens/s", [_roofline(row, "tokens_per_second") for row in rows], None),
        ("share of that reached", [_roofline(row, "share_reached") for row in rows], None),
    ]
    if any(row["request"] for row in rows):
        figures.insert(4, ("new tokens/s, prompt included", [_rate(row, "request") for row in rows], gains.get("request")))
    note = (
        f"{machine['name']}, {machine['threads']} threads, plain reading {machine['read_bytes_per_second'] / 1e9:.1f} GB/s;"
        f" batch {settings['batch']}, prompts of {settings['prompt']} tokens, {settings['new']} tokens decoded after"
        f" {settings['context']}, median of {settings['repeats']}{'; random weights' if results['random_weights'] else ''}"
    )
    labels = [_label(row) for row in rows]
    columns = ("", *labels, *(["packed is better"] if gains else []))
    cells = tuple((name, *texts, *([_times(gain)] if gains else [])) for name, texts, gain in figures)
    return TextTable(results["name"], columns, cells, note=note)


def _label(row: dict[str, Any]) -> str:
    layers = row["scaled_from_layers"]
    scaled = "" if layers is None else f", scaled from {layers[0]} and {layers[1]} layers"
    return f"{row['model']}{', transformers’ generate' if row['loop'] == 'transformers' else ''}{scaled}"


def _rate(row: dict[str, Any], figure: str, kind: str = "") -> str:
    return number(row[figure][f"{kind}tokens_per_second"], 1)


def _times(gain: float | None) -> str:
    return "" if gain is None else f"{gain:.2f} ×"


def _roofline(row: dict[str, Any], figure: str) -> str:
    if row["roofline"] is None:
        return "–"
    value = row["roofline"][figure]
    if figure == "bytes_per_step":
        return bytes_text(round(value))
    return percent(value) if figure == "share_reached" else number(value, 1)
