"""Trellis codes with error feedback, for all experts of a chunk at once: column after column, a whole column at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moebius import native
from moebius.formats.logarithmic import decode, encode
from moebius.formats.trellis import DISTORTION, MOST_RATE, SCALE_BITS, STATE_BITS, Trellis, levels_of, table
from moebius.linalg.hessian import unit_upper
from moebius.quantize.feedback import with_all_errors, with_feedback
from moebius.quantize.planes import deviations

_TINY = 1e-30


@dataclass(frozen=True)
class TrellisCodes:
    """Quantized matrices before their scales are rounded.

    Attributes:
        codes: uint8 (experts, rows, columns).
        levels: what they stand for. (experts, rows, columns)
        rates: int64 (experts, columns).
        row_scales: (experts, rows).
        column_scales: (experts, columns), zero where the rate is.
    """

    codes: Tensor
    levels: Tensor
    rates: Tensor
    row_scales: Tensor
    column_scales: Tensor

    def values(self) -> Tensor:
        """With the scales as they will be stored. (experts, rows, columns)"""
        rows, columns = (decode(*found) for found in self._encoded())
        return self.levels * rows.unsqueeze(2) * columns.unsqueeze(1)

    def packed(self) -> Trellis:
        """As it is stored."""
        return Trellis.pack(self.codes, self.rates, *self._encoded())

    def _encoded(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        return encode(self.row_scales, SCALE_BITS), encode(self.column_scales, SCALE_BITS, self.rates > 0)


def quantize_columns(weight: Tensor, moments: Tensor, rates: Tensor, *, sweeps: int, block_size: int) -> TrellisCodes:
    """Codes for the columns of matrices, those that carry most first.

    Args:
        weight: (experts, rows, columns) float32.
        moments: positive definite. (experts, columns, columns) float32
        rates: bits per entry of every column. (experts, columns)
        sweeps: further passes, see :func:`moebius.quantize.feedback.with_all_errors`.
        block_size: columns whose errors are pushed on together: a matter of speed.
    """
    order = moments.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    moments = torch.stack([moment[mine][:, mine] for moment, mine in zip(moments, order, strict=True)])
    target = torch.stack([some.mT[mine] for some, mine in zip(weight, order, strict=True)])  # (experts, columns, rows)
    ordered = rates.gather(1, order)
    of_column, of_row = deviations(target, ordered > 0)
    codes = torch.zeros(target.shape, dtype=torch.uint8, device=target.device)
    levels, scales = torch.zeros_like(target), of_column.clone()

    def quantize(step: int, values: Tensor) -> Tensor:
        aims = torch.stack([values, of_row * scales[:, step, None].clamp_min(_TINY)])
        codes[:, step], levels[:, step] = best_codes(aims[0], aims[1], ordered[:, step])
        shape = levels[:, step] * of_row
        fit = ((values * shape).sum(1) / shape.square().sum(1).clamp_min(_TINY)).clamp_min(0)
        scales[:, step] = fit
        return shape * fit.unsqueeze(1)

    with_feedback(target, unit_upper(moments)[0], block_size, quantize)
    for _ in range(sweeps):
        current = levels * of_row.unsqueeze(1) * scales.unsqueeze(2)
        with_all_errors(target, current, moments, block_size, quantize)
    back = order.argsort(1)
    place = back.unsqueeze(2).expand_as(target)
    return TrellisCodes(codes.gather(1, place).mT, levels.gather(1, place).mT, rates, of_row, scales.gather(1, back))


def best_codes(values: Tensor, scales: Tensor, rates: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of sequences whose levels times ``scales`` come nearest to ``values``, and those levels.

    Args:
        values, scales: (sequences, entries) float32.
        rates: bits per entry, zero for none. (sequences,)

    Returns:
        uint8 and float32, (sequences, entries).
    """
    codes = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    levels = torch.zeros_like(values)
    for rate in range(1, MOST_RATE + 1):
        mine = (rates == rate).nonzero().squeeze(1)
        if len(mine):
            found = _path(values[mine].contiguous(), scales[mine].contiguous(), rate)
            codes[mine], levels[mine] = found, levels_of(found.long(), rate)
    return codes, levels


def rate_values(weight: Tensor, moments: Tensor, sensitivity: Tensor) -> Tensor:
    """What the loss would lose without each column, given that errors are fed back: ``φ d_j ‖w_j‖²`` with ``H = V D Vᵀ``.

    Args:
        weight: (experts, rows, columns).
        moments: positive definite. (experts, columns, columns)
        sensitivity: ``φ``, (experts,) float64.

    Returns:
        float64 (experts, columns).
    """
    values = torch.empty(weight.shape[0], weight.shape[2], dtype=torch.float64, device=weight.device)
    for expert, moment in enumerate(moments):
        order = moment.diagonal().argsort(descending=True, stable=True)
        roots = unit_upper(moment[order][:, order].unsqueeze(0))[1][0]
        values[expert, order] = roots.double().square() * weight[expert].double().square().sum(0)[order]
    return values * sensitivity.unsqueeze(1)


def share_rates(values: list[Tensor], entries: list[int], budget: int) -> list[Tensor]:
    """Rates for the columns of all projections, by the slope of what each further bit saves.

    Args:
        values: of each projection, see :func:`rate_values`. (experts, columns)
        entries: bytes of a bit plane of a column of each projection.
        budget: bytes for codes.

    Returns:
        int64, shaped as ``values``.
    """
    saved = torch.tensor([DISTORTION[rate] - DISTORTION[rate + 1] for rate in range(MOST_RATE)], dtype=torch.float64)
    slopes = torch.cat(
        [(some.double().cpu().unsqueeze(2) * saved / size).flatten() for some, size in zip(values, entries, strict=True)]
    )
    sizes = torch.cat([torch.full((some.numel() * MOST_RATE,), size) for some, size in zip(values, entries, strict=True)])
    order = slopes.argsort(descending=True, stable=True)  # slopes fall with the rate: the first planes come first
    taken = torch.zeros_like(slopes, dtype=torch.bool)
    taken[order] = sizes[order].cumsum(0) <= budget
    parts = taken.split([some.numel() * MOST_RATE for some in values])
    return [part.view(*some.shape, MOST_RATE).sum(2) for part, some in zip(parts, values, strict=True)]


def expected_loss(values: Tensor, rates: Tensor) -> float:
    """What the loss is expected to lose with these rates."""
    return float((values.double().cpu() * torch.tensor(DISTORTION, dtype=torch.float64)[rates.cpu()]).sum())


def _path(values: Tensor, scales: Tensor, rate: int) -> Tensor:
    if native.missing() is not None:
        return _path_in_torch(values, scales, rate)
    codes = torch.empty(values.shape, dtype=torch.uint8)
    native.extension().search_trellis(values.cpu().contiguous(), scales.cpu().contiguous(), table(rate), rate, codes)
    return codes.to(values.device)


def _path_in_torch(values: Tensor, scales: Tensor, rate: int) -> Tensor:
    """Viterbi's algorithm on all sequences at once, an entry at a time: twice around the sequence, and the seam of the second
    turn is the state that the first had there. For machines without the compiled search, which it is slower than.
    """
    sequences, length = values.shape
    groups, branches = 1 << (STATE_BITS - rate), 1 << rate
    known = table(rate, values.device)

    def walk(cost: Tensor, entries: list[int]) -> tuple[Tensor, list[Tensor]]:
        back = []
        for entry in entries:
            least, branch = cost.view(sequences, branches, groups).min(1)
            back.append(branch)
            error = values[:, entry, None] - scales[:, entry, None] * known
            cost = least.repeat_interleave(branches, 1) + error.square()
        return cost, back

    def trace(state: Tensor, back: list[Tensor]) -> tuple[Tensor, Tensor]:
        codes = []
        for branch in reversed(back):
            codes.append(state & (branches - 1))
            group = state >> rate
            state = group + groups * branch.gather(1, group.unsqueeze(1)).squeeze(1)
        return state, torch.stack(codes[::-1], 1)

    def around(seam: Tensor) -> tuple[Tensor, Tensor]:
        """The best path from a state of each sequence back to it: what it costs, and its codes."""
        start = torch.full((sequences, 2**STATE_BITS), torch.inf, device=values.device).scatter(1, seam.unsqueeze(1), 0.0)
        cost, back = walk(start, list(range(length)))
        return cost.gather(1, seam.unsqueeze(1)).squeeze(1), trace(seam, back)[1]

    if length * rate < 2 * STATE_BITS:  # some states do not come back to themselves: all are tried
        best = values.new_full((sequences,), torch.inf)
        codes = torch.zeros(sequences, length, dtype=torch.int64, device=values.device)
        for state in range(2**STATE_BITS):
            cost, found = around(torch.full((sequences,), state, device=values.device))
            best, codes = torch.minimum(cost, best), torch.where((cost < best).unsqueeze(1), found, codes)
        return codes.to(torch.uint8)
    turns = max(2, -(-64 // length))
    cost, back = walk(torch.zeros(sequences, 2**STATE_BITS, device=values.device), list(range(length)) * turns)
    seam, _ = trace(cost.argmin(1), back[length * (turns // 2) :])
    return around(seam)[1].to(torch.uint8)
