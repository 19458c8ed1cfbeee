"""Which expert has which tokens, for the Triton kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Slots up to which a program finds those of its expert by itself. Beyond, they are sorted first.
_SCANNED = 256


@dataclass(frozen=True)
class Route:
    """Slots and the blocks of slots that programs work for.

    Attributes:
        index: expert of every slot, (slots,).
        block: slots of a block.
        scan: slots to scan, rounded up to a power of two; 0 if the blocks are prepared.
        blocks: programs that handle all of them.
        order, block_expert, block_begin, block_end: slots by expert, and expert and range of each block. Unused with ``scan``.
        type: of the factors of products.
    """

    index: Tensor
    tokens: int
    top_k: int
    experts: int
    block: int
    scan: int
    blocks: int
    order: Tensor
    block_expert: Tensor
    block_begin: Tensor
    block_end: Tensor
    type: torch.dtype

    @property
    def slots(self) -> int:
        """Pairs of a token and one of its choices."""
        return self.tokens * self.top_k

    def members(self) -> tuple[Tensor, ...]:
        """What ``members`` in the kernels reads."""
        return self.index, self.order, self.block_expert, self.block_begin, self.block_end

    def settings(self) -> dict[str, Any]:
        """What kernels that multiply with signs are compiled for."""
        return {"M": self.block, "SCAN": self.scan, "TYPE": triton_type(self.type)}


def route_of(top_k_index: Tensor, experts: int, dtype: torch.dtype) -> Route:
    tokens, top_k = top_k_index.shape
    index, slots = top_k_index.reshape(-1).contiguous(), tokens * top_k
    kind = torch.float32 if dtype in (torch.float32, torch.float64) else torch.bfloat16
    if slots <= _SCANNED:
        scan = max(16, triton.next_power_of_2(slots))
        return Route(index, tokens, top_k, experts, 16, scan, slots, index, index, index, index, kind)
    block = _block(slots, experts)
    blocks = slots // block + min(slots, experts)  # as many as there can be
    # Padding sorts behind all experts.
    ranked, order = torch.where((index >= 0) & (index < experts), index, experts).sort(stable=True)
    starts = torch.searchsorted(ranked, torch.arange(experts + 1, device=index.device, dtype=ranked.dtype))
    shares = (starts.diff() + block - 1) // block
    ends = shares.cumsum(0)
    number = torch.arange(blocks, device=index.device)
    expert = torch.searchsorted(ends, number, right=True)  # ``experts`` for blocks that are not needed
    mine = expert.clamp(max=experts - 1)
    begin = starts[mine] + (number - ends[mine] + shares[mine]) * block
    return Route(index, tokens, top_k, experts, block, 0, blocks, order, expert, begin, starts[mine + 1], kind)


def _block(slots: int, experts: int) -> int:
    """Slots of a block: about as many as an expert has."""
    return min(64, max(16, triton.next_power_of_2(slots // experts)))


def triton_type(dtype: torch.dtype) -> Any:
    return tl.float32 if dtype == torch.float32 else tl.bfloat16
