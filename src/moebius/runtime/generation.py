"""Decoding without detours: one forward pass per token, a cache that grows in place, nothing between the two."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moebius.errors import CheckpointError, ShapeError
from moebius.private_transformers import Cache
from moebius.runtime.attention import use_single_query_attention
from moebius.runtime.cache import can_go_on, make_room
from moebius.runtime.direct import DirectForward, direct_forward, tell_of_slow_layers


class Session:
    """A model, and the text it has read and written so far: a text that goes on from there is not read again.

    Args:
        model: a causal language model of transformers, packed or not. From now on it attends through
            :mod:`moebius.runtime.attention` where that is faster. A packed model is left for :mod:`moebius.runtime.direct`
            where its architecture allows that.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        use_single_query_attention(model)
        self.model = model
        self._direct: DirectForward | str | None = None
        self._cache: Cache | None = None
        self._read: Tensor | None = None  # (batch, length), what the cache holds
        parameters = inspect.signature(model.forward).parameters
        self._options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        # From 5.24 on transformers calls it `cache`, and warns of the name it had.
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"

    def stream(
        self, ids: Tensor, *, new_tokens: int, temperature: float = 0.0, seed: int = 0, end_tokens: Collection[int] = ()
    ) -> Iterator[Tensor]:
        """Continue texts of the same length, token by token.

        Args:
            ids: (batch, length) int64, without padding; at least one token long.
            new_tokens: at most so many.
            temperature: 0 takes the likeliest token every time; above, tokens are drawn.
            seed: of the draws.
            end_tokens: a text ends with one of them. When all have ended, so does the stream.

        Raises:
            ShapeError: a prompt of no tokens.

        Yields:
            The next token of each text, (batch,) int64; of a text that has ended, its end token again.
        """
        if ids.shape[1] == 0:
            raise ShapeError("prompt: got no tokens, wanted at least one; its text tokenizes to nothing")
        generator = torch.Generator(device=ids.device).manual_seed(seed)
        ends = torch.tensor(sorted(end_tokens), dtype=torch.int64, device=ids.device)
        ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        token = ids[:, -1]
        if not isinstance(self._direct, DirectForward) or not self._direct.holds():
            self._direct = direct_forward(self.model)
            if isinstance(self._direct, str):
                tell_of_slow_layers(self.model, self._direct)
        for step in range(new_tokens):
            logits = self._next(ids if step == 0 else token.unsqueeze(1), begins=step == 0)
            token = torch.where(ended, token, _pick(logits, temperature, generator))
            yield token
            if len(ends):
                ended = ended | torch.isin(token, ends)
                if bool(ended.all()):
                    return

    @torch.inference_mode()
    def _next(self, ids: Tensor, *, begins: bool) -> Tensor:
        """Logits after these tokens, (batch, vocabulary). ``begins``: they are the whole text, not what follows."""
        if begins:
            ids = self._unread(ids)
        before, self._read = self._read, None  # a pass that is interrupted leaves a cache that holds nobody knows what
        logits = self._forward(ids)
        self._read = ids if before is None else torch.cat([before, ids], 1)
        return logits

    def _forward(self, ids: Tensor) -> Tensor:
        direct, cache = self._direct, self._cache
        if isinstance(direct, DirectForward):
            cache = direct.new_cache() if cache is None else cache
            if direct.takes(ids, cache):
                self._cache = cache
                return direct(ids, cache)
        output = self.model(input_ids=ids, use_cache=True, **{self._cache_name: self._cache}, **self._options)
        if self._cache is None:
            self._cache = getattr(output, self._cache_name)
            make_room(self._cache)
        logits: Tensor = output.logits
        return logits[:, -1]

    def _unread(self, ids: Tensor) -> Tensor:
        """What the cache does not hold yet of a text; all of it, and an empty cache, if the text is another one."""
        if self._cache is not None and self._read is not None and can_go_on(self._cache):
            length = self._read.shape[1]
            if len(ids) == len(self._read) and ids.shape[1] > length and torch.equal(ids[:, :length], self._read):
                return ids[:, length:]
        self._cache = self._read = None
        return ids


def end_tokens_of(model: PreTrainedModel, tokenizer: Any = None) -> set[int]:
    """The tokens that end a text: those of the model's generation settings and the tokenizer's; either may know one alone.

    Raises:
        CheckpointError: settings that name something else than tokens.
    """
    ends = getattr(model.generation_config, "eos_token_id", None)
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(end) is int and abs(end) < 1 << 63 for end in listed):
        raise CheckpointError(f"generation_config.json: eos_token_id is {str(ends)[:60]}, wanted a token id or a list of them")
    named = set(listed)
    own = getattr(tokenizer, "eos_token_id", None)
    return named if own is None else {*named, own}


def _pick(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """(batch, vocabulary) to (batch,)"""
    if temperature == 0:
        return logits.argmax(-1)
    # In float64 and from the largest down, so that no temperature a float can hold divides to something else than a number.
    below = logits.double() - logits.amax(-1, keepdim=True).double()
    return torch.multinomial((below / temperature).softmax(-1), 1, generator=generator).squeeze(1)
