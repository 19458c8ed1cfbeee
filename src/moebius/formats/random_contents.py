"""Packed matrices with random contents, for measurements of speed and memory: never dense, and valid in every field."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from moebius.errors import ShapeError
from moebius.formats.base import Packed
from moebius.formats.bits import pack
from moebius.formats.projection import PackedProjection
from moebius.formats.spectral import Spectral

_SCALE = 0.05
_GRID = (math.log(_SCALE), 0.02)  # first logarithm and step, see :mod:`moebius.formats.logarithmic`
_GRID_OF_INTEGERS = (math.log(_SCALE / 128), 0.0025)  # of up to 8 bits, and so are the codes of their scales


def random_projection(blank: PackedProjection, generator: Generator) -> PackedProjection:
    """Random contents for every part, see :func:`random_contents`."""
    return PackedProjection(**{name: random_contents(part, generator) for name, part in blank.parts().items()})


def random_contents(blank: Packed, generator: Generator) -> Packed:
    """Random bits where a skeleton has tensors on the meta device, scales of a few hundredths; what is not on it stays.

    Args:
        blank: what a method's plan returns.
        generator: on the CPU, as the contents will be.

    Raises:
        ShapeError: sign planes whose widths are on the meta device: nothing else says where planes are.
    """
    if isinstance(blank, Spectral):
        return _spectral(blank, generator)
    return blank.replace(**{n: _contents(blank, n, t, generator) for n, t in blank.tensors().items() if t.is_meta})


def _contents(blank: Packed, name: str, tensor: Tensor, generator: Generator) -> Tensor:
    if name == "widths":
        raise ShapeError(f"random contents of {blank.name}: got widths without values, wanted those of a plan")
    if name == "salient_mask":
        ranks = torch.rand(blank.batch, blank.columns, generator=generator).argsort(1)
        return pack(ranks < blank.spec()["salient"], 1)
    if tensor.dtype == torch.uint8:
        return torch.empty(tensor.shape, dtype=torch.uint8).random_(0, 256, generator=generator)
    if name.endswith(("grid", "grids")):
        grid = _GRID_OF_INTEGERS if name == "scale_grid" else _GRID
        return torch.tensor(grid, dtype=tensor.dtype).repeat(*tensor.shape[:-1], tensor.shape[-1] // 2)
    if "scale" in name:  # of a level, where there are many of them
        return torch.full(tensor.shape, 2 * _SCALE / 2 ** blank.spec().get("bits", 1), dtype=tensor.dtype)
    return torch.randn(tensor.shape, generator=generator).mul_(_SCALE).to(tensor.dtype)


def _spectral(blank: Spectral, generator: Generator) -> Spectral:
    """All directions at the widest width that the payload has room for, and as many as fit one bit wider."""
    units = blank.batch * blank.directions
    fitting = [bits for bits in range(9) if units * blank.record_bytes(bits) <= blank.payload_bytes]
    bits = fitting[-1]
    widths = torch.full((units,), bits)
    if bits < 8:
        more = blank.record_bytes(bits + 1) - blank.record_bytes(bits)
        widths[: (blank.payload_bytes - units * blank.record_bytes(bits)) // more] += 1
    widths = widths[torch.randperm(units, generator=generator)].view(blank.batch, -1)
    payload = torch.empty(blank.payload_bytes, dtype=torch.uint8).random_(0, 256, generator=generator)
    scale = torch.tensor([_SCALE]).half().view(torch.uint8)
    for grade, places, start in blank.sections(widths):
        records = payload[start : start + len(places) * blank.record_bytes(grade)].view(len(places), -1)
        records[:, : 2 * blank.groups] = scale.repeat(blank.groups)
    row_scales = None if blank.row_scales is None else torch.ones(blank.batch, blank.rows).half()
    return blank.replace(widths=pack(widths, 4), payload=payload, row_scales=row_scales)
