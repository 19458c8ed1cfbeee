"""Small tables that the Triton kernels read, made once for a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from moebius.formats.bits import unpack
from moebius.formats.planes import Planes
from moebius.formats.signs import Signs

_TABLES = WeakIdKeyDictionary()


def remembered(key: Tensor | None, make: Callable[[], Any], other: Tensor | None = None, kind: str = "") -> Any:
    """What ``make`` makes of a stored tensor (and another one), once: until the tensor is gone or either was written to."""
    stamp = _version(key), _version(other), kind
    known = _TABLES.get(key)
    if known is None or known[0] != stamp:
        known = _TABLES[key] = (stamp, make())
    return known[1]


def forget(keys: Iterable[Tensor]) -> None:
    """Make what is remembered of these tensors anew: they may have been written to without a trace."""
    for key in keys:
        _TABLES.pop(key, None)


def _version(tensor: Tensor | None) -> tuple[int, int]:
    if tensor is None:
        return 0, 0
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


@dataclass(frozen=True)
class Directory:
    """Where the planes of an expert are.

    Attributes:
        widths: int32 (experts, planes); a column of zeros where the format has no plane at all.
        rows, codes, grids: first sign row, first code of a direction, and grid of each expert, int32 (experts,).
    """

    widths: Tensor
    rows: Tensor
    codes: Tensor
    grids: Tensor

    @property
    def planes(self) -> int:
        """At least one."""
        return self.widths.shape[1]


def directory_of(planes: Planes) -> Directory:
    def make() -> Directory:
        assert planes.widths is not None
        widths = planes.widths.int()
        widths = widths if planes.planes else torch.zeros_like(widths.new_empty(len(widths), 1))
        rows, codes = widths.sum(1), widths[:, 0]
        rows, codes, grids = ((counts.cumsum(0) - counts).int() for counts in (rows, codes, (codes > 0).int()))
        return Directory(widths.contiguous(), rows, codes, grids)

    return remembered(planes.widths, make)


def picked_columns(signs: Signs) -> Tensor | None:
    """The salient columns of each matrix in order, int32 (experts, salient); None if there are none."""
    if not signs.salient:
        return None

    def make() -> Tensor:
        assert signs.salient_mask is not None
        mask = unpack(signs.salient_mask, 1, signs.columns)
        return mask.argsort(dim=1, descending=True, stable=True)[:, : signs.salient].int().contiguous()

    return remembered(signs.salient_mask, make)


def words_of(entries: int) -> int:
    """Words of 16 signs that hold a row."""
    return triton.cdiv(entries, 16)


def as_words(signs: Tensor) -> tuple[Tensor, bool]:
    """Sign rows as words if they are whole words, and whether they are."""
    wide = signs.shape[-1] % 2 == 0 and signs.storage_offset() % 2 == 0 and signs.data_ptr() % 2 == 0
    return (signs.view(torch.int16) if wide and signs.numel() else signs), wide
