"""``moebius chat``: talk to a model, one line at a time."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer

from moebius.cli.options import Device, DType, Model, Quiet, Temperature, display_name, model_or_reference, require_device
from moebius.cli.output import note

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
    seed: Annotated[int, typer.Option(help="Of the draws; each answer has its own.")] = 0,
    dtype: DType = "auto",
    device: Device = "cpu",
    quiet: Quiet = False,
) -> None:
    """Answer every line of the input, token by token, with all that was said before in mind.

    The tokenizer's chat template says how turns are written. A model without one, such as a base model, continues the text so
    far instead. /clear forgets everything, /quit or the end of the input ends, Ctrl-C cuts an answer short.
    """
    source = model_or_reference(model)

    from moebius.cli.loading import load_model, load_tokenizer
    from moebius.evaluate.samples import Shown, answer
    from moebius.runtime.generation import Session

    require_device(device)
    tokenizer = load_tokenizer(source)
    session = Session(load_model(source, dtype, device))
    conversation = Conversation(tokenizer, system)
    if not quiet:
        how = "answers in turns" if conversation.has_turns else "has no chat template and continues the text"
        note(f"{display_name(model)} {how}; {CLEAR} forgets, {QUIT} ends")
    turns = 0
    while (line := _read_line()) is not None and line.strip() != QUIT:
        if line.strip() == CLEAR:
            conversation = Conversation(tokenizer, system)
        elif line:
            ids, shown = conversation.ask(line).to(session.model.device), Shown(tokenizer)
            began = time.perf_counter()
            try:
                text = answer(session, tokenizer, ids, tokens, temperature=temperature, seed=seed + turns, streamer=shown)
            except KeyboardInterrupt:
                text = shown.text
                note("")
            conversation.answered(text)
            turns += 1
            if not quiet:
                written = len(tokenizer(text, add_special_tokens=False)["input_ids"])
                note(f"{written / (time.perf_counter() - began):.1f} tokens/s with reading the question")


class Conversation:
    """What was said so far, as the tokens that the model is to go on from."""

    def __init__(self, tokenizer: Any, system: str | None) -> None:
        self.tokenizer = tokenizer
        self.has_turns = bool(getattr(tokenizer, "chat_template", None))
        self._messages = [{"role": "system", "content": system}] if system else []
        self._text = f"{system}\n" if system and not self.has_turns else ""

    def ask(self, line: str) -> Any:
        """The tokens of everything up to where the answer begins, (1, length) int64."""
        if not self.has_turns:
            self._text += line
            return self.tokenizer(self._text, return_tensors="pt")["input_ids"]
        self._messages.append({"role": "user", "content": line})
        options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        return self.tokenizer.apply_chat_template(self._messages, **options)["input_ids"]

    def answered(self, text: str) -> None:
        """Remember an answer."""
        self._messages.append({"role": "assistant", "content": text})
        self._text += text


def _read_line() -> str | None:
    """A line of the input, None at its end. Only somebody at a terminal is asked for it."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
