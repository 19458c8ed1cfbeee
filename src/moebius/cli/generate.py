"""``moebius generate``: let a model write."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from moebius.cli.options import (
    AsJson,
    Device,
    DType,
    Model,
    Quiet,
    Seed,
    Temperature,
    model_or_reference,
    require_device,
    require_temperature,
)
from moebius.cli.output import note, print_json
from moebius.errors import RecipeError

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
    source = model_or_reference(model)

    from transformers import TextStreamer

    from moebius.cli.loading import load_model, load_tokenizer
    from moebius.evaluate.samples import PROMPTS, complete

    require_device(device)
    # Bytes that the terminal's encoding does not know come as halves of surrogate pairs, which no tokenizer takes.
    prompt = PROMPTS[0] if prompt is None else prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    tokenizer = load_tokenizer(source)
    loaded = load_model(source, dtype, device)
    streamer = None if as_json else TextStreamer(tokenizer, skip_special_tokens=True)  # prints the prompt as well
    began = time.perf_counter()
    written = complete(loaded, tokenizer, prompt, tokens, temperature=temperature, seed=seed, streamer=streamer)
    seconds = time.perf_counter() - began
    if as_json:
        shown = {"completion": written.text, "tokens": written.tokens, "seconds": seconds}
        print_json({"model": source, "prompt": prompt, **shown})
    elif not quiet:
        rate = written.tokens / seconds
        note(f"{written.tokens} tokens in {seconds:.1f} s, {rate:.1f} tokens/s with reading the prompt")
