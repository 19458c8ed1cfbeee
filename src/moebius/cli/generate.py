"""``moebius generate``: let a model write."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from moebius.checks import require_device, require_temperature
from moebius.cli.options import AsJson, Device, DType, Model, Quiet, Seed, Temperature
from moebius.cli.output import note, print_json
from moebius.errors import RecipeError
from moebius.source import path_or_hub_name

EXAMPLES = """[bold]Examples[/bold]

moebius generate

moebius generate ./OLMoE-1bit --prompt "The sea was" --tokens 100 --temperature 0.8 --seed 1"""


def generate(
    model: Model = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="What to continue. Default: the head of a function.", show_default=False),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="At most so many new tokens.")] = 64,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    dtype: DType = "auto",
    device: Device = "cpu",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Continue a prompt, token by token."""
    if prompt == "":
        raise RecipeError("--prompt: got an empty text, wanted at least one character")
    require_temperature(temperature)
    source = path_or_hub_name(model)

    from moebius.generation.complete import PROMPTS, complete
    from moebius.hf.loading import load_model, load_tokenizer, quiet_transformers

    require_device(device)
    quiet_transformers()
    # Bytes that the terminal's encoding does not know come as halves of surrogate pairs, which no tokenizer takes.
    prompt = PROMPTS[0] if prompt is None else prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    tokenizer = load_tokenizer(source)
    loaded = load_model(source, dtype, device)
    began = time.perf_counter()
    if not as_json:
        _show(prompt)
    written = complete(
        loaded, tokenizer, prompt, tokens, temperature=temperature, seed=seed, on_text=None if as_json else _show
    )
    seconds = time.perf_counter() - began
    if as_json:
        shown = {"completion": written.text, "tokens": written.tokens, "seconds": seconds}
        print_json({"model": str(source), "prompt": prompt, **shown})
        return
    print(flush=True)
    if not quiet:
        rate = written.tokens / seconds
        note(f"{written.tokens} tokens in {seconds:.1f} s, {rate:.1f} tokens/s with reading the prompt")


def _show(text: str) -> None:
    print(text, end="", flush=True)
