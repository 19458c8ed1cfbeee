"""What a model writes after a prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from moebius.models.limits import check_tokens, tell_of_positions
from moebius.runtime.generation import Session, end_tokens_of

#: They suit a model that has read nothing but Python's documentation and sources, as the reference model has.
PROMPTS = (
    'def read_lines(path, encoding="utf-8"):\n    """',
    'def is_prime(number):\n    """Return True if',
    'class Stack:\n    """A',
)


@dataclass(frozen=True)
class Written:
    """What a model wrote: the text, and of how many tokens it is."""

    text: str
    tokens: int


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    tokens: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    on_text: Callable[[str], object] | None = None,
) -> Written:
    """What the model puts after a prompt.

    Args:
        prompt: at least one token long.
        tokens: at most so many new tokens; fewer where the model ends the text.
        temperature: 0 takes the likeliest token every time; above, tokens are drawn.
        seed: of the draws.
        on_text: told every piece of the completion as soon as its tokens are text.

    Raises:
        ShapeError: a prompt that tokenizes to nothing.
    """
    # Of an empty list, tokenizers make a tensor of floats.
    ids = torch.tensor([tokenizer(prompt)["input_ids"]], dtype=torch.int64, device=model.device)  # (1, tokens)
    return answer(Session(model), tokenizer, ids, tokens, temperature=temperature, seed=seed, on_text=on_text)


def answer(
    session: Session,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    tokens: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    on_text: Callable[[str], object] | None = None,
) -> Written:
    """What the model of a session puts after ``ids``, (1, tokens) int64; the rest as :func:`complete`."""
    check_tokens(session.model, ids)
    tell_of_positions(session.model.config, ids.shape[1] + tokens)
    ends = end_tokens_of(session.model, tokenizer)
    shown = None if on_text is None else _Pieces(tokenizer, on_text)
    written = []
    for token in session.stream(ids, new_tokens=tokens, temperature=temperature, seed=seed, end_tokens=ends):
        written.append(token)
        if shown is not None:
            shown.put(token)
    if shown is not None:
        shown.end()
    return Written(str(tokenizer.decode(torch.cat(written) if written else [], skip_special_tokens=True)), len(written))


class _Pieces(TextStreamer):
    """Whole words, as soon as they are there."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._on_text(text)
