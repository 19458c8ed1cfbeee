"""``moebius chat``: talk to a model, one line at a time."""

from __future__ import annotations

import io
import sys
import time
from typing import Annotated, Any

import typer

from moebius.cli.options import (
    LARGEST_SEED,
    Device,
    DType,
    Model,
    Quiet,
    Seed,
    Temperature,
    display_name,
    model_or_reference,
    require_device,
    require_temperature,
)
from moebius.cli.output import note
from moebius.errors import RecipeError, first_line

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
    source = model_or_reference(model)

    from moebius.cli.loading import load_model, load_tokenizer
    from moebius.evaluate.samples import Shown, Written, answer
    from moebius.runtime.generation import Session

    require_device(device)
    tokenizer = load_tokenizer(source)
    session = Session(load_model(source, dtype, device))
    conversation = Conversation(tokenizer, system)
    if not quiet:
        how = "answers in turns" if conversation.has_turns else "has no chat template and continues the text"
        note(f"{display_name(model)} {how}; {CLEAR} forgets, {QUIT} ends")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # bytes that are no text are marked
    turns = refused = 0
    while (line := _read_line()) is not None and line.strip() != QUIT:
        if line.strip() == CLEAR:
            conversation = Conversation(tokenizer, system)
        elif line:
            try:
                ids, shown = conversation.ask(line).to(session.model.device), Shown(tokenizer)
            except RecipeError as error:
                note(f"error: {error}")
                refused += 1
                continue
            began, seed_of_turn = time.perf_counter(), (seed + turns) % (LARGEST_SEED + 1)
            try:
                written = answer(session, tokenizer, ids, tokens, temperature=temperature, seed=seed_of_turn, streamer=shown)
            except KeyboardInterrupt as interrupt:
                if type(interrupt) is not KeyboardInterrupt:  # the process is to end
                    raise
                written = Written(shown.text, shown.tokens)
                note("")
            conversation.answered(written.text)
            turns += 1
            if not quiet:
                note(f"{written.tokens / (time.perf_counter() - began):.1f} tokens/s with reading the question")
    if refused and not _is_terminal():
        raise typer.Exit(RecipeError.exit_code)


class Conversation:
    """What was said so far, as the tokens that the model is to go on from."""

    def __init__(self, tokenizer: Any, system: str | None) -> None:
        self.tokenizer = tokenizer
        self.has_turns = bool(getattr(tokenizer, "chat_template", None))
        self._messages = [{"role": "system", "content": system}] if system else []
        self._text = f"{system}\n" if system and not self.has_turns else ""

    def ask(self, line: str) -> Any:
        """The tokens of everything up to where the answer begins, (1, length) int64.

        Raises:
            RecipeError: a turn that the template refuses, or of no tokens; it is as if it had not been said.
        """
        import torch

        messages = [*self._messages, {"role": "user", "content": line}]
        if self.has_turns:
            try:
                found = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
            except Exception as error:  # templates are programs, and refuse what they do not know by raising anything
                hint = ", and without --system it may take it" if messages[0]["role"] == "system" else ""
                raise RecipeError(
                    f"the chat template refuses this turn ({first_line(error)}); {CLEAR} begins anew{hint}"
                ) from None
        else:
            found = self.tokenizer(self._text + line)["input_ids"]
        if not found:
            raise RecipeError("this line tokenizes to nothing; say something else")
        self._messages, self._text = messages, self._text + line
        return torch.tensor([found], dtype=torch.int64)

    def answered(self, text: str) -> None:
        """Remember an answer."""
        self._messages.append({"role": "assistant", "content": text})
        self._text += text


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
