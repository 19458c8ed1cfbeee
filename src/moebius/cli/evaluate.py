"""``moebius evaluate``: perplexity, and how far a model is from its original."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from moebius.checks import require_device
from moebius.cli.options import AsJson, Bos, Device, DType, Model, Quiet, Seed
from moebius.cli.output import note, print_json, print_tables, progress_bars
from moebius.errors import RecipeError, TaskError
from moebius.recipe_text import require_text
from moebius.report.tables import TextTable, number, percent
from moebius.source import display_name, path_or_hub_name

if TYPE_CHECKING:
    from moebius.evaluate.run import EvaluationResult
    from moebius.evaluate.task_run import TaskRequest
    from moebius.evaluate.tasks import TaskScore

EXAMPLES = """[bold]Examples[/bold]

moebius evaluate

moebius evaluate ./OLMoE-1bit --reference allenai/OLMoE-1B-7B-0924 --text wikitext2 --protocol gptq

moebius evaluate allenai/OLMoE-1B-7B-0924 --text wikitext2 --protocol llama.cpp --save-reference ./olmoe-reference

moebius evaluate ./OLMoE-1bit --reference ./olmoe-reference

moebius evaluate ./OLMoE-1bit --tasks arc_easy,piqa

moebius evaluate ./OLMoE-1bit --tasks zero-shot --task-path ./tasks

[bold]Tasks[/bold]

zero-shot: the seven of MoBiE's Table 3 and KBVQ-MoE's Tables 10 to 13

generative: MMLU, MathQA, GSM8K, MBPP, HumanEval (MoBiE's Table 8); generative-chat: three of them (its Table 9)

challenging: MMLU, MathQA, GSM8K, HumanEval (KBVQ-MoE's Table 17)"""

Text = Annotated[
    str | None,
    typer.Option(
        "--text",
        "-t",
        help='"builtin" (the default), a .txt or .jsonl file (its last twentieth; all of it under gptq and llama.cpp),'
        " or the test split of a data set.",
        show_default=False,
    ),
]
ProtocolName = Annotated[
    Literal["windows", "gptq", "llama.cpp"] | None,
    typer.Option(
        help="windows (the default): drawn by seed, for small texts. gptq: all consecutive windows of 2048 tokens, as papers"
        " report. llama.cpp: chunks of 512 that begin with BOS, their second half scored.",
        show_default=False,
    ),
]
Windows = Annotated[
    int | None,
    typer.Option(
        min=1, help="How many windows. Default: 64, and all of the text under gptq and llama.cpp.", show_default=False
    ),
]
WindowLength = Annotated[
    int | None,
    typer.Option(min=2, help="Tokens per window. Default: 256, gptq 2048, llama.cpp 512.", show_default=False),
]
BatchSize = Annotated[
    int | None,
    typer.Option(min=1, help="Windows per forward pass (default: 2048 tokens), or requests of a task (1).", show_default=False),
]
Tasks = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        help="Instead of a text, tasks of lm-eval, with commas between them; or presets, see below.",
        show_default=False,
    ),
]
TaskPath = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Own task definitions, and data sets under their names on the hub (owner/name): no network is needed.",
        show_default=False,
    ),
]
FewShot = Annotated[
    int | None, typer.Option(min=0, help="Examples in front of a task's question. Default: the task's own.", show_default=False)
]
Limit = Annotated[int | None, typer.Option(min=1, help="Documents of each task. Default: all.", show_default=False)]
RunCode = Annotated[bool, typer.Option("--run-generated-code", help="Let tasks run what the model writes (MBPP, HumanEval).")]


def evaluate(
    model: Model = None,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            "-r",
            help="The original, or what --save-reference wrote: adds KL, top-1 agreement and routing similarity.",
            show_default=False,
        ),
    ] = None,
    protocol: ProtocolName = None,
    text: Text = None,
    windows: Windows = None,
    window_length: WindowLength = None,
    bos: Bos = "auto",
    seed: Seed = 0,
    save_reference: Annotated[
        Path | None,
        typer.Option(help="Store what MODEL says about the text in this folder, for --reference.", show_default=False),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --save-reference: store the likeliest K tokens and the mass of the others. Default: all, in float16.",
            show_default=False,
        ),
    ] = None,
    routing_from: Annotated[
        str | None,
        typer.Option(
            help="Route tokens as this model does: what is left is the error of weights, without expert shift (MoBiE Table 1).",
            show_default=False,
        ),
    ] = None,
    tasks: Tasks = None,
    task_path: TaskPath = None,
    few_shot: FewShot = None,
    limit: Limit = None,
    run_generated_code: RunCode = False,
    batch_size: BatchSize = None,
    dtype: DType = "float32",
    device: Device = "cpu",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure a model on held-out text: perplexity and, against its original, KL divergence, top-1 agreement and routing.
    Or, with --tasks, on tasks of lm-eval.

    KL is the mean of KL(original || model) per token, in nats. Routing similarity is, per MoE layer, the mean cosine between
    the routing distributions of both models on the same tokens (MoBiE Eq. 53-55): 1 means that no token changed experts.
    """
    require_text(text)
    if top_k is not None and save_reference is None:
        raise RecipeError("--top-k: says what --save-reference stores; give both, or neither")
    source = str(path_or_hub_name(model))
    if tasks is not None:
        _require_none(
            "--tasks", "measures no text", reference, protocol, text, windows, window_length, save_reference, routing_from
        )

        from moebius.evaluate.task_run import TaskRequest

        asked = TaskRequest(source, tasks, task_path, few_shot, limit, run_generated_code, dtype, device, batch_size or 1)
        _evaluate_tasks(asked, display_name(model), as_json, quiet)
        return
    _require_none(
        "--task-path, --few-shot, --limit, --run-generated-code",
        "belong to --tasks",
        *(task_path, few_shot, limit, run_generated_code or None),
    )
    original = None if reference is None else str(path_or_hub_name(reference))
    router = None if routing_from is None else str(path_or_hub_name(routing_from))

    from moebius import api
    from moebius.checkpoint.manifest import is_packed
    from moebius.hf.loading import quiet_transformers

    quiet_transformers()
    with progress_bars(hidden=quiet) as progress:
        result = api.evaluate(
            source,
            original,
            protocol=protocol,
            text=text,
            windows=windows,
            window_length=window_length,
            bos=bos,
            seed=seed,
            save_reference=save_reference,
            top_k=top_k,
            routing_from=router,
            batch_size=batch_size,
            dtype=dtype,
            device=device,
            progress=progress,
        )
    if as_json:
        print_json({"model": source, **result.to_dict()})
    else:
        print_tables(*evaluation_tables(display_name(model), result))
    if save_reference is not None:
        note(f"stored; compare with it: moebius evaluate PACKED --reference {save_reference}")
    elif reference is None and is_packed(Path(source)):
        note(f"for KL, top-1 agreement and routing similarity: moebius evaluate {source} --reference ORIGINAL")


def _require_none(what: str, why: str, *values: object) -> None:
    if any(value is not None for value in values):
        raise TaskError(f"{what}: {why}; ask for texts and tasks in two runs")


def _evaluate_tasks(request: TaskRequest, name: str, as_json: bool, quiet: bool) -> None:
    require_device(request.device)

    from moebius.evaluate.task_run import run_tasks
    from moebius.hf.loading import quiet_transformers

    quiet_transformers()
    scores = run_tasks(request, quiet or as_json)
    if as_json:
        print_json({"model": request.source, **request.settings(), "scores": [score.to_dict() for score in scores]})
        return
    print_tables(task_table(name, scores, request.limit))


def evaluation_tables(name: str, result: EvaluationResult) -> list[TextTable]:
    """The figures, and the routing similarity of each layer where there was a reference."""
    rows = [("perplexity", number(result.perplexity, 3) + _error(result.perplexity_error, 2))]
    if result.kl is not None:
        rows += [
            ("perplexity of the original", number(result.reference_perplexity, 3)),
            ("KL(original || model), nats", number(result.kl, 5) + _error(result.kl_error, 5)),
            ("KL, 99th percentile", number(result.kl_99, 4)),
            ("KL, 99.9th percentile", number(result.kl_999, 4)),
            ("top-1 agreement", percent(result.top1_agreement, 2) + _error(result.top1_error, 2, 100)),
            ("routing similarity, mean", number(result.mean_routing_similarity, 4)),
        ]
    title = f"{name}, {result.tokens:,} scored tokens ({result.description})"
    tables = [TextTable(title, ("", "value"), tuple(rows))]
    if result.routing_similarity:
        layers = tuple((str(i), number(s, 4)) for i, s in enumerate(result.routing_similarity, 1))
        tables.append(TextTable("Routing similarity (MoBiE Eq. 53-55)", ("MoE layer", "cosine"), layers))
    return tables


def task_table(name: str, scores: Sequence[TaskScore], limit: int | None) -> TextTable:
    """Every figure of every task; accuracies as percentages."""
    rows = []
    for score in scores:
        share = 0 <= score.value <= 1 and score.metric.startswith(("acc", "exact", "pass", "f1"))
        value = number(100 * score.value, 2) + " %" if share else number(score.value, 4)
        error = _error(score.error, 2, 100) if share else _error(score.error, 4)
        kept = "" if score.filter == "none" else f" ({score.filter})"
        shots, asked = ("" if n is None else str(n) for n in (score.few_shot, score.documents))
        rows.append((score.task, score.metric + kept, value + error, shots, asked))
    note = "" if limit is None else f"the first {limit} documents of each task only: not to be laid beside published figures"
    return TextTable(f"{name}, by lm-eval", ("task", "metric", "value", "few-shot", "documents"), tuple(rows), 2, note)


def _error(value: float | None, digits: int, times: float = 1) -> str:
    return "" if value is None else f" ± {number(value * times, digits)}"
