"""Tokens per second of a model, prompt and decoding apart."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Generator, Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from moebius.progress import Progress, Silent
from moebius.runtime.generation import Session

_WARM_UP = (64, 4)  # tokens of a prompt, tokens after it


@dataclass(frozen=True)
class SpeedSettings:
    """What is timed.

    Attributes:
        prompt: tokens of each prompt.
        context: tokens before the first that is decoded.
        new: tokens that are decoded; at least 2, the first belongs to the prompt.
        batch: sequences at a time.
        repeats: how often each is timed.
    """

    prompt: int = 512
    context: int = 16
    new: int = 64
    batch: int = 1
    repeats: int = 3

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Seconds:
    """What was timed, by repeat.

    Attributes:
        prompt: from the ids of a prompt to the token after it.
        step: of a step of decoding, which gives one token to each sequence; the mean over a run.
    """

    prompt: tuple[float, ...]
    step: tuple[float, ...]

    def to_dict(self, settings: SpeedSettings) -> dict[str, Any]:
        """Tokens per second of all sequences together, median and best, and the seconds behind them.

        ``request`` counts the new tokens of a prompt and what follows it; None where that was not what was timed.
        """
        one = settings.context == settings.prompt
        request = [p + (settings.new - 1) * s for p, s in zip(self.prompt, self.step, strict=True)]
        return {
            "prompt": _rates(settings.batch * settings.prompt, self.prompt),
            "decode": _rates(settings.batch, self.step),
            "request": _rates(settings.batch * settings.new, request) if one else None,
        }


def _rates(tokens: int, seconds: Sequence[float]) -> dict[str, Any]:
    return {
        "tokens_per_second": tokens / median(seconds),
        "best_tokens_per_second": tokens / min(seconds),
        "seconds": list(seconds),
    }


#: From a model, ids (batch, length) and how many tokens to decode to the times of beginning and of every token.
Loop = Callable[[PreTrainedModel, Tensor, int], list[float]]


def streamed(model: PreTrainedModel, ids: Tensor, new: int) -> list[float]:
    """A :data:`Loop`: what ``moebius generate`` runs."""
    session = Session(model)
    times = [time.perf_counter()]
    for tokens in session.stream(ids, new_tokens=new):
        tokens.cpu()
        times.append(time.perf_counter())
    return times


def generated(model: PreTrainedModel, ids: Tensor, new: int) -> list[float]:
    """A :data:`Loop`: transformers' own ``generate``, greedily."""
    streamer, generate = _Clock(), getattr(model, "generate")  # noqa: B009  mypy sees a tensor there
    with torch.inference_mode():
        generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            streamer=streamer,
        )
    return streamer.times


class _Clock(BaseStreamer):
    """Remembers when it is given the prompt, and every token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None: ...


LOOPS: dict[str, Loop] = {"moebius": streamed, "transformers": generated}


def warm_up(model: PreTrainedModel, settings: SpeedSettings, loop: str) -> None:
    """A short run, in which kernels prepare their layers and libraries their buffers."""
    length, new = _WARM_UP
    LOOPS[loop](model, _random_ids(model, settings.batch, min(length, settings.prompt), -1), new)


def measure_speed(
    model: PreTrainedModel, settings: SpeedSettings, loop: str, progress: Progress | None = None, label: str = ""
) -> Seconds:
    """Time prompts of random tokens, and decoding after a few.

    Args:
        model: in evaluation mode, warmed up.
        settings: what to time.
        loop: a key of :data:`LOOPS`.
        progress: told about every repeat.
        label: of the stage.
    """
    progress, run = progress or Silent(), LOOPS[loop]
    progress.stage(f"{label}: prompts and decoding", 2 * settings.repeats)
    prompt, step = [], []
    for seed in range(settings.repeats):
        begin, first = run(model, _random_ids(model, settings.batch, settings.prompt, seed), 1)
        prompt.append(first - begin)
        progress.advance(f"{settings.batch * settings.prompt / prompt[-1]:.1f} tokens of a prompt per second")
        _, first, *_, last = run(model, _random_ids(model, settings.batch, settings.context, seed), settings.new)
        step.append((last - first) / (settings.new - 1))
        progress.advance(f"{settings.batch / step[-1]:.1f} tokens decoded per second")
    return Seconds(tuple(prompt), tuple(step))


def _random_ids(model: PreTrainedModel, batch: int, length: int, seed: int) -> Tensor:
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (batch, length), generator=Generator().manual_seed(seed + 1))
    return ids.to(model.device)
