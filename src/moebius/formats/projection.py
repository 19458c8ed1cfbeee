"""One projection of a MoE layer as it is stored: expert factors between two optional factors that all experts share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moebius.errors import ShapeError
from moebius.formats.base import DAMAGED, Packed, empty_like_spec, from_tensors

#: A factor whose sides are no longer than this may be larger than the matrices by any factor: it takes no memory to speak of.
_SMALL = 1024
_PARTS = ("factor", "left", "right", "bias")


@dataclass(frozen=True)
class PackedProjection:
    """``W_e = left · factor_e · right``.

    ``right`` meets the hidden state once per token, before the experts; ``left`` is linear, so after ``down`` it is applied
    once per token too, to the weighted sum over the experts.

    Attributes:
        factor: (experts, rows, columns).
        left: shared, batch 1: (1, out, rows), or None.
        right: shared, batch 1: (1, columns, in), or None.
        bias: what each expert adds to its outputs, (experts, 1, out), or None. It comes on top of a bias that the module has.
    """

    factor: Packed
    left: Packed | None = None
    right: Packed | None = None
    bias: Packed | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(experts, out, in) of the matrices this stands for."""
        out = self.factor.rows if self.left is None else self.left.rows
        inputs = self.factor.columns if self.right is None else self.right.columns
        return self.factor.batch, out, inputs

    def unpack(self, index: Tensor | None = None) -> Tensor:
        """The matrices ``W_e`` in float32, (chosen, out, in)."""
        weight = self.factor.unpack(index)
        if self.left is not None:
            weight = self.left.unpack() @ weight
        if self.right is not None:
            weight = weight @ self.right.unpack()
        return weight

    def is_zero(self) -> bool:
        """Whether a budget gave it nothing: all its matrices are zero, and nothing is added to what they put out."""
        return self.bias is None and any(part.is_zero() for part in self.parts().values())

    def parts(self) -> dict[str, Packed]:
        """The parts that are there, by name."""
        return {name: part for name in _PARTS if (part := getattr(self, name)) is not None}

    def tensors(self) -> dict[str, Tensor]:
        """What is stored: ``factor.signs``, ``left.codes`` and so on."""
        return {f"{part}.{name}": t for part, packed in self.parts().items() for name, t in packed.tensors().items()}

    def spec(self) -> dict[str, Any]:
        """The description of each part, ready for JSON."""
        return {part: packed.spec() for part, packed in self.parts().items()}

    def stored_bits(self) -> int:
        """Bits of all stored tensors."""
        return sum(packed.stored_bits() for packed in self.parts().values())

    def shared_bits(self) -> int:
        """Bits of the shared factors alone."""
        return sum(packed.stored_bits() for packed in (self.left, self.right) if packed is not None)

    def check_numbers(self) -> None:
        """Refuse parts that do not fit together, before any of them is multiplied.

        Raises:
            ShapeError: names the part, its shape and what it should be.
        """
        factor, (experts, out, inputs) = self.factor, self.shape
        wanted = {
            "left": (1, out, factor.rows),
            "right": (1, factor.columns, inputs),
            "bias": (experts, 1, out),
        }
        for part, packed in self.parts().items():
            packed.check_numbers()
            got = packed.batch, packed.rows, packed.columns
            if got != wanted.get(part, got):
                raise ShapeError(
                    f"{part}: got {got}, wanted {wanted[part]} beside a factor of {factor.rows} x {factor.columns}"
                )
        most = max(4 * max(out, inputs), _SMALL)
        if out < 1 or inputs < 1 or max(factor.rows, factor.columns) > most:
            shape = f"{factor.rows} x {factor.columns}"
            raise ShapeError(f"factor: got {shape}, wanted sides of at most {most} for matrices of {out} x {inputs}")

    def check(self, where: str, advice: str = DAMAGED) -> None:
        """See :meth:`Packed.check`."""
        try:
            self.check_numbers()
        except ShapeError as error:
            raise ShapeError(f"{where}: {error}; {advice}") from None
        for part, packed in self.parts().items():
            packed.check(f"{where}.{part}", advice)


def projection_from_tensors(spec: dict[str, Any], tensors: dict[str, Tensor]) -> PackedProjection:
    """The projection that :meth:`PackedProjection.spec` and :meth:`PackedProjection.tensors` came from."""
    parts = {}
    for part, part_spec in spec.items():
        mine = {name.removeprefix(f"{part}."): t for name, t in tensors.items() if name.startswith(f"{part}.")}
        parts[part] = from_tensors(part_spec, mine)
    return PackedProjection(**parts)


def empty_projection(spec: dict[str, Any], device: torch.device | str = "meta") -> PackedProjection:
    """A projection of this spec with uninitialized tensors."""
    if unknown := spec.keys() - set(_PARTS):
        raise ShapeError(f"unknown parts {', '.join(sorted(unknown))}; wanted some of {', '.join(_PARTS)}")
    for part, part_spec in spec.items():
        if not isinstance(part_spec, dict):
            raise ShapeError(f"{part}: got {str(part_spec)[:40]!r}, wanted the description of a format")
    # Nothing is laid out before all numbers are known to fit.
    PackedProjection(**{part: from_tensors(part_spec, {}) for part, part_spec in spec.items()}).check_numbers()
    return PackedProjection(**{part: empty_like_spec(part_spec, device) for part, part_spec in spec.items()})


def module_from_tensors(spec: dict[str, Any], tensors: dict[str, Tensor]) -> PackedProjection | Packed:
    """What a description of a packed module and its tensors stand for: a projection of experts, or a single matrix."""
    return projection_from_tensors(spec, tensors) if "factor" in spec else from_tensors(spec, tensors)


def empty_module(spec: dict[str, Any], device: torch.device | str = "meta") -> PackedProjection | Packed:
    """:func:`module_from_tensors` with uninitialized tensors.

    Raises:
        ShapeError: numbers that contradict each other, or a single matrix that is not one, or has no elements.
    """
    if "factor" in spec:
        return empty_projection(spec, device)
    packed = empty_like_spec(spec, device)
    if packed.batch != 1 or not packed.rows or not packed.columns:
        got = f"{packed.batch} of {packed.rows} x {packed.columns}"
        raise ShapeError(f"{packed.name}: got {got}, wanted one matrix with elements")
    return packed
