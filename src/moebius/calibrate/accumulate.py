"""Sums over tokens, batched over experts: what a layer's statistics are made of.

Accumulators and products are float32. The sums have one sign on their diagonals and a few ten thousand terms, so rounding
costs about 1e-6 of their size, far below the 1 % of damping that every Hessian gets; float64 would double the largest memory
of a run. What is inverted or decomposed is converted to float64 in :mod:`moebius.linalg`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moebius.calibrate.grouped import Assignment
from moebius.types import CalibrationNeeds, ProjectionStats


def group_of_channel(channels: int, groups: int) -> Tensor:
    """Which GLAS group each output channel belongs to: equal runs, as far as they divide. (channels,) int64"""
    return torch.arange(channels) * groups // channels


class ProjectionSums:
    """Statistics of one projection of one layer, batch after batch.

    Args:
        experts, inputs, outputs: of the projection.
        needs: what is wanted.
        left: shared left factor ``A`` (outputs, rank). The gradient at the expert factor's output is then ``Aᵀ δ``, and so are
            the channels of ``S`` and ``γ``.
        output_fisher: whether to sum ``G = Σ δ δᵀ`` of this projection.
        device: where the sums are kept.
    """

    def __init__(
        self,
        experts: int,
        inputs: int,
        outputs: int,
        needs: CalibrationNeeds,
        *,
        left: Tensor | None = None,
        output_fisher: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self._tokens = torch.zeros(experts, dtype=torch.int64, device=device)
        self._sum = torch.zeros(experts, inputs, device=device)
        self._by_loss = LossWeightedMoments(experts, inputs, device) if needs.loss_weighted else None
        self._moment = torch.zeros(0 if needs.loss_weighted else experts, inputs, inputs, device=device)
        self._by_affinity = needs.affinity
        self._left = left
        self._average: Tensor | None = None
        self._weighted: Tensor | None = None
        self._fisher: Tensor | None = None
        self._output_fisher: Tensor | None = None
        channels = outputs if left is None else left.shape[1]
        if needs.glas_groups:
            groups = min(needs.glas_groups, channels)
            members = torch.nn.functional.one_hot(group_of_channel(channels, groups), groups).float()  # (channels, groups)
            self._average = (members / members.sum(0)).to(device)
            self._weighted = torch.zeros(experts, groups, inputs, inputs, device=device)
        if needs.gradients:
            self._fisher = torch.zeros(experts, channels, device=device)
        if output_fisher:
            self._output_fisher = torch.zeros(outputs, outputs, device=device)

    def add(
        self, assignment: Assignment, inputs: Tensor, gradient: Tensor | None = None, routing: Tensor | None = None
    ) -> None:
        """Add the rows of one batch.

        Args:
            assignment: which expert each row belongs to.
            inputs: ``x``, (rows, in).
            gradient: ``δ``, (rows, out); None without gradients.
            routing: weight of each row's expert in the output of the layer, (rows,); read where tokens are weighed by it or by
                the loss.
        """
        squares = weights = None
        if gradient is not None and self._fisher is not None:
            if self._output_fisher is not None:
                self._output_fisher.addmm_(gradient.T, gradient)
            squares = (gradient if self._left is None else gradient @ self._left).square()  # (rows, channels)
            weights = squares @ self._average if self._average is not None else None  # s, (rows, groups)
            if self._by_loss is not None and routing is not None:
                self._by_loss.add(assignment, inputs, gradient.square().mean(1), routing.square())
        self._tokens += assignment.counts
        hessians = 1 if self._weighted is None else self._weighted.shape[1]
        width = inputs.shape[-1]
        for batch in assignment.batches(hessians * width * width, (hessians + 1) * width):
            x = batch.gather(inputs)  # (batch, longest, in)
            self._sum.index_add_(0, batch.experts, x.sum(1))
            if self._by_loss is None:
                counted = x
                if self._by_affinity and routing is not None:
                    counted = x * batch.gather(routing.clamp_min(0).unsqueeze(1))
                self._moment.index_add_(0, batch.experts, counted.mT @ x)
            if squares is not None and self._fisher is not None:
                self._fisher.index_add_(0, batch.experts, batch.gather(squares).sum(1))
            if weights is not None and self._weighted is not None:
                weighted = (batch.gather(weights).unsqueeze(-1) * x.unsqueeze(2)).flatten(2)  # (batch, longest, groups * in)
                self._weighted.index_add_(0, batch.experts, (weighted.mT @ x).unflatten(1, (hessians, width)))

    def result(self) -> ProjectionStats:
        """The statistics of all batches, zeros for experts without tokens; nothing can be added afterwards."""
        return ProjectionStats(
            tokens=self._tokens,
            mean=self._sum / self._tokens.clamp(min=1).unsqueeze(1),
            second_moment=self._moment if self._by_loss is None else self._by_loss.result(),
            weighted_moment=self._weighted,
            fisher_diagonal=self._fisher,
            output_fisher=self._output_fisher,
        )


class LossWeightedMoments:
    """Second moments in which a token counts as much as the loss depends on the expert's output for it.

    What is observed of that is ``s_t``, the mean of ``δ²`` over the outputs: true for the tokens at hand, but noisy, and a few
    tokens make up most of it. What can be expected is ``m w_t²``, where ``w`` is the routing weight through which every ``δ``
    has come, and ``m = Σ s / Σ w²`` of the layer. Each is half of the weight.

    Args:
        experts, inputs: of the projection.
        device: where the sums are kept.
    """

    def __init__(self, experts: int, inputs: int, device: torch.device | str = "cpu") -> None:
        # By what was observed, and by what can be expected.
        self._weights = [0.0, 0.0]
        self._moments = torch.zeros(2, experts, inputs, inputs, device=device)

    def add(self, assignment: Assignment, inputs: Tensor, observed: Tensor, expected: Tensor) -> None:
        """Add rows ``x`` (rows, in) with ``s`` and ``w²``, each (rows,)."""
        width = inputs.shape[-1]
        for kind, weights in enumerate((observed, expected)):
            self._weights[kind] += float(weights.sum(dtype=torch.float64))
            for batch in assignment.batches(width * width, 2 * width):
                x = batch.gather(inputs)  # (batch, longest, in)
                weighted = x * batch.gather(weights.unsqueeze(1))
                self._moments[kind].index_add_(0, batch.experts, weighted.mT @ x)

    def result(self) -> Tensor:
        """``Σ (s + m w²)/2 x xᵀ``, (experts, in, in), in the memory of the sums."""
        observed, expected = self._weights
        ratio = observed / expected if expected else 0.0
        moments, prior = self._moments
        return moments.add_(prior, alpha=ratio).mul_(0.5)
