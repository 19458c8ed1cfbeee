"""The protocol of a packed batch of matrices, and the table of formats."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from moebius.errors import CheckpointError, ShapeError
from moebius.formats.numbers import check_fields, plain_fields, stored_fields
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


#: What to do about tensors that are not what was written.
DAMAGED = "the file is damaged, fetch it again"


@dataclass(frozen=True)
class Packed(ABC):
    """A batch of matrices of one shape in a packed format.

    A subclass is a frozen dataclass whose tensor fields are what is stored and whose other fields (plain JSON values) are
    what :meth:`spec` describes. Tensors keep the batch (the experts; 1 for a shared factor) as their first axis.
    """

    name: ClassVar[str]
    #: Fields that came after checkpoints had been written: at their default they are not part of the description.
    later: ClassVar[frozenset[str]] = frozenset()

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

    def unpack_to(self, out: Tensor, index: Tensor | None = None) -> None:
        """Write what :meth:`unpack` returns to ``out``, float32 (chosen, rows, columns) and contiguous."""
        if out.numel():  # a budget may leave a factor without rows or columns
            self._unpack_to(out, index)

    @abstractmethod
    def _unpack_to(self, out: Tensor, index: Tensor | None) -> None:
        """:meth:`unpack_to` where there is something to write."""

    def is_zero(self) -> bool:
        """Whether nothing is stored that its matrices could differ from zero by."""
        return self.rows * self.columns == 0

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
        values = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in self.later or getattr(self, f.name) != f.default
        }
        return {"format": self.name, **{k: v for k, v in values.items() if isinstance(v, (bool, int, float, str))}}

    def stored_bits(self) -> int:
        """Bits of all stored tensors, padding included: eight times the bytes they take in a file."""
        return sum(8 * t.numel() * t.element_size() for t in self.tensors().values())

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def check(self, where: str, advice: str = DAMAGED) -> None:
        """Refuse numbers that contradict each other, and tensors that are not what the numbers say.

        Args:
            where: path of the module, for the message.
            advice: what to do about it, for the message.

        Raises:
            ShapeError: see :meth:`check_numbers`.
            CheckpointError: naming the tensor, what it is and what it should be.
        """
        try:
            self.check_numbers()
        except ShapeError as error:
            raise ShapeError(f"{where}: {error}; {advice}") from None
        for fault in self.faults():
            raise CheckpointError(f"{where}.{fault}; {advice}")

    def faults(self) -> Iterator[str]:
        """What is wrong with the tensors, each in words that begin with its name; of those on the meta device, their shapes."""
        yield from (faults := list(self._tensor_faults()))
        if not faults and not any(tensor.is_meta for tensor in self.tensors().values()):
            yield from self.value_faults()

    def _tensor_faults(self) -> Iterator[str]:
        expected, got = self.expected(), self.tensors()
        for name in sorted(expected.keys() - got.keys()):
            yield f"{name}: missing from the checkpoint"
        for name in sorted(got.keys() - expected.keys()):
            yield f"{name}: not part of format {self.name!r} with {self.spec()}"
        for name in sorted(expected.keys() & got.keys()):
            (shape, dtype), tensor = expected[name], got[name]
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                yield f"{name}: got {tuple(tensor.shape)} {tensor.dtype}, wanted {shape} {dtype}"
            elif tensor.is_floating_point() and not tensor.is_meta and not tensor.isfinite().all():
                yield f"{name}: holds NaN or Inf"

    def value_faults(self) -> Iterator[str]:
        """As :meth:`faults`, of values that say where others lie and point beside them, or that overflow. Formats add theirs.

        Only asked where all tensors are there, finite and of the right shapes.
        """
        yield from ()


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
    for got, known in ((spec.keys(), plain_fields(kind).keys()), (tensors.keys(), stored_fields(kind))):
        if unknown := got - known:
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
