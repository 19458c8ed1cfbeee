"""``moebius evaluate``: perplexity, and how far a model is from its original."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moebius.cli.options import (
    AsJson,
    Device,
    DType,
    Model,
    Quiet,
    Seed,
    WindowLength,
    calibration_from,
    display_name,
    model_or_reference,
    require_device,
)
from moebius.cli.output import note, print_json, print_tables, progress_bars
from moebius.report.tables import TextTable, number, percent

if TYPE_CHECKING:
    from moebius.evaluate.evaluation import Evaluation

EXAMPLES = """[bold]Examples[/bold]

moebius evaluate

moebius evaluate ./OLMoE-1bit --reference allenai/OLMoE-1B-7B-0924 --text wikitext2 --window-length 2048"""

Text = Annotated[
    str,
    typer.Option(
        "--text",
        "-t",
        help='Held-out text: "builtin", the last twentieth of a .txt or .jsonl file, or the test split of a data set.',
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Windows per forward pass.")]


def evaluate(
    model: Model = None,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference", "-r", help="The original: adds KL, top-1 agreement and routing similarity.", show_default=False
        ),
    ] = None,
    text: Text = "builtin",
    windows: Annotated[int, typer.Option(min=1, help="Windows of held-out tokens.")] = 64,
    window_length: WindowLength = 256,
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    dtype: DType = "float32",
    device: Device = "cpu",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure a model on held-out text: perplexity and, against its original, KL divergence, top-1 agreement and routing.

    KL is the mean of KL(original || model) per token, in nats. Routing similarity is, per MoE layer, the mean cosine between
    the routing distributions of both models on the same tokens (MoBiE Eq. 53-55): 1 means that no token changed experts.
    """
    settings = calibration_from(text, windows, window_length, seed, split="held-out")
    source = model_or_reference(model)
    original = None if reference is None else model_or_reference(reference)

    from moebius.calibrate.tokens import calibration_windows
    from moebius.cli.loading import load_model, load_tokenizer
    from moebius.evaluate.evaluation import evaluate_model
    from moebius.evaluate.size import is_packed

    require_device(device)
    tokens = calibration_windows(settings, load_tokenizer(source))
    loaded = load_model(source, dtype, device)
    loaded_original = None if original is None else load_model(original, dtype, device)
    with progress_bars(hidden=quiet) as progress:
        result = evaluate_model(loaded, tokens, reference=loaded_original, batch_size=batch_size, progress=progress)
    if as_json:
        print_json({"model": source, "reference": original, "text": settings.to_dict(), **result.to_dict()})
    else:
        print_tables(*evaluation_tables(display_name(model), result))
    if original is None and is_packed(Path(source)):
        note(f"for KL, top-1 agreement and routing similarity: moebius evaluate {source} --reference ORIGINAL")


def evaluation_tables(name: str, result: Evaluation) -> list[TextTable]:
    """The figures, and the routing similarity of each layer where there was a reference."""
    error = "" if result.perplexity_error is None else f" ± {number(result.perplexity_error, 2)}"
    rows = [("perplexity", number(result.perplexity, 3) + error)]
    if result.reference_perplexity is not None:
        rows += [
            ("perplexity of the original", number(result.reference_perplexity, 3)),
            ("KL(original || model), nats", number(result.kl, 5)),
            ("top-1 agreement", percent(result.top1_agreement, 2)),
            ("routing similarity, mean", number(result.mean_routing_similarity, 4)),
        ]
    tables = [TextTable(f"{name}, {result.tokens:,} predicted tokens", ("", "value"), tuple(rows))]
    if result.routing_similarity:
        layers = tuple((str(i), number(s, 4)) for i, s in enumerate(result.routing_similarity, 1))
        tables.append(TextTable("Routing similarity (MoBiE Eq. 53-55)", ("MoE layer", "cosine"), layers))
    return tables
