"""Conversations: what was said so far, as the tokens that a model is to go on from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moebius.errors import RecipeError, first_line
from moebius.generation.complete import Written, answer
from moebius.runtime.generation import Session


class Chat:
    """A model that answers with all that was said before in mind.

    The tokenizer's chat template says how turns are written. A model without one, such as a base model, continues the text so
    far instead.

    Args:
        model: a causal language model of transformers, packed or not.
        tokenizer: its tokenizer.
        system: what the model is told first.

    Attributes:
        last: what was written last, also where it was cut short.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, system: str | None = None) -> None:
        self.tokenizer, self.system = tokenizer, system
        self.last = Written("", 0)
        self._session = Session(model)
        self._conversation = Conversation(tokenizer, system)

    @property
    def has_turns(self) -> bool:
        """Whether there is a chat template."""
        return self._conversation.has_turns

    def ask(
        self,
        line: str,
        tokens: int = 512,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        on_text: Callable[[str], object] | None = None,
    ) -> Written:
        """The answer to a line. One that is interrupted is remembered as far as it went.

        Args:
            line: what is said.
            tokens: at most so many in the answer.
            temperature: 0 takes the likeliest token every time; above, tokens are drawn.
            seed: of the draws.
            on_text: told every piece of the answer as soon as its tokens are text.

        Raises:
            RecipeError: a turn that the template refuses, or of no tokens; it is as if it had not been said.
        """
        ids = self._conversation.ask(line).to(self._session.model.device)
        pieces: list[str] = []

        def piece(text: str) -> None:
            pieces.append(text)
            if on_text is not None:
                on_text(text)

        try:
            self.last = answer(self._session, self.tokenizer, ids, tokens, temperature=temperature, seed=seed, on_text=piece)
        except KeyboardInterrupt:
            text = "".join(pieces)
            self.last = Written(text, len(self.tokenizer(text)["input_ids"]))
            raise
        finally:
            self._conversation.answered(self.last.text)
        return self.last

    def clear(self) -> None:
        """Forget everything but what the model is told first."""
        self._conversation = Conversation(self.tokenizer, self.system)


class Conversation:
    """What was said so far."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system: str | None) -> None:
        self.tokenizer = tokenizer
        self.has_turns = bool(getattr(tokenizer, "chat_template", None))
        self._messages = [{"role": "system", "content": system}] if system else []
        self._text = f"{system}\n" if system and not self.has_turns else ""

    def ask(self, line: str) -> Tensor:
        """The tokens of everything up to where the answer begins, (1, length) int64.

        Raises:
            RecipeError: a turn that the template refuses, or of no tokens; it is as if it had not been said.
        """
        messages = [*self._messages, {"role": "user", "content": line}]
        if self.has_turns:
            try:
                turns: Any = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
            except Exception as error:  # templates are programs, and refuse what they do not know by raising anything
                hint = ", and without a system message it may take it" if messages[0]["role"] == "system" else ""
                raise RecipeError(f"the chat template refuses this turn ({first_line(error)}); begin anew{hint}") from None
            found = turns["input_ids"]
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
