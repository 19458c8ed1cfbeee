"""What a model writes: the prompts to try it on, and its completions."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: They suit a model that has read nothing but Python's documentation and sources, as the reference model has.
PROMPTS = (
    'def read_lines(path, encoding="utf-8"):\n    """',
    'def is_prime(number):\n    """Return True if',
    'class Stack:\n    """A',
)


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    tokens: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    streamer: Any = None,
) -> str:
    """The text that the model puts after a prompt.

    Args:
        prompt: at least one token long.
        tokens: at most so many new tokens; fewer where the model ends the text.
        temperature: 0 takes the likeliest token every time; above, tokens are drawn.
        seed: of the draws.
        streamer: a transformers streamer that is fed token by token.
    """
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)  # (1, tokens)
    torch.manual_seed(seed)
    generate: Any = model.generate
    with torch.inference_mode():
        output = generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=temperature > 0,
            temperature=temperature if temperature > 0 else None,
            top_k=None,
            top_p=None,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            streamer=streamer,
        )
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
