"""``moebius chat``: talk to a model, one line at a time."""

from __future__ import annotations

import functools
import io
import sys
import time
from typing import Annotated

import typer

from moebius.checks import LARGEST_SEED, require_device, require_temperature
from moebius.cli.options import Device, DType, Model, Quiet, Seed, Temperature
from moebius.cli.output import note
from moebius.errors import RecipeError
from moebius.source import display_name, path_or_hub_name

EXAMPLES = """[bold]Examples[/bold]

moebius chat ./OLMoE-1bit

moebius chat ./Qwen3-1bit --system "Answer in one sentence." --temperature 0.7

echo "What is a router?" | moebius chat ./OLMoE-1bit --quiet"""

CLEAR, QUIT = "/clear", "/quit"


def chat(
    model: Model = None,
    system: Annotated[str | None, typer.Option("--system", help="What the model is told first.", show_default=False)] = None,
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="At most so many tokens per answer.")] = 512,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    dtype: DType = "auto",
    device: Device = "cpu",
    quiet: Quiet = False,
) -> None:
    """Answer every line of the input, token by token, with all that was said before in mind.

    The tokenizer's chat template says how turns are written. A model without one, such as a base model, continues the text so
    far instead. /clear forgets everything, /quit or the end of the input ends, Ctrl-C cuts an answer short.
    """
    require_temperature(temperature)
    source = path_or_hub_name(model)

    from moebius.generation.chat import Chat
    from moebius.hf.loading import load_model, load_tokenizer, quiet_transformers

    require_device(device)
    quiet_transformers()
    tokenizer = load_tokenizer(source)
    talk = Chat(load_model(source, dtype, device), tokenizer, system)
    if not quiet:
        how = "answers in turns" if talk.has_turns else "has no chat template and continues the text"
        note(f"{display_name(model)} {how}; {CLEAR} forgets, {QUIT} ends")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # bytes that are no text are marked
    turns = refused = 0
    while (line := _read_line()) is not None and line.strip() != QUIT:
        if line.strip() == CLEAR:
            talk.clear()
        elif line:
            began, seed_of_turn = time.perf_counter(), (seed + turns) % (LARGEST_SEED + 1)
            try:
                talk.ask(line, tokens, temperature=temperature, seed=seed_of_turn, on_text=_show)
                print(flush=True)
            except RecipeError as error:
                words = {"begin anew": f"{CLEAR} begins anew", "without a system message": "without --system"}
                note(f"error: {functools.reduce(lambda text, pair: text.replace(*pair), words.items(), str(error))}")
                refused += 1
                continue
            except KeyboardInterrupt as interrupt:
                if type(interrupt) is not KeyboardInterrupt:  # the process is to end
                    raise
                note("")
            turns += 1
            if not quiet:
                note(f"{talk.last.tokens / (time.perf_counter() - began):.1f} tokens/s with reading the question")
    if refused and not _is_terminal():
        raise typer.Exit(RecipeError.exit_code)


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _is_terminal() -> bool:
    return sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty()


def _read_line() -> str | None:
    """A line of the input, None at its end. Only somebody at a terminal is asked for it."""
    if sys.stdin is None or sys.stdin.closed:
        return None
    try:
        return input("> " if _is_terminal() else "")
    except EOFError:
        return None
