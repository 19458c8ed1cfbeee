"""What a step of decoding reads, and how fast memory can be read: the speed that no implementation exceeds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from moebius.evaluate.size import ModelSize

_READ_BYTES = 1 << 29


@dataclass(frozen=True)
class StepBytes:
    """Stored bytes that a step reads, which decodes one token of each sequence.

    Attributes:
        experts: the experts that some token chose, without what they share.
        shared_factors: what all experts of a layer share.
        rest: attention, norms, routers, shared experts, the head, and a row of the embedding for each token.
    """

    experts: float
    shared_factors: float
    rest: float

    @property
    def total(self) -> float:
        """All of them. Keys and values of the cache come on top: they depend on the context."""
        return self.experts + self.shared_factors + self.rest


def step_bytes(size: ModelSize, model: PreTrainedModel, batch: int = 1) -> StepBytes | None:
    """What a step reads, as if each token chose its experts evenly and on its own; None if top-k is not known.

    Args:
        size: of the checkpoint.
        model: what it is a checkpoint of; may be on the meta device, and unpacked.
        batch: sequences.
    """
    if size.top_k is None:
        return None
    experts = sum((m.stored_bits - m.shared_bits) * _touched(m.shape[0], size.top_k, batch) for m in size.experts)
    shared = sum(m.shared_bits for m in size.experts)
    table: Any = model.get_input_embeddings().weight
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    # A table that is the head as well is read as the head.
    embedding: int = 8 * table.element_size() * (batch * table.shape[1] - (0 if tied else table.numel()))
    return StepBytes(experts / 8, shared / 8, (size.bits - size.expert_bits + embedding) / 8)


def _touched(experts: int, top_k: int, batch: int) -> float:
    """The share of the experts that at least one of the tokens chose, on average."""
    return 1 - (1 - top_k / experts) ** batch


def read_bandwidth(device: str = "cpu") -> float:
    """Bytes per second of plain reading, by all threads of PyTorch."""
    memory = torch.ones(_READ_BYTES // 4, dtype=torch.int32, device=device)
    return _READ_BYTES / fastest(lambda: memory.max().item(), 5)  # the item waits for a GPU


def fastest(call: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of some calls: what others on the machine take is not ours."""
    call()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
