"""Matrices kept as they are, in 16 or 32 bit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.formats.base import Packed


@dataclass(frozen=True)
class Dense(Packed):
    """``values``: (batch, rows, columns) of dtype ``dtype`` (``"float16"``, ``"bfloat16"`` or ``"float32"``)."""

    name = "dense"

    dtype: str = "float16"
    values: Tensor | None = None

    @classmethod
    def pack(cls, matrices: Tensor, dtype: torch.dtype = torch.float16) -> Dense:
        """Round (batch, rows, columns) to ``dtype``."""
        batch, rows, columns = matrices.shape
        return cls(batch, rows, columns, str(dtype).removeprefix("torch."), matrices.to(dtype).contiguous())

    def _unpack_to(self, out: Tensor, index: Tensor | None) -> None:
        assert self.values is not None
        out.copy_(self.values if index is None else self.values[index])

    def expected(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"values": ((self.batch, self.rows, self.columns), getattr(torch, self.dtype))}
