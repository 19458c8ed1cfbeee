"""On the CPU, from the packed bits as they lie in memory: C++ in ``csrc/``, with the instructions that the processor has.

For one token or two of an expert, and up to eight of a shared factor, vectors are rounded to integers that are fine enough
for sums in 16 bits (signs) or 32 bits (shared factors); sums are exact, so that every level of instructions gives the same
bits. For more, with AVX-512 VNNI, a tile of the matrix at a time is unpacked to bytes and multiplied with inputs rounded to 8
bits, with a step for every 128 of them. Elsewhere one matrix at a time is unpacked to bf16 in a buffer and multiplied by
PyTorch. Scales are decoded once; everything else is read as it is stored.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moebius.errors import CheckpointError, KernelError
from moebius.formats import Packed, PackedProjection
from moebius.formats.bits import unpack, unpack_signs
from moebius.formats.graded import Graded
from moebius.formats.integers import Integers
from moebius.formats.logarithmic import decode
from moebius.formats.planes import MOST_PLANES, Planes
from moebius.formats.signs import Signs
from moebius.kernels.routed_experts import reference
from moebius.kernels.routed_experts.activations import recognize

try:
    from moebius.kernels.routed_experts import _cpu  # type: ignore[attr-defined]
except ImportError as error:  # installed where there was no C++ compiler
    _cpu: Any = None  # type: ignore[no-redef]
    _MISSING = f"the compiled kernels are not there ({error}); reinstall moebius where there is a C++ compiler"

#: Tokens up to which reading bits for each token is faster than unpacking them once for PyTorch: of an expert, and of a shared
#: factor.
_FEW_TOKENS, _FEW_STATES = 8, 8
#: Tokens that go through both projections together where that is not one call: what all their experts compute is held at once.
_TOKENS_AT_ONCE = 1024

_scratch = threading.local()
_level: Any = _cpu and _cpu.level(_cpu.levels()[0])


def levels() -> list[str]:
    """Sets of instructions that this processor has and the kernels know, the best first; none if nothing was compiled."""
    return _cpu.levels() if _cpu else []


def missing() -> str | None:
    """Why there are no compiled kernels; None if there are."""
    return _MISSING if _cpu is None else None


def extension() -> Any:
    """The compiled module, for other ops."""
    return _cpu


def current() -> Any:
    """The extension's own object of the set of instructions in use."""
    return _level


def product_dtype(inputs: torch.dtype) -> torch.dtype:
    """What dense products for these inputs are computed in: bf16 only where that is asked for and fast."""
    return torch.bfloat16 if inputs == torch.bfloat16 and _cpu.multiplies_bf16() else torch.float32


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
    if missing() is not None:
        return missing()
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
    """:func:`moebius.kernels.routed_experts.reference.routed_experts` of one layer that :func:`refusal` lets through.

    Attributes:
        compiled: the extension's own object of the whole layer with a gate in SiLU; None if a shared factor has no kernel.
    """

    def __init__(self, gate_up: PackedProjection, down: PackedProjection) -> None:
        self.experts, self.channels = gate_up.factor.batch, gate_up.shape[1]
        self.gate_up, self.down = kernel_of(gate_up.factor), kernel_of(down.factor)
        self.shared = {
            name: kernel_of(packed)
            for name, packed in (
                ("gate_up.right", gate_up.right),
                ("gate_up.left", gate_up.left),
                ("down.right", down.right),
                ("down.left", down.left),
            )
            if packed is not None
        }
        self.compiled: Any = None
        if not any(isinstance(kernel, _Unpacked) for kernel in self.shared.values()):
            shared = {name: kernel.factor for name, kernel in self.shared.items()}
            self.compiled = _cpu.Experts(
                shared.get("gate_up.right"), self.gate_up.factor, shared.get("gate_up.left"),
                shared.get("down.right"), self.down.factor, shared.get("down.left"),
            )  # fmt: skip

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
        if gate_up_bias is None and down_bias is None and self._in_one_call(tokens * top_k, activation):
            return self.with_silu(hidden, top_k_index, top_k_weights)
        if tokens > _TOKENS_AT_ONCE:
            parts = (tensor.split(_TOKENS_AT_ONCE) for tensor in (hidden, top_k_index, top_k_weights))
            some = [self(*part, activation, gate_up_bias, down_bias) for part in zip(*parts, strict=True)]  # type: ignore[call-arg]
            return torch.cat(some)
        dtype = product_dtype(hidden.dtype)
        slots, weights = top_k_index.reshape(-1).long().contiguous(), top_k_weights.float()
        inputs = self._shared("gate_up.right", hidden.float(), dtype)
        few, many = (slots, []) if _level.tiles else _by_count(slots, self.experts)
        if few is None:
            summed = inputs.new_zeros(tokens, self.down.rows)
        else:
            states = self._between(self.gate_up.packed(inputs, few, top_k), few, activation, gate_up_bias, dtype)
            states = self.down.packed(states, few)
            summed = torch.bmm(weights.unsqueeze(1), states.view(tokens, top_k, self.down.rows)).squeeze(1)
        for expert, mine in many:  # each from end to end: what it computes stays in the cache
            members = mine // top_k
            states = self.gate_up.dense(expert, inputs[members], dtype)
            states = self._between(states, slots[mine], activation, gate_up_bias, dtype)
            states = self.down.dense(expert, states, dtype)
            summed.index_add_(0, members, states.mul_(weights.reshape(-1, 1)[mine]))
        result = self._shared("down.left", summed, dtype)
        if down_bias is not None:
            result = result + reference.routed_bias(top_k_index, top_k_weights, down_bias)
        return result.to(hidden.dtype)

    def _in_one_call(self, slots: int, activation: Callable[[Tensor], Tensor]) -> bool:
        few = slots <= min(_FEW_TOKENS, _FEW_STATES)
        return (few or _level.tiles) and self.compiled is not None and recognize(activation, self.channels) == ("silu", True)

    def with_silu(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The layer in one call, where it is ``compiled``: its activation is SiLU of the first half of ``gate_up`` times the
        second.
        """
        inputs, chosen, weights = (
            hidden.float().contiguous(),
            top_k_index.long().contiguous(),
            top_k_weights.float().contiguous(),
        )
        outputs = torch.empty_like(inputs)
        addresses = inputs.data_ptr(), chosen.data_ptr(), weights.data_ptr(), *chosen.shape, outputs.data_ptr()
        self.compiled.apply(*addresses, _level, torch.get_num_threads())
        return outputs.to(hidden.dtype)

    def _between(
        self, states: Tensor, slots: Tensor, activation: Callable[[Tensor], Tensor], bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """From one expert factor to the other: (n, rows of the first) to (n, columns of the second)."""
        states = self._shared("gate_up.left", states, dtype)
        if bias is not None:
            states = states + bias[slots.clamp(0, self.experts - 1)].float()
        return self._shared("down.right", activation(states), dtype)

    def _shared(self, name: str, states: Tensor, dtype: torch.dtype) -> Tensor:
        kernel = self.shared.get(name)
        if kernel is None:
            return states
        return kernel.packed(states) if kernel.has_tiles() or len(states) <= _FEW_STATES else kernel.dense(0, states, dtype)


def _by_count(slots: Tensor, experts: int) -> tuple[Tensor | None, list[tuple[int, Tensor]]]:
    """Experts with many tokens and their slots, and what remains (-1 for slots taken out), or None if nothing does."""
    if len(slots) <= _FEW_TOKENS:
        return slots, []
    known = torch.where((slots >= 0) & (slots < experts), slots, experts)
    ranked, order = known.sort(stable=True)
    ends = torch.searchsorted(ranked, torch.arange(experts + 1), right=True).tolist()
    begins = [0, *ends]
    many = [(e, order[begins[e] : ends[e]]) for e in range(experts) if ends[e] - begins[e] > _FEW_TOKENS]
    if sum(len(mine) for _, mine in many) == ends[experts - 1]:
        return None if many else slots, many
    few = slots.clone()
    for _, mine in many:
        few[mine] = -1
    return few, many


class _Kernel(ABC):
    """Packed matrices, and what the extension reads of them.

    Attributes:
        factor: the extension's own object. It reads the tensors in ``held``.
    """

    factor: Any
    held: tuple[Tensor, ...]
    rows: int

    def has_tiles(self) -> bool:
        """Whether the extension multiplies any number of inputs fast, by tiles."""
        return bool(_level.tiles)

    def packed(self, inputs: Tensor, slots: Tensor | None = None, slots_per_input: int = 1) -> Tensor:
        """Row ``i`` is the matrix ``slots[i]`` times row ``i // slots_per_input`` of the inputs, zeros if that is no matrix.

        Args:
            inputs: (n, columns) float32.
            slots: (n * slots_per_input,) int64; None for the first matrix everywhere.
            slots_per_input: outputs for each input.

        Returns:
            (n * slots_per_input, rows) float32.
        """
        inputs = inputs.contiguous()
        outputs = torch.empty(len(inputs) * slots_per_input, self.rows)
        route = 0 if slots is None else slots.data_ptr()
        threads = torch.get_num_threads()
        self.factor.apply(inputs.data_ptr(), outputs.data_ptr(), route, len(outputs), slots_per_input, _level, threads)
        return outputs

    @abstractmethod
    def dense(self, matrix: int, inputs: Tensor, dtype: torch.dtype) -> Tensor:
        """One matrix times (n, columns) inputs: (n, rows) float32, through a product in ``dtype``."""

    def _unpacked(self, matrix: int, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """What the extension unpacks of a matrix, in a buffer that the next call writes to. (rows or less, width)"""
        buffer: Tensor | None = getattr(_scratch, "buffer", None)
        if buffer is None or buffer.numel() < rows * width:
            buffer = _scratch.buffer = torch.empty(rows * width, dtype=torch.bfloat16)
        written = self.factor.unpack(matrix, buffer.data_ptr(), _level, torch.get_num_threads())
        return buffer[: written * width].view(written, width).to(dtype)


class _Planes(_Kernel):
    def __init__(self, packed: Planes) -> None:
        assert packed.widths is not None and packed.signs is not None
        _check_widths(packed, packed.widths.long())
        self.rows, self.shape = packed.rows, (packed.directions, packed.entries)
        self.input = packed.side == "input"
        self.entry_scales = packed.entry_scales()
        self.held = packed.widths.contiguous(), packed.signs.contiguous(), self.entry_scales, packed.direction_scales()
        widths, signs, entry_scales, direction_scales = (tensor.data_ptr() for tensor in self.held)
        sizes = packed.batch, *self.shape, packed.planes
        self.factor = _cpu.planes(self.input, *sizes, widths, signs, packed.sign_rows, entry_scales, direction_scales)

    def dense(self, matrix: int, inputs: Tensor, dtype: torch.dtype) -> Tensor:
        directions = self._unpacked(matrix, *self.shape, dtype)
        scales, used = self.entry_scales[matrix], len(directions)
        if self.input:
            return (inputs[:, :used].to(dtype) @ directions).float() * scales
        outputs = inputs.new_zeros(len(inputs), self.rows)
        outputs[:, :used] = (inputs * scales).to(dtype) @ directions.mT
        return outputs


class _Signs(_Kernel):
    def __init__(self, packed: Signs) -> None:
        assert packed.signs is not None and packed.row_scales is not None and packed.column_scales is not None
        self.rows, self.columns, self.salient = packed.rows, packed.columns, packed.salient
        self.row_scales, self.column_scales = packed.row_scales.float(), packed.column_scales.float()
        none = torch.empty(0)
        self.picked, self.second, self.second_scales = none, none, none
        if packed.salient:
            assert packed.salient_mask is not None and packed.salient_signs is not None
            assert packed.salient_column_scales is not None
            self.picked = unpack(packed.salient_mask, 1, packed.columns).nonzero()[:, 1].int()
            if len(self.picked) != packed.batch * packed.salient:
                raise CheckpointError(
                    f"signs: got {len(self.picked)} salient columns in {packed.batch} matrices, wanted {packed.salient} in "
                    "each; the file is damaged, fetch it again"
                )
            self.picked = self.picked.view(packed.batch, packed.salient)
            self.second, self.second_scales = packed.salient_signs.contiguous(), packed.salient_column_scales.float()
        self.held = packed.signs.contiguous(), self.row_scales.contiguous(), self.column_scales.contiguous()
        self.held += self.picked, self.second, self.second_scales.contiguous()
        addresses = (tensor.data_ptr() for tensor in self.held)
        self.factor = _cpu.signs(packed.batch, packed.rows, packed.columns, packed.salient, *addresses)

    def dense(self, matrix: int, inputs: Tensor, dtype: torch.dtype) -> Tensor:
        signs = self._unpacked(matrix, self.rows, self.columns, dtype)
        outputs = ((inputs * self.column_scales[matrix]).to(dtype) @ signs.mT).float()
        if self.salient:
            picked = (inputs[:, self.picked[matrix]] * self.second_scales[matrix]).to(dtype)
            outputs += picked @ unpack_signs(self.second[matrix], self.salient).to(dtype).mT
        return outputs * self.row_scales[matrix]


class _Codes(_Kernel):
    """One matrix whose directions have a scale each: ``runs`` of bits, and how many directions have them."""

    def __init__(self, packed: Packed, codes: Tensor, scales: Tensor, runs: list[tuple[int, int]], side: str) -> None:
        self.rows, self.input = packed.rows, side == "input"
        self.shape = (packed.rows, packed.columns) if self.input else (packed.columns, packed.rows)
        self.held = codes.contiguous(), scales.float().flatten().contiguous()
        addresses = self.held[0].data_ptr(), self.held[0].numel(), self.held[1].data_ptr()
        self.factor = _cpu.codes(self.input, *self.shape, runs, *addresses)

    def dense(self, matrix: int, inputs: Tensor, dtype: torch.dtype) -> Tensor:
        directions, half = self._unpacked(matrix, *self.shape, dtype), 0.5 * self.held[1]
        if self.input:
            return (inputs.to(dtype) @ directions.mT).float() * half
        return ((inputs * half).to(dtype) @ directions).float()


class _Unpacked(_Kernel):
    """A shared factor in any other format."""

    def __init__(self, packed: Packed) -> None:
        self.matrix, self.rows = packed, packed.rows

    def has_tiles(self) -> bool:
        return False

    def packed(self, inputs: Tensor, slots: Tensor | None = None, slots_per_input: int = 1) -> Tensor:
        return inputs @ self.matrix.unpack()[0].mT

    def dense(self, matrix: int, inputs: Tensor, dtype: torch.dtype) -> Tensor:
        return (inputs.to(dtype) @ self.matrix.unpack()[0].mT.to(dtype)).float()


def kernel_of(packed: Packed) -> _Kernel:
    """The kernel that reads a format; for one that none reads, the format itself."""
    if isinstance(packed, Planes):
        return _Planes(packed)
    if isinstance(packed, Signs):
        return _Signs(packed)
    if isinstance(packed, Graded):
        assert packed.codes is not None and packed.scale_codes is not None and packed.scale_grid is not None
        scales = decode(packed.scale_codes, packed.scale_grid)
        return _Codes(packed, packed.codes, scales, packed.runs(), packed.side)
    if isinstance(packed, Integers) and packed.groups == 1 and not packed.zero_points and not packed.column_scaled:
        assert packed.codes is not None and packed.scales is not None
        return _Codes(packed, packed.codes, packed.scales, [(packed.bits, packed.rows)], "input")
    return _Unpacked(packed)


def _check_widths(packed: Planes, widths: Tensor) -> None:
    """What places are read at comes from the file: damage there must not reach beyond the tensors."""
    falling = torch.cat([widths.new_full((packed.batch, 1), packed.directions), widths, widths.new_zeros(packed.batch, 1)], 1)
    if bool((falling.diff(dim=1) > 0).any()) or int(widths.sum()) != packed.sign_rows or packed.planes > MOST_PLANES:
        raise CheckpointError(
            f"planes: got widths that add up to {int(widths.sum())} rows, wanted {packed.sign_rows}, none wider than the one "
            f"before, {packed.directions} directions and {MOST_PLANES} planes at most; the file is damaged, fetch it again"
        )
