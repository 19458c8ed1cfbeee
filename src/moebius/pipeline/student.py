"""The experts of a layer as they are trained: what both stages of recovery share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from moebius import native
from moebius.calibrate.grouped import Assignment, grouped_linear
from moebius.calibrate.observe import Product, observed_forward
from moebius.formats.projection import PackedProjection
from moebius.quantize.trainable import TrainableCodes, TrainableProjection, trainable
from moebius.types import PROJECTIONS, ExpertWeights, MoeLayer

RATE = 1e-2  # change of a logarithm, or of an entry of a basis relative to its size, per step
SIGN_RATE = 2e-2  # change of what a sign is of, in units of its scale, per step
_BETAS = (0.9, 0.99)
_WARM_UP = 10  # steps

#: Both projections of a layer.
Pair = Mapping[str, PackedProjection]
#: An experts module's forward: (tokens, hidden), (tokens, top_k), (tokens, top_k) to (tokens, hidden).
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


class Student:
    """The experts of one layer, packed by the method ``moebius``, open to training.

    Args:
        layer: where they are.
        packed: what to begin with.
        weights: what they stand for, if their signs are to be trained too.
        dtype: what products with the expert factors are computed in.
    """

    def __init__(self, layer: MoeLayer, packed: Pair, *, weights: ExpertWeights | None = None, dtype: torch.dtype) -> None:
        self.layer, self.dtype = layer, dtype
        self.projections: dict[str, TrainableProjection | TrainableCodes] = {
            name: trainable(packed[name], None if weights is None else weights.projection(name)) for name in PROJECTIONS
        }

    def packed(self) -> dict[str, PackedProjection]:
        """As it is stored, in as many bytes as at the beginning."""
        return {name: projection.packed() for name, projection in self.projections.items()}

    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        return [parameter for projection in self.projections.values() for parameter in projection.parameters()]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As the experts module's own."""
        products = {name: self._product(self.projections[name]) for name in PROJECTIONS}
        given = hidden_states.float(), top_k_index, top_k_weights.float()
        # What is rounded here, and where, is said by this class alone, whatever surrounds it.
        with torch.autocast(hidden_states.device.type, enabled=False):
            output, _ = observed_forward(self.layer.experts, self.layer.layout, *given, products)
        return output.to(hidden_states.dtype)

    def _product(self, projection: TrainableProjection | TrainableCodes) -> Product:
        def product(rows: Tensor, assignment: Assignment) -> Tensor:
            levels = projection.levels
            if levels.requires_grad and len(rows) > len(levels) * min(levels.shape[1:]):
                return grouped_linear(rows, _matrices(projection, levels), assignment, self.dtype)
            return self._by_rows(projection, levels, rows, assignment)

        return product

    def _by_rows(
        self, projection: TrainableProjection | TrainableCodes, levels: Tensor, rows: Tensor, assignment: Assignment
    ) -> Tensor:
        """Scales and basis meet the rows, not the matrices: their gradients then need none of the matrices. Worth it where
        signs are not trained, or where there are few rows for each matrix.
        """
        # A product with zeros and ones and not a pick: the gradient of a pick adds up in an order that is left open.
        chosen = nn.functional.one_hot(assignment.expert_of_row, len(assignment.counts)).float()  # (rows, experts)
        directions, entries = (chosen @ scales for scales in projection.scales())
        basis = projection.basis()
        if basis is None:
            return grouped_linear(rows * directions, levels, assignment, self.dtype) * entries
        if projection.before_factor:
            return grouped_linear(self._times(rows, basis.mT) * directions, levels, assignment, self.dtype) * entries
        return self._times(grouped_linear(rows * entries, levels, assignment, self.dtype) * directions, basis)

    def _times(self, rows: Tensor, basis: Tensor) -> Tensor:
        return (rows.to(self.dtype) @ basis.to(self.dtype)).to(rows.dtype)


def _matrices(projection: TrainableProjection | TrainableCodes, levels: Tensor) -> Tensor:
    """What the experts are, put together. (experts, out, in)"""
    directions, entries = projection.scales()
    basis = projection.basis()
    if not projection.before_factor:
        assert basis is not None
        return basis.mT @ (levels * directions.unsqueeze(2) * entries.unsqueeze(1))
    factors = levels * directions.unsqueeze(1) * entries.unsqueeze(2)
    return factors if basis is None else factors @ basis


def product_dtype(device: torch.device) -> torch.dtype:
    """What products are trained in: bf16 where that is several times as fast as float32."""
    if device.type == "cpu":
        return torch.float32 if native.missing() is not None else native.product_dtype(torch.bfloat16)
    return torch.bfloat16


class Training:
    """Adam over what students train, with a short warm-up, then down along a cosine.

    Args:
        students: whose parameters.
        rate, sign_rate: see :data:`RATE` and :data:`SIGN_RATE`.
    """

    def __init__(self, students: Sequence[Student], *, rate: float = RATE, sign_rate: float = SIGN_RATE) -> None:
        groups = []
        for trained in (projection for student in students for projection in student.projections.values()):
            groups.append({"params": [trained.log_directions, trained.log_entries], "scale": rate})
            if isinstance(trained, TrainableProjection):
                # Directions have unit length: their entries are of size 1/sqrt(length).
                groups.append({"params": [trained.directions], "scale": rate / math.sqrt(trained.directions.shape[1])})
                if trained.values is not None:
                    groups.append({"params": [trained.values], "scale": sign_rate})
        self._optimizer = torch.optim.Adam(groups, betas=_BETAS)

    def begin(self) -> None:
        """Before the gradients of a step."""
        self._optimizer.zero_grad()

    def step(self, number: int, share: float) -> None:
        """Take a step.

        Args:
            number: of steps before it.
            share: of the budget that was spent before it.
        """
        pace = min(1.0, (number + 1) / _WARM_UP) * (1 + math.cos(math.pi * min(share, 1.0))) / 2
        for group in self._optimizer.param_groups:
            group["lr"] = group["scale"] * pace
        self._optimizer.step()


class Order:
    """Windows in a random order, each once before any comes again.

    Args:
        windows: how many there are.
        batch: how many are picked at a time.
        seed: of the order.
    """

    def __init__(self, windows: int, batch: int, seed: int) -> None:
        self._windows, self._batch = windows, min(batch, windows)
        self._generator = torch.Generator().manual_seed(seed)
        self._waiting: list[int] = []

    def pick(self) -> list[int]:
        """The windows of the next step."""
        if len(self._waiting) < self._batch:
            self._waiting = torch.randperm(self._windows, generator=self._generator).tolist()
        picked, self._waiting = self._waiting[: self._batch], self._waiting[self._batch :]
        return picked
