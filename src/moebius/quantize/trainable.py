"""Nested sign planes behind a shared basis, open to training.

What is trained are the logarithms of the scales, the entries of the basis and, where it is asked for, the values that the signs
are of. All are used as they will be stored, rounded to their codes, and gradients pass straight through the rounding (Bengio et
al., 2013): what a loss has seen is what is written.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moebius.formats.graded import Graded
from moebius.formats.logarithmic import decode, encode
from moebius.formats.planes import Planes, pack_signs
from moebius.formats.projection import PackedProjection
from moebius.formats.trellis import SCALE_BITS, Trellis
from moebius.quantize.planes import nested_levels, plane_amplitudes

_SMALLEST = 1e-30  # scales are positive; this stands in for zero
_NEAREST = 0.95  # share of the way from a level to where another begins: no value starts beyond it


class TrainableProjection(nn.Module):
    """``W_e = B_e T`` or ``W_e = U F_e`` of packed :class:`Planes` and :class:`Graded`.

    Args:
        projection: what to begin with.
        wanted: the matrices that it stands for, where its signs are to be trained too: what is trained is then what the signs
            are of, which begins there, as near to the level that is stored as it takes to be on its side. (experts, out, in)

    Attributes:
        values: what levels are the nearest to, of the expert factors in units of their scales; None where levels are constant.
            (experts, directions, entries)
        log_directions: logarithms of the scales of directions, (experts, directions).
        log_entries: logarithms of the scales of entries, (experts, entries).
        directions: of the basis, before rounding. (directions, length)
    """

    def __init__(self, projection: PackedProjection, wanted: Tensor | None = None) -> None:
        super().__init__()
        factor, basis = projection.factor, projection.left or projection.right
        assert isinstance(factor, Planes) and isinstance(basis, Graded)
        assert basis.scale_codes is not None and basis.scale_grid is not None
        self._factor, self._basis = factor, basis
        self._live = factor.counts() > 0
        self._steps = decode(basis.scale_codes, basis.scale_grid)[0].unsqueeze(1)  # (directions, 1)
        highest = [2.0**grade - 1 for grade, count in basis.runs() for _ in range(count)]
        self._highest = torch.tensor(highest, device=self._steps.device).unsqueeze(1)  # code of a direction
        levels = factor.levels()
        self._amplitudes = plane_amplitudes(factor.counts()).unsqueeze(2)  # (experts, directions, 1, planes)
        self._levels = levels.mT.contiguous() if factor.side == "input" else levels
        self.values = None if wanted is None else nn.Parameter(self._beginning(levels, wanted.float()))
        self.log_directions = nn.Parameter(factor.direction_scales().clamp_min(_SMALLEST).log())
        self.log_entries = nn.Parameter(factor.entry_scales().log())
        values = basis.unpack()[0]
        self.directions = nn.Parameter(values if factor.side == "input" else values.mT.contiguous())

    @property
    def before_factor(self) -> bool:
        """Whether the basis meets the input, before the factor, or what the factor puts out."""
        return self._factor.side == "input"

    @property
    def levels(self) -> Tensor:
        """Of the expert factors, (experts, out, in). float32"""
        if self.values is None:
            return self._levels
        levels = _through(self.values, nested_levels(self.values.detach(), self._amplitudes))
        return levels.mT if self.before_factor else levels

    def scales(self) -> tuple[Tensor, Tensor]:
        """Of directions (experts, directions), zero where there is no plane, and of entries (experts, entries)."""
        bits = self._factor.scale_bits
        directions = _through(self.log_directions, decode(*encode(self.log_directions.exp(), bits, self._live)).log())
        entries = _through(self.log_entries, decode(*encode(self.log_entries.exp(), bits)).log())
        return directions.exp() * self._live, entries.exp()

    def basis(self) -> Tensor:
        """The directions, (directions, length)."""
        return _through(self.directions, (self._codes() - self._highest / 2) * self._steps)

    def packed(self) -> PackedProjection:
        """What is stored for it: as many bytes as before."""
        factor, basis = self._factor, self._basis
        assert factor.signs is not None and factor.widths is not None
        assert basis.scale_codes is not None and basis.scale_grid is not None
        with torch.no_grad():
            packed = Planes.pack(
                factor.signs if self.values is None else self._signs(self.values),
                factor.widths,
                *encode(self.log_entries.exp(), factor.scale_bits),
                *encode(self.log_directions.exp(), factor.scale_bits, self._live),
                side=factor.side,
                directions=factor.directions,
                entries=factor.entries,
                scale_bits=factor.scale_bits,
            )
            bits = [grade for grade, count in basis.runs() for _ in range(count)]
            codes = self._codes().to(torch.int64).unsqueeze(0)
            rounded = Graded.pack(codes, basis.scale_codes, basis.scale_grid, side=basis.side, bits=bits)
        return PackedProjection(packed, **{"right" if self.before_factor else "left": rounded})

    def _beginning(self, levels: Tensor, wanted: Tensor) -> Tensor:
        """What the stored levels are of, as far as the matrices say: never on the other side of the middle to a next level."""
        factor = self._factor
        basis = self._basis.unpack()[0].double()
        inverse = torch.linalg.pinv(basis).float()
        target = (wanted @ inverse).mT if factor.side == "input" else inverse @ wanted  # (experts, directions, entries)
        scales = factor.direction_scales().unsqueeze(2) * factor.entry_scales().unsqueeze(1)
        target = torch.where(scales > 0, target / scales.clamp_min(_SMALLEST), 0)
        # A level ends where the sign of one of its planes would change: as far away as the plane exceeds those after it.
        below = self._amplitudes.flip(3).cumsum(3).flip(3) - self._amplitudes
        reach = torch.where(self._amplitudes > 0, self._amplitudes - below, torch.inf).amin(3)
        live = reach.isfinite()
        reach = torch.where(live, _NEAREST * reach, 0)
        return torch.where(live, target.clamp(levels - reach, levels + reach), 0)

    def _signs(self, values: Tensor) -> Tensor:
        """Packed rows of signs of the levels nearest to values, as :class:`Planes` keeps them."""
        widths = self._factor.widths
        assert widths is not None
        rest, planes = values.clone(), []
        for plane in range(self._amplitudes.shape[3]):
            signed = torch.copysign(self._amplitudes[..., plane], rest)
            planes.append(~signed.signbit())
            rest -= signed
        positive = torch.stack(planes, 1)
        return torch.cat([pack_signs(positive[e : e + 1], widths[e : e + 1].long()) for e in range(len(positive))])

    def _codes(self) -> Tensor:
        codes = (self.directions.detach() / self._steps + self._highest / 2).round()
        return torch.minimum(codes.clamp_min(0), self._highest)


class TrainableCodes(nn.Module):
    """Packed :class:`Trellis` codes without a basis, with the logarithms of their scales open to training.

    Attributes:
        levels: constant, (experts, out, in). float32
        log_directions: logarithms of the scales of columns, (experts, in).
        log_entries: logarithms of the scales of rows, (experts, out).
    """

    levels: Tensor
    before_factor = True

    def __init__(self, projection: PackedProjection) -> None:
        super().__init__()
        factor = projection.factor
        assert isinstance(factor, Trellis) and projection.left is None and projection.right is None
        self._factor, self._live = factor, factor.each_rate() > 0
        self.levels = factor.levels().contiguous()
        self.log_directions = nn.Parameter(factor.column_scales().log())
        self.log_entries = nn.Parameter(factor.row_scales().log())

    def scales(self) -> tuple[Tensor, Tensor]:
        """Of columns (experts, in), zero where there is no code, and of rows (experts, out)."""
        rows, columns = self._encoded()
        directions = _through(self.log_directions, decode(*columns).log())
        return directions.exp() * self._live, _through(self.log_entries, decode(*rows).log()).exp()

    def basis(self) -> None:
        """There is none."""

    def packed(self) -> PackedProjection:
        """What is stored for it: as many bytes as before."""
        rows, columns = self._encoded()
        grids = torch.cat([rows[1], columns[1]], 1)
        return PackedProjection(self._factor.replace(row_codes=rows[0], column_codes=columns[0], grids=grids))

    @torch.no_grad()
    def _encoded(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        return encode(self.log_entries.exp(), SCALE_BITS), encode(self.log_directions.exp(), SCALE_BITS, self._live)


def trainable(projection: PackedProjection, wanted: Tensor | None = None) -> TrainableProjection | TrainableCodes:
    """What may be trained of a projection of the method ``moebius``; with the matrices it stands for, signs too."""
    return TrainableCodes(projection) if isinstance(projection.factor, Trellis) else TrainableProjection(projection, wanted)


def _through(value: Tensor, rounded: Tensor) -> Tensor:
    """``rounded``, with the gradient of ``value``."""
    return value + (rounded - value).detach()
