"""The protocol of a packed batch of matrices, and the table of formats."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from moebius.errors import CheckpointError, ShapeError
from moebius.formats.numbers import check_fields
from moebius.table import Table

FORMATS = Table(
    "format",
    {
        "codebook": "moebius.formats.codebook:Codebook",
        "dense": "moebius.formats.dense:Dense",
        "graded": "moebius.formats.graded:Graded",
        "grouped_signs": "moebius.formats.grouped_signs:GroupedSigns",
        "integers": "moebius.formats.integers:Integers",
        "planes": "moebius.formats.planes:Planes",
        "signs": "moebius.formats.signs:Signs",
        "spectral": "moebius.formats.spectral:Spectral",
        "trellis": "moebius.formats.trellis:Trellis",
    },
)


@dataclass(frozen=True)
class Packed(ABC):
    """A batch of matrices of one shape in a packed format.

    A subclass is a frozen dataclass whose tensor fields are what is stored and whose other fields (plain JSON values) are
    what :meth:`spec` describes. Tensors keep the batch (the experts; 1 for a shared factor) as their first axis.
    """

    name: ClassVar[str]

    batch: int
    rows: int
    columns: int

    def unpack(self, index: Tensor | None = None) -> Tensor:
        """The matrices as float32.

        Args:
            index: which of the batch, (chosen,) int64; None for all.

        Returns:
            (chosen, rows, columns).
        """
        device = next(iter(self.tensors().values())).device
        out = torch.empty(self.batch if index is None else len(index), self.rows, self.columns, device=device)
        self.unpack_to(out, index)
        return out

    @abstractmethod
    def unpack_to(self, out: Tensor, index: Tensor | None = None) -> None:
        """Write what :meth:`unpack` returns to ``out``, float32 (chosen, rows, columns) and contiguous."""

    @abstractmethod
    def expected(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor, from the plain fields alone."""

    def check_numbers(self) -> None:
        """Refuse plain fields that contradict each other. Formats add what is theirs.

        Raises:
            ShapeError: names the field, what it is and what it should be.
        """
        check_fields(self)

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by name. Fields that are None are not stored."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {k: v for k, v in values.items() if isinstance(v, Tensor)}

    def spec(self) -> dict[str, Any]:
        """The plain fields and the format's name, ready for JSON."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"format": self.name, **{k: v for k, v in values.items() if isinstance(v, (bool, int, float, str))}}

    def stored_bits(self) -> int:
        """Bits of all stored tensors, padding included: eight times the bytes they take in a file."""
        return sum(8 * t.numel() * t.element_size() for t in self.tensors().values())

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def check(self, where: str) -> None:
        """Refuse tensors that are missing, extra, of the wrong shape or dtype, or not finite.

        Raises:
            CheckpointError: naming the tensor, what it is and what it should be.
        """
        try:
            self.check_numbers()
        except ShapeError as error:
            raise ShapeError(f"{where}: {error}") from None
        expected, got = self.expected(), self.tensors()
        for name in expected.keys() - got.keys():
            raise CheckpointError(f"{where}.{name}: missing from the checkpoint")
        for name in got.keys() - expected.keys():
            raise CheckpointError(f"{where}.{name}: not part of format {self.name!r} with {self.spec()}")
        for name, (shape, dtype) in expected.items():
            tensor = got[name]
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise CheckpointError(f"{where}.{name}: got {tuple(tensor.shape)} {tensor.dtype}, wanted {shape} {dtype}")
            if tensor.is_floating_point() and not tensor.is_meta and not tensor.isfinite().all():
                raise CheckpointError(f"{where}.{name}: holds NaN or Inf; the file is damaged, fetch it again")
        if not any(tensor.is_meta for tensor in got.values()):
            self.check_values(where)

    def check_values(self, where: str) -> None:
        """Refuse values that say where others lie and point beside them. Shapes have been checked.

        Raises:
            CheckpointError: names the tensor.
        """
        return


def from_tensors(spec: dict[str, Any], tensors: dict[str, Tensor]) -> Packed:
    """The packed object that :meth:`Packed.spec` and :meth:`Packed.tensors` came from. Tensors may be on the meta device.

    Raises:
        UnknownNameError: a format this version does not know.
        ShapeError: a spec whose fields are not those of its format.
    """
    spec = dict(spec)
    if not isinstance(spec.get("format"), str):
        raise ShapeError(f"got a description without the name of a format: {str(spec)[:60]}")
    kind = FORMATS[spec.pop("format")]
    known = {f.name for f in dataclasses.fields(kind)}
    if unknown := (spec.keys() | tensors.keys()) - known:
        raise ShapeError(
            f"format {kind.name!r}: unknown fields {', '.join(sorted(unknown))}; wanted some of {', '.join(sorted(known))}"
        )
    if missing := {"batch", "rows", "columns"} - spec.keys():
        raise ShapeError(f"format {kind.name!r}: {', '.join(sorted(missing))} missing from its description")
    if clash := [name for name, value in spec.items() if not isinstance(value, (bool, int, float, str))]:
        raise ShapeError(f"format {kind.name!r}: {clash[0]} is {str(spec[clash[0]])[:40]!r}, wanted a number or a word")
    return kind(**spec, **tensors)


def concatenate(parts: Sequence[Packed]) -> Packed:
    """One packed batch of several that differ in their batch alone, in order."""
    first = parts[0]
    tensors = {name: torch.cat([part.tensors()[name] for part in parts]) for name in first.tensors()}
    return first.replace(batch=sum(part.batch for part in parts), **tensors)


def empty_like_spec(spec: dict[str, Any], device: torch.device | str = "meta") -> Packed:
    """A packed object of this spec with uninitialized tensors: the skeleton that a checkpoint is loaded into."""
    blank = from_tensors(spec, {})
    blank.check_numbers()
    tensors = {name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in blank.expected().items()}
    return blank.replace(**tensors)
