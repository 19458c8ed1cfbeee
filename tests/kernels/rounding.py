"""What tiles of bytes round: the definition of a layer with its inputs in the eight bits that the kernels give them.

Before each of the four products of a layer the kernels round what goes in: to 8 bits for a matrix that many meet, with a step
for every 128 inputs. Nothing else differs from the definition by more than the amplitudes of planes in bytes (0.31 %), so that
a layer can be told from a wrong one however much a gate magnifies the rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moebius.formats import Packed, PackedProjection, planes
from moebius.formats.bits import unpack
from moebius.formats.graded import Graded
from moebius.formats.logarithmic import decode
from moebius.formats.planes import Planes
from moebius.formats.signs import Signs

#: What a byte is worth, by number of planes, and the bytes of the planes: amplitudes, but for 0.31 % of them at most.
UNITS = (0.0, 0.01063846, 0.01510323, 0.01781549, 0.02143751, 0.02351735, 0.02601575, 0.02843384)
WHOLE = {1: (75,), 2: (65, 35), 3: (65, 34, 17), 4: (62, 32, 16, 8)}
WHOLE |= {planes: tuple(64 >> plane for plane in range(planes)) for planes in (5, 6, 7)}
#: Inputs that share a step; the most that meet a matrix of an expert, and a shared one, without being rounded to bytes.
BLOCK, FEW_OF_EXPERT, FEW_OF_SHARED = 128, 2, 8


def to_bytes(values: Tensor) -> Tensor:
    """(n, width) rounded to 8 bits, 128 at a time."""
    blocks = torch.nn.functional.pad(values, (0, -values.shape[1] % BLOCK)).view(len(values), -1, BLOCK)
    steps = blocks.abs().amax(2, keepdim=True) / 127
    rounded = torch.where(steps > 0, (blocks / steps).round() * steps, 0)
    return rounded.view(len(values), -1)[:, : values.shape[1]]


def product(packed: Packed, matrix: int, inputs: Tensor) -> Tensor:
    """A matrix times (n, columns) that are rounded as tiles round them: (n, rows)."""
    weight = _in_bytes(packed, matrix) if isinstance(packed, Planes) else packed.unpack(torch.tensor([matrix]))[0]
    scales = _scales_of_inputs(packed, matrix)
    if isinstance(packed, Signs) and packed.salient:
        return _signs(packed, matrix, inputs)
    rounded = to_bytes(inputs * scales)
    return rounded @ torch.where(scales != 0, weight / scales, 0).mT


def _scales_of_inputs(packed: Packed, matrix: int) -> Tensor:
    one = torch.tensor([matrix])
    if isinstance(packed, Planes):
        if packed.side == "output":
            return packed.entry_scales(one)[0]
        return packed.direction_scales(one)[0] * torch.tensor(UNITS)[packed.counts(one)[0]]
    if isinstance(packed, Signs):
        assert packed.column_scales is not None
        return packed.column_scales[matrix].float()
    if isinstance(packed, Graded) and packed.side == "output":
        assert packed.scale_codes is not None and packed.scale_grid is not None
        return decode(packed.scale_codes, packed.scale_grid)[0]
    return torch.ones(packed.columns)


def _in_bytes(packed: Planes, matrix: int) -> Tensor:
    """The matrix with amplitudes that are whole numbers of a unit."""
    amplitudes = dict(planes.AMPLITUDES)
    try:
        planes.AMPLITUDES.update({count: tuple(UNITS[count] * whole for whole in WHOLE[count]) for count in WHOLE})
        return packed.unpack(torch.tensor([matrix]))[0]
    finally:
        planes.AMPLITUDES.update(amplitudes)


def _signs(packed: Signs, matrix: int, inputs: Tensor) -> Tensor:
    """The second signs have blocks of their own."""
    assert packed.salient_mask is not None and packed.salient_column_scales is not None and packed.row_scales is not None
    picked = unpack(packed.salient_mask[matrix : matrix + 1], 1, packed.columns)[0].nonzero().squeeze(1)
    first = packed.replace(salient=0, salient_mask=None, salient_signs=None, salient_column_scales=None)
    weight = packed.unpack(torch.tensor([matrix]))[0]
    second = (weight - first.unpack(torch.tensor([matrix]))[0])[:, picked]
    scales = packed.salient_column_scales[matrix].float()
    rounded = to_bytes(inputs[:, picked] * scales)
    return product(first, matrix, inputs) + rounded @ torch.where(scales != 0, second / scales, 0).mT


def layer(
    gate_up: PackedProjection,
    down: PackedProjection,
    activation: Callable[[Tensor], Tensor],
    given: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """:func:`moebius.kernels.routed_experts.reference.routed_experts` with inputs rounded."""
    hidden, index, weights = given
    tokens, top_k = index.shape
    if not tokens:
        return torch.zeros_like(hidden)
    slots = index.reshape(-1)
    outputs = torch.zeros(tokens * top_k, down.factor.rows)
    inputs = _shared(gate_up.right, hidden.float())
    experts = [e for e in slots.unique().tolist() if 0 <= e < gate_up.factor.batch]
    chosen = [(slots == expert).nonzero().squeeze(1) for expert in experts]
    states = [_of_expert(gate_up.factor, e, inputs[mine // top_k]) for e, mine in zip(experts, chosen, strict=True)]
    if experts:
        order, rows = torch.cat(chosen), torch.cat(states)
        between = torch.zeros(tokens * top_k, rows.shape[1])
        between[order] = rows
        real = torch.zeros(tokens * top_k, dtype=torch.bool)
        real[order] = True
        # All slots pass a shared factor together, padding too.
        passed = _shared(down.right, activation(_shared(gate_up.left, between)))
        for expert, mine in zip(experts, chosen, strict=True):
            outputs[mine] = _of_expert(down.factor, expert, passed[mine])
    summed = (outputs.view(tokens, top_k, -1) * weights.float().unsqueeze(2)).sum(1)
    return _shared(down.left, summed)


def _of_expert(factor: Packed, expert: int, inputs: Tensor) -> Tensor:
    if len(inputs) > FEW_OF_EXPERT:
        return product(factor, expert, inputs)
    return inputs @ factor.unpack(torch.tensor([expert]))[0].mT


def _shared(factor: Packed | None, states: Tensor) -> Tensor:
    if factor is None:
        return states
    return product(factor, 0, states) if len(states) > FEW_OF_SHARED else states @ factor.unpack()[0].mT
