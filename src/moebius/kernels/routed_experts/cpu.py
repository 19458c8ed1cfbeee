"""On the CPU, from the packed bits as they lie in memory: C++ in ``csrc/``, with the instructions that the processor has.

Vectors are rounded to integers that are fine enough for sums in 16 bits (signs) or 32 bits (shared factors); sums are exact,
so that every level of instructions gives the same bits. Scales are decoded once; everything else is read as it is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moebius.errors import CheckpointError, KernelError
from moebius.formats import Packed, PackedProjection
from moebius.formats.bits import unpack
from moebius.formats.graded import Graded
from moebius.formats.integers import Integers
from moebius.formats.logarithmic import decode
from moebius.formats.planes import MOST_PLANES, Planes
from moebius.formats.signs import Signs
from moebius.kernels.routed_experts import reference

try:
    from moebius.kernels.routed_experts import _cpu  # type: ignore[attr-defined]
except ImportError as error:  # installed where there was no C++ compiler
    _cpu: Any = None  # type: ignore[no-redef]
    _MISSING = f"the compiled kernels are not there ({error}); reinstall moebius where there is a C++ compiler"

#: Tokens of an expert up to which reading its bits for each token is faster than unpacking them once.
_FEW_TOKENS = 8
#: The same for a shared factor.
_FEW_STATES = 16

_level: Any = _cpu and _cpu.level(_cpu.levels()[0])


def levels() -> list[str]:
    """Sets of instructions that this processor has and the kernels know, the best first; none if nothing was compiled."""
    return _cpu.levels() if _cpu else []


def level() -> str:
    """The set of instructions in use."""
    return _level.name


def use_level(name: str) -> None:
    """Use this set of instructions from now on.

    Raises:
        KernelError: a name that is not among :func:`levels`.
    """
    global _level
    if name not in levels():
        raise KernelError(
            f"instruction level: got {name!r}, wanted one of {', '.join(levels()) or 'none: nothing was compiled'}"
        )
    _level = _cpu.level(name)


def refusal(gate_up: PackedProjection, down: PackedProjection, activation: Callable[[Tensor], Tensor]) -> str | None:
    """What keeps :func:`prepare` from running a layer, in words; None if nothing does. Any activation will do."""
    if _cpu is None:
        return _MISSING
    for name, projection in (("gate_up", gate_up), ("down", down)):
        factor = projection.factor
        if not isinstance(factor, (Planes, Signs)):
            return f"{name} is stored as {factor.name}, wanted planes or signs"
        where = {part.device.type for packed in projection.parts().values() for part in packed.tensors().values()}
        if where != {"cpu"}:
            return f"{name} is on {', '.join(sorted(where))}, wanted cpu"
    return None


def prepare(gate_up: PackedProjection, down: PackedProjection) -> CpuExperts:
    """Decode the scales of a layer, once for many calls."""
    return CpuExperts(gate_up, down)


class CpuExperts:
    """:func:`moebius.kernels.routed_experts.reference.routed_experts` of one layer that :func:`refusal` lets through."""

    def __init__(self, gate_up: PackedProjection, down: PackedProjection) -> None:
        self.gate_up, self.down = gate_up, down
        self.first, self.second = _Factor(gate_up.factor), _Factor(down.factor)
        self.shared = {
            name: _Shared(packed)
            for name, packed in (
                ("gate_up.right", gate_up.right),
                ("gate_up.left", gate_up.left),
                ("down.right", down.right),
                ("down.left", down.left),
            )
            if packed is not None
        }

    def __call__(
        self,
        hidden: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        activation: Callable[[Tensor], Tensor],
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> Tensor:
        """As the reference: (tokens, hidden), (tokens, top_k), (tokens, top_k) to (tokens, hidden)."""
        tokens, top_k = top_k_index.shape
        if tokens * top_k > _FEW_TOKENS * self.first.batch:
            projections = self.gate_up, self.down
            return reference.routed_experts(
                hidden, top_k_index, top_k_weights, *projections, activation, gate_up_bias, down_bias
            )
        slots = top_k_index.reshape(-1).long().contiguous()
        states = self._shared("gate_up.right", hidden.float().contiguous())
        states = self._shared("gate_up.left", self.first(states, slots, top_k))
        if gate_up_bias is not None:
            states = states + gate_up_bias[slots.clamp(0, self.first.batch - 1)].float()
        states = self._shared("down.right", activation(states))
        states = self.second(states, slots, 1).view(tokens, top_k, self.second.rows)
        result = self._shared("down.left", torch.bmm(top_k_weights.float().unsqueeze(1), states).squeeze(1))
        if down_bias is not None:
            result = result + reference.routed_bias(top_k_index, top_k_weights, down_bias)
        return result.to(hidden.dtype)

    def _shared(self, name: str, states: Tensor) -> Tensor:
        return self.shared[name](states) if name in self.shared else states


class _Factor:
    """Matrices of experts, and the decoded scales that the extension reads."""

    def __init__(self, packed: Packed) -> None:
        self.batch, self.rows, self.columns = packed.batch, packed.rows, packed.columns
        self.factor, self.held = _planes(packed) if isinstance(packed, Planes) else _signs(packed)

    def __call__(self, inputs: Tensor, slots: Tensor, inputs_per: int) -> Tensor:
        """Row ``i`` is the matrix ``slots[i]`` times row ``i // inputs_per`` of the inputs: (slots, rows)."""
        inputs = inputs.contiguous()
        outputs = torch.empty(len(slots), self.rows)
        addresses = inputs.data_ptr(), outputs.data_ptr(), slots.data_ptr()
        self.factor.apply(*addresses, len(slots), inputs_per, _level, torch.get_num_threads())
        return outputs


class _Shared:
    """A factor that all tokens meet."""

    def __init__(self, packed: Packed) -> None:
        self.packed = packed
        self.factor: Any = None
        self.held: tuple[Tensor, ...] = ()
        if codes := _codes(packed):
            self.factor, self.held = codes

    def __call__(self, states: Tensor) -> Tensor:
        """(n, columns) to (n, rows)."""
        if self.factor is None or len(states) > _FEW_STATES:
            return states @ self.packed.unpack()[0].mT
        states = states.contiguous()
        outputs = torch.empty(len(states), self.packed.rows)
        self.factor.apply(states.data_ptr(), outputs.data_ptr(), 0, len(states), 1, _level, torch.get_num_threads())
        return outputs


def _planes(packed: Planes) -> tuple[Any, tuple[Tensor, ...]]:
    assert packed.widths is not None and packed.signs is not None
    _check_widths(packed, packed.widths.long())
    held = (packed.widths.contiguous(), packed.signs.contiguous(), packed.entry_scales(), packed.direction_scales())
    widths, signs, entry_scales, direction_scales = (tensor.data_ptr() for tensor in held)
    shape = packed.batch, packed.directions, packed.entries, packed.planes
    factor = _cpu.planes(packed.side == "input", *shape, widths, signs, packed.sign_rows, entry_scales, direction_scales)
    return factor, held


def _check_widths(packed: Planes, widths: Tensor) -> None:
    """What places are read at comes from the file: damage there must not reach beyond the tensors."""
    falling = torch.cat([widths.new_full((packed.batch, 1), packed.directions), widths, widths.new_zeros(packed.batch, 1)], 1)
    if bool((falling.diff(dim=1) > 0).any()) or int(widths.sum()) != packed.sign_rows or packed.planes > MOST_PLANES:
        raise CheckpointError(
            f"planes: got widths that add up to {int(widths.sum())} rows, wanted {packed.sign_rows}, none wider than the one "
            f"before, {packed.directions} directions and {MOST_PLANES} planes at most; the file is damaged, fetch it again"
        )


def _signs(packed: Packed) -> tuple[Any, tuple[Tensor, ...]]:
    assert isinstance(packed, Signs)
    assert packed.signs is not None and packed.row_scales is not None and packed.column_scales is not None
    none = torch.empty(0)
    picked, second, second_scales = none, none, none
    if packed.salient:
        assert packed.salient_mask is not None and packed.salient_signs is not None
        assert packed.salient_column_scales is not None
        picked = unpack(packed.salient_mask, 1, packed.columns).nonzero()[:, 1].int()
        if len(picked) != packed.batch * packed.salient:
            raise CheckpointError(
                f"signs: got {len(picked)} salient columns in {packed.batch} matrices, wanted {packed.salient} in each; "
                "the file is damaged, fetch it again"
            )
        second, second_scales = packed.salient_signs.contiguous(), packed.salient_column_scales.float().contiguous()
    scales = packed.row_scales.float().contiguous(), packed.column_scales.float().contiguous()
    held = (packed.signs.contiguous(), *scales, picked, second, second_scales)
    addresses = (tensor.data_ptr() for tensor in held)
    return _cpu.signs(packed.batch, packed.rows, packed.columns, packed.salient, *addresses), held


def _codes(packed: Packed) -> tuple[Any, tuple[Tensor, ...]] | None:
    """None: a format that is unpacked instead."""
    if isinstance(packed, Graded):
        assert packed.codes is not None and packed.scale_codes is not None and packed.scale_grid is not None
        codes, scales = packed.codes.contiguous(), decode(packed.scale_codes, packed.scale_grid)
        held = codes, scales.contiguous()
        arguments = packed.side == "input", packed.directions, packed.entries, packed.runs()
    elif isinstance(packed, Integers) and packed.groups == 1 and not packed.zero_points:
        assert packed.codes is not None and packed.scales is not None
        held = packed.codes.contiguous(), packed.scales.float().contiguous()
        arguments = True, packed.rows, packed.columns, [(packed.bits, packed.rows)]
    else:
        return None
    return _cpu.codes(*arguments, held[0].data_ptr(), held[0].numel(), held[1].data_ptr()), held
