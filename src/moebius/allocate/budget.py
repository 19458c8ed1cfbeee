"""One bit budget for a whole model: planes for every direction of every expert, and bits for every basis direction.

A unit is (projection of a layer, expert, direction). Its value is what the loss would lose without it; with ``b`` planes it
loses the share ``DISTORTION[b]`` of that. Costs are bytes as they are stored: planes, scales, widths, basis directions. At a
price per byte every choice is made on its own; bisection finds the price, and what is left over is spent greedily.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import isotonic_regression
from torch import Tensor

from moebius.errors import RecipeError
from moebius.formats.bits import packed_width
from moebius.formats.graded import ROUNDING_NOISE, SCALE_BITS
from moebius.formats.planes import DISTORTION

_GRID_BYTES = 4  # two fp16 numbers for the scales of a matrix or a basis
_WIDTH_BYTES = 2
_BISECTIONS = 60


@dataclass(frozen=True)
class Units:
    """The units of one projection of one layer.

    Attributes:
        values: loss without the unit, not increasing along the directions, see :func:`prefix_values`. (experts, directions)
        entries: weights along a direction of an expert's factor.
        basis_entries: weights of a basis direction.
    """

    values: Tensor
    entries: int
    basis_entries: int


@dataclass(frozen=True)
class Allocation:
    """What one projection of one layer was given.

    Attributes:
        widths: directions that each plane covers, in every expert. int64 (experts, planes)
        basis_bits: of the directions that are kept.
    """

    widths: Tensor
    basis_bits: tuple[int, ...]

    def planes(self) -> Tensor:
        """Planes of every unit that is kept. int64 (experts, kept)"""
        return (torch.arange(len(self.basis_bits)) < self.widths.unsqueeze(2)).sum(1)


def prefix_values(values: Tensor) -> Tensor:
    """Values made non-increasing along the directions, each expert on its own: the nearest such in least squares.

    Planes then cover prefixes of the directions, and where they are costs one number instead of a bit per direction.
    """
    rows = [torch.from_numpy(isotonic_regression(row.double().numpy(), increasing=False).x.copy()) for row in values]
    return torch.stack(rows)


def stored_bytes(units: Units, allocation: Allocation, scale_bits: int) -> int:
    """Bytes of the tensors that this allocation leads to."""
    widths, entries = allocation.widths, units.entries
    first_plane = widths[:, :1]  # there may be none
    live, first = int((first_plane > 0).sum()), int(first_plane.sum())
    planes = int(widths.sum()) * packed_width(entries, 1) + widths.numel() * _WIDTH_BYTES
    scales = live * (packed_width(entries, scale_bits) + 2 * _GRID_BYTES) + packed_width(first, scale_bits)
    basis = sum(_basis_bytes(units, bits) for bits in allocation.basis_bits) + _GRID_BYTES
    return planes + scales + basis


def expected_loss(units: Units, allocation: Allocation) -> float:
    """What the loss is expected to lose under an allocation."""
    kept = len(allocation.basis_bits)
    share = torch.tensor(DISTORTION, dtype=torch.float64)[allocation.planes()]
    values, live = units.values.double(), allocation.planes() > 0
    noise = torch.tensor([ROUNDING_NOISE[bits] for bits in allocation.basis_bits], dtype=torch.float64)
    return float((values[:, :kept] * (share + live * noise)).sum() + values[:, kept:].sum())


def allocate(
    groups: Sequence[Units], budget: int, *, scale_bits: int, grades: Sequence[int], most_planes: int
) -> list[Allocation]:
    """Spend a budget over all units of all projections.

    Args:
        groups: the projections of all layers.
        budget: bytes, all in all.
        scale_bits: of an entry's or direction's scale.
        grades: bits that a basis direction may have.
        most_planes: that a direction of an expert may have.

    Raises:
        RecipeError: a budget that does not even pay for what is stored without any plane.
    """
    least = [_choose(units, math.inf, scale_bits, grades, most_planes) for units in groups]
    if _total(groups, least, scale_bits) > budget:
        raise RecipeError(f"bits: got a budget of {budget} bytes, wanted at least {_total(groups, least, scale_bits)} here")
    # Values are losses and may be of any size; prices are in their unit per byte.
    top = max(float(units.values.max()) for units in groups)
    low, high, best = math.log(top * 1e-18 + 1e-300), math.log(top + 1e-300), least
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        chosen = [_choose(units, math.exp(middle), scale_bits, grades, most_planes) for units in groups]
        if _total(groups, chosen, scale_bits) <= budget:
            high, best = middle, chosen
        else:
            low = middle
    return _fill(groups, best, budget, scale_bits, most_planes)


def _total(groups: Sequence[Units], allocations: Sequence[Allocation], scale_bits: int) -> int:
    return sum(stored_bytes(units, a, scale_bits) for units, a in zip(groups, allocations, strict=True))


def _choose(units: Units, price: float, scale_bits: int, grades: Sequence[int], most_planes: int) -> Allocation:
    """The best choices where a byte costs ``price``: planes, then which experts and directions pay for what they share."""
    values = units.values.double()
    if price == math.inf:
        return Allocation(torch.zeros(len(values), 0, dtype=torch.int64), ())
    costs = _plane_costs(units, scale_bits, most_planes)
    saved = values.new_tensor([DISTORTION[p] - DISTORTION[p + 1] for p in range(most_planes)])
    planes = (values.unsqueeze(2) * saved > price * costs).sum(2)
    spent = torch.cat([costs.new_zeros(1), costs.cumsum(0)])
    kept_loss = values.new_tensor([1 - share for share in DISTORTION[: most_planes + 1]])
    profit = values * kept_loss[planes] - price * spent[planes]
    of_expert = packed_width(units.entries, scale_bits) + 2 * _GRID_BYTES
    planes = planes * (profit.sum(1) > price * of_expert).unsqueeze(1)
    # A basis direction is rounded to the bits that suit it, and kept if the experts that use it pay for it.
    live = planes > 0
    noise = values.new_tensor([ROUNDING_NOISE[bits] for bits in grades])
    bytes_ = values.new_tensor([float(_basis_bytes(units, bits)) for bits in grades])
    shared, grade = ((values * live).sum(0).unsqueeze(1) * noise + price * bytes_).min(1)
    pays = ((profit * live).sum(0) > shared).nonzero()
    kept = int(pays.max()) + 1 if len(pays) else 0
    planes = planes[:, :kept]
    most = int(planes.max()) if planes.numel() else 0
    widths = (planes.unsqueeze(1) > torch.arange(most).unsqueeze(1)).sum(2)
    bits = torch.tensor(list(grades))[grade[:kept]]
    return Allocation(widths, tuple(bits.cummin(0).values.tolist()) if kept else ())


def _fill(
    groups: Sequence[Units], allocations: list[Allocation], budget: int, scale_bits: int, most_planes: int
) -> list[Allocation]:
    """Add single planes, the best for its bytes first, while any fits."""
    # Codes of direction scales are one stream per projection: the last byte of each is set aside.
    left = float(budget - _total(groups, allocations, scale_bits) - len(groups))
    widths = [a.widths.tolist() for a in allocations]
    candidates: list[tuple[float, int, int, int]] = []

    def offer(group: int, expert: int, plane: int) -> None:
        """The next direction of a plane, if the plane below reaches it."""
        mine = widths[group][expert]
        reach = mine[plane - 1] if plane else len(allocations[group].basis_bits) if mine[0] else 0
        if plane < len(mine) and mine[plane] < reach:
            value = float(groups[group].values[expert, mine[plane]])
            gain = value * (DISTORTION[plane] - DISTORTION[plane + 1])
            heapq.heappush(candidates, (-gain / float(costs[group][plane]), group, expert, plane))

    costs = [_plane_costs(units, scale_bits, most_planes) for units in groups]
    for group, rows in enumerate(widths):
        for expert, row in enumerate(rows):
            for plane in range(len(row)):
                offer(group, expert, plane)
    while candidates:
        _, group, expert, plane = heapq.heappop(candidates)
        cost = float(costs[group][plane])
        if cost > left:
            continue
        left -= cost
        widths[group][expert][plane] += 1
        offer(group, expert, plane)
        if plane + 1 < len(widths[group][expert]) and widths[group][expert][plane + 1] == widths[group][expert][plane] - 1:
            offer(group, expert, plane + 1)
    return [
        Allocation(torch.tensor(rows, dtype=torch.int64).view(a.widths.shape), a.basis_bits)
        for rows, a in zip(widths, allocations, strict=True)
    ]


def _plane_costs(units: Units, scale_bits: int, most_planes: int) -> Tensor:
    """Bytes of the first plane of a direction, with its scale, and of each further one. float64 (planes,)"""
    costs = torch.full((most_planes,), float(packed_width(units.entries, 1)), dtype=torch.float64)
    costs[0] += scale_bits / 8
    return costs


def _basis_bytes(units: Units, bits: int) -> int:
    return packed_width(units.basis_entries, bits) + SCALE_BITS // 8
