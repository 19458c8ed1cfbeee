"""Products of sorted rows with the matrix of their expert, a few large batches at a time.

Tokens are sorted by expert, so an expert owns a run of rows. Experts with runs of similar length are padded to one batch:
a lopsided routing then costs a quarter of padding at most, and no Python loop runs over experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

# Entries of the temporaries of one batch, 256 MiB in float32.
_TEMPORARY = 1 << 26
# Runs this short share a batch whatever their lengths: padding them costs less than another batch.
_SHORT = 16


@dataclass(frozen=True)
class Batch:
    """Experts whose rows are padded to one length.

    Attributes:
        experts: (batch,) int64.
        index: row of each padded place, 0 where there is none. (batch, longest) int64
        filled: whether there is one. (batch, longest) bool
    """

    experts: Tensor
    index: Tensor
    filled: Tensor

    def gather(self, rows: Tensor) -> Tensor:
        """(rows, width) to (batch, longest, width), zero in the padding."""
        return rows[self.index] * self.filled.unsqueeze(-1)


@dataclass(frozen=True)
class Assignment:
    """Which token goes to which expert, sorted by expert.

    Attributes:
        order: places in the flattened (tokens, top_k) choice, sorted by expert, tokens in order. (rows,) int64
        counts: rows of each expert. (experts,) int64
    """

    order: Tensor
    counts: Tensor

    @classmethod
    def of(cls, top_k_index: Tensor, experts: int) -> Assignment:
        """From the router's choice (tokens, top_k). An index of ``experts`` or more marks a place to leave out."""
        chosen = top_k_index.reshape(-1)
        counts = torch.bincount(chosen.clamp(max=experts), minlength=experts + 1)[:experts]
        order = chosen.argsort(stable=True)[: int(counts.sum())]
        return cls(order, counts)

    @cached_property
    def expert_of_row(self) -> Tensor:
        """(rows,) int64"""
        return torch.repeat_interleave(self.counts)

    def runs(self) -> Iterator[tuple[int, slice]]:
        """Experts that have rows, and which."""
        begin = 0
        for expert, count in enumerate(self.counts.tolist()):
            if count:
                yield expert, slice(begin, begin + count)
            begin += count

    def batches(self, entries_per_expert: int, entries_per_row: int) -> Iterator[Batch]:
        """All experts that have rows, in batches of similar counts.

        Args:
            entries_per_expert, entries_per_row: size of the temporaries that the caller makes for each expert of a batch, and
                for each of its padded rows.
        """
        counts = self.counts.tolist()
        starts = torch.cumsum(self.counts, 0) - self.counts
        waiting = sorted((e for e, count in enumerate(counts) if count), key=lambda e: -counts[e])
        while waiting:
            longest = counts[waiting[0]]
            shortest = 1 if longest <= _SHORT else 3 * longest // 4
            limit = max(1, _TEMPORARY // (entries_per_expert + longest * entries_per_row))
            size = sum(counts[e] >= shortest for e in waiting[:limit])
            experts = torch.tensor(waiting[:size], device=self.counts.device)
            waiting = waiting[size:]
            places = torch.arange(longest, device=self.counts.device)
            filled = places < self.counts[experts].unsqueeze(1)
            yield Batch(experts, (starts[experts].unsqueeze(1) + places) * filled, filled)


def grouped_linear(rows: Tensor, weight: Tensor, assignment: Assignment, dtype: torch.dtype = torch.float32) -> Tensor:
    """Each row times the matrix of its expert, ``y = W_e x``; differentiable in the rows, and in the weights where these
    require it.

    Args:
        rows: (rows, in), sorted as ``assignment`` says.
        weight: (experts, out, in).
        dtype: what factors are rounded to before they are multiplied; bf16 is several times faster where there are
            instructions for it. Other sums are then in another order too.

    Returns:
        (rows, out), in the dtype of the rows.
    """
    return _GroupedLinear.apply(rows, weight, assignment, dtype)


class _GroupedLinear(torch.autograd.Function):
    """Plain autograd would keep a copy of the weights of every batch until the backward pass."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, assignment: Assignment, dtype: torch.dtype) -> Tensor:
        ctx.assignment, ctx.dtypes = assignment, (rows.dtype, weight.dtype)
        if dtype != torch.float32:
            rows, weight = rows.to(dtype), weight.to(dtype)
        # The rows are wanted for the gradient of the weights alone.
        ctx.save_for_backward(weight, *([rows] if ctx.needs_input_grad[1] else []))
        product = _grouped_product if dtype == torch.float32 else _product_by_expert
        return product(rows, weight.mT, assignment).to(ctx.dtypes[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        weight, *rows = ctx.saved_tensors
        gradient = gradient.to(weight.dtype)
        at_rows = at_weight = None
        if ctx.needs_input_grad[0]:
            product = _grouped_product if weight.dtype == torch.float32 else _product_by_expert
            at_rows = product(gradient, weight, ctx.assignment).to(ctx.dtypes[0])
        if rows:
            at_weight = _outer_product_by_expert(gradient, rows[0], weight, ctx.assignment).to(ctx.dtypes[1])
        return at_rows, at_weight, None, None


def _grouped_product(rows: Tensor, matrices: Tensor, assignment: Assignment) -> Tensor:
    """Rows (rows, a) of each expert times its matrix (experts, a, b)."""
    product = rows.new_empty(rows.shape[0], matrices.shape[-1])
    for batch in assignment.batches(matrices[0].numel(), sum(matrices.shape[1:])):
        padded = rows[batch.index] @ matrices[batch.experts]  # (batch, longest, b)
        product[batch.index[batch.filled]] = padded[batch.filled]
    return product


def _product_by_expert(rows: Tensor, matrices: Tensor, assignment: Assignment) -> Tensor:
    """The same, expert after expert: nothing is padded or copied, which is faster where products are fast and experts few."""
    product = rows.new_empty(rows.shape[0], matrices.shape[-1])
    for expert, run in assignment.runs():
        torch.mm(rows[run], matrices[expert], out=product[run])
    return product


def _outer_product_by_expert(left: Tensor, right: Tensor, like: Tensor, assignment: Assignment) -> Tensor:
    """``Σ l rᵀ`` over the rows of each expert; zero for experts without rows. (experts, a, b)"""
    product = torch.zeros_like(like)
    for expert, run in assignment.runs():
        torch.mm(left[run].mT, right[run], out=product[expert])
    return product
