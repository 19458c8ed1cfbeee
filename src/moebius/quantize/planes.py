"""Nested sign planes with error feedback, for all experts of a chunk at once.

A factor has directions and entries along them, and each element is ``entry_scale · direction_scale · level`` with a level of
:data:`moebius.formats.planes.AMPLITUDES`. Where the Hessian is one over directions (``gate_up``, behind a shared basis), errors
are pushed from direction to direction; where it is one over entries (``down``), from entry to entry.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.formats.logarithmic import rounded
from moebius.formats.planes import AMPLITUDES, MOST_PLANES
from moebius.linalg.hessian import feedback_weights
from moebius.quantize.feedback import with_all_errors, with_feedback

_TINY = 1e-30  # keeps 0/0 at 0 where there is nothing
_ALTERNATIONS = 8
_RIDGE = 1e-3  # pull of refitted scales towards what they were


@dataclass(frozen=True)
class PlaneLevels:
    """Quantized factors before their scales are rounded: ``levels · direction_scales · entry_scales``.

    Attributes:
        levels: sums of signed amplitudes, zero without planes. (experts, directions, entries)
        counts: planes. int64 (experts, directions)
        direction_scales: positive, zero without planes. (experts, directions)
        entry_scales: positive. (experts, entries)
    """

    levels: Tensor
    counts: Tensor
    direction_scales: Tensor
    entry_scales: Tensor

    def factor(self) -> Tensor:
        """What the planes stand for. (experts, directions, entries)"""
        return self.levels * self.direction_scales.unsqueeze(2) * self.entry_scales.unsqueeze(1)

    def positive(self) -> Tensor:
        """The signs, plane by plane: whether they are +1. bool (experts, planes, directions, entries)"""
        amplitudes, rest = plane_amplitudes(self.counts), self.levels.clone()
        planes = []
        for plane in range(int(self.counts.max()) if self.counts.numel() else 0):
            planes.append(rest >= 0)
            rest -= torch.where(planes[-1], 1.0, -1.0) * amplitudes[..., plane, None]
        return torch.stack(planes, 1) if planes else rest.new_zeros(len(rest), 0, *rest.shape[1:]).bool()

    def scaled(self, *, directions: Tensor | None = None, entries: Tensor | None = None) -> PlaneLevels:
        """With factors for directions (experts, directions) or entries (experts, entries) fused into the scales."""
        planes = self
        if directions is not None:
            planes = dataclasses.replace(planes, direction_scales=planes.direction_scales * directions)
        if entries is not None:
            planes = dataclasses.replace(planes, entry_scales=planes.entry_scales * entries)
        return planes

    def rounded_scales(self, bits: int) -> PlaneLevels:
        """With the scales as they are stored."""
        live = self.counts > 0
        directions = rounded(self.direction_scales, bits, live) * live
        return dataclasses.replace(self, direction_scales=directions, entry_scales=rounded(self.entry_scales, bits))


def nested_levels(values: Tensor, amplitudes: Tensor) -> Tensor:
    """The levels nearest to values of unit deviation.

    Sign after sign is the nearest level, because each amplitude exceeds the sum of those after it.

    Args:
        values: (...,).
        amplitudes: (..., planes), zero beyond the planes there are.
    """
    levels, rest = torch.zeros_like(values), values.clone()
    for plane in range(amplitudes.shape[-1]):
        signed = torch.copysign(amplitudes[..., plane], rest)
        levels += signed
        rest -= signed
    return levels


def deviations(target: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """Deviations as a product of a scale per direction and one per entry, fitted to the squares of what is live.

    Args:
        target: (experts, directions, entries).
        live: bool (experts, directions).

    Returns:
        (experts, directions), zero where not live, and (experts, entries).
    """
    squares = target.square() * live.unsqueeze(2)
    count = live.sum(1, keepdim=True).clamp_min(1)
    of_entry = torch.ones_like(target[:, 0])
    for _ in range(_ALTERNATIONS):
        of_direction = (squares @ (1 / of_entry).unsqueeze(2)).squeeze(2) / target.shape[2]
        of_entry = ((1 / of_direction.clamp_min(_TINY)) * live).unsqueeze(1).matmul(squares).squeeze(1) / count
        of_entry = of_entry.clamp_min(1e-6 * of_entry.mean(1, keepdim=True)).clamp_min(_TINY)
    return of_direction.sqrt() * live, of_entry.sqrt()


def over_directions(
    target: Tensor, hessian: Tensor, weights: Tensor, counts: Tensor, *, sweeps: int, block_size: int
) -> PlaneLevels:
    """Planes for factors whose Hessian is over their directions.

    Args:
        target: (experts, directions, entries) float32.
        hessian: positive definite, identity in directions without planes. (experts, directions, directions) float32
        weights: of the Hessian, see :func:`moebius.linalg.hessian.feedback_weights`. (experts, directions, directions)
        counts: planes. (experts, directions)
        sweeps: further passes over the directions, see :func:`moebius.quantize.feedback.with_all_errors`.
        block_size: directions whose errors are pushed on together: a matter of speed.
    """
    of_direction, of_entry = deviations(target, counts > 0)
    amplitudes = plane_amplitudes(counts).unsqueeze(2)  # of a direction, for all of its entries
    most = counts.amax(0).tolist()  # planes that any expert has there
    steps = _Steps(target, hessian, of_direction, of_entry, lambda direction: amplitudes[:, direction, :, : most[direction]])
    steps.visit(weights, sweeps, block_size)
    return PlaneLevels(steps.levels, counts, steps.scales, of_entry)


def over_entries(target: Tensor, moments: Tensor, counts: Tensor, *, sweeps: int, block_size: int) -> PlaneLevels:
    """Planes for factors whose Hessian is over their entries, those that carry most visited first.

    Args:
        target: (experts, directions, entries) float32.
        moments: positive definite. (experts, entries, entries) float32
        counts: planes. (experts, directions)
        sweeps: further passes over the entries, see :func:`moebius.quantize.feedback.with_all_errors`.
        block_size: entries whose errors are pushed on together: a matter of speed.
    """
    order = moments.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    moments = torch.stack([moment[mine][:, mine] for moment, mine in zip(moments, order, strict=True)])
    target = torch.stack([some.mT[mine] for some, mine in zip(target, order, strict=True)])  # (experts, entries, directions)
    of_direction, of_entry = deviations(target.mT, counts > 0)
    amplitudes = plane_amplitudes(counts)  # of all directions, whatever the entry
    steps = _Steps(target, moments, of_entry, of_direction, lambda entry: amplitudes)
    steps.visit(feedback_weights(moments), sweeps, block_size)
    back = order.argsort(1)
    levels = steps.levels.gather(1, back.unsqueeze(2).expand_as(target)).mT.contiguous()
    return PlaneLevels(levels, counts, of_direction, steps.scales.gather(1, back))


class _Steps:
    """The rows of a batch of targets, quantized one after the other to ``levels · scale of the row · scales along it``.

    A row takes the levels nearest to what it aims for at the scale it has, then the scale that fits these levels best.
    """

    def __init__(
        self, target: Tensor, hessian: Tensor, scales: Tensor, along: Tensor, amplitudes: Callable[[int], Tensor]
    ) -> None:
        self.target, self.hessian, self.along, self.amplitudes = target, hessian, along, amplitudes
        self.levels, self.scales = torch.zeros_like(target), scales.clone()

    def visit(self, weights: Tensor, sweeps: int, block_size: int) -> None:
        """Once with error feedback, then in view of all errors."""
        with_feedback(self.target, weights, block_size, self._quantize)
        for _ in range(sweeps):
            current = self.levels * self.along.unsqueeze(1) * self.scales.unsqueeze(2)
            with_all_errors(self.target, current, self.hessian, block_size, self._quantize)

    def _quantize(self, step: int, values: Tensor) -> Tensor:
        scale = self.scales[:, step, None].clamp_min(_TINY) * self.along
        level = nested_levels(values / scale, self.amplitudes(step))
        shape = level * self.along
        fit = _fit(values, shape)
        self.levels[:, step], self.scales[:, step] = level, fit
        return shape * fit.unsqueeze(1)


def _fit(values: Tensor, shape: Tensor) -> Tensor:
    """Least-squares scale of each row, never negative. (experts, width) to (experts,)"""
    return ((values * shape).sum(1) / shape.square().sum(1).clamp_min(_TINY)).clamp_min(0)


def plane_amplitudes(counts: Tensor) -> Tensor:
    """Amplitudes of every plane, zero beyond those there are. (..., planes)"""
    rows = [(0.0,) * MOST_PLANES, *(a + (0.0,) * (MOST_PLANES - len(a)) for a in AMPLITUDES.values())]
    most = int(counts.max()) if counts.numel() else 0
    return torch.tensor(rows, device=counts.device)[counts][..., :most]
