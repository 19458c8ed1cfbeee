"""Cross-expert joint decomposition (CEJD, MoBiE Eq. 4): one high-precision factor for all experts of a projection.

The singular vectors of the concatenated expert matrices are the eigenvectors of the sum of their Gram matrices, so the
concatenation itself is never formed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.formats.base import Packed, empty_like_spec
from moebius.formats.dense import Dense
from moebius.formats.integers import Integers
from moebius.linalg.eigen import descending_eigh
from moebius.linalg.products import symmetric_product


@dataclass(frozen=True)
class JointBasis:
    """The shared factor of a joint SVD, already rounded to what is stored.

    Attributes:
        side: ``"output"``, so that ``W_e = shared · F_e``, or ``"input"``, so that ``W_e = F_e · shared``.
        shared: float32 (out, rank) or (rank, in), in the coordinates in which the factors of all experts together have unit
            energy along each direction: ``U Λ^½``, rounded.
        packed: what is stored; ``shared`` with each of its directions divided by ``spread``.
        spread: (rank,). At the output side it belongs into the row scales of the expert factors, where it costs no byte; at
            the input side the packed rows have scales of their own and it is one.
    """

    side: str
    shared: Tensor
    packed: Packed
    spread: Tensor

    def factors(self, weight: Tensor) -> Tensor:
        """The expert factors that fit the weights best after the shared factor was rounded.

        Args:
            weight: (experts, out, in) float32.

        Returns:
            (experts, rank, in) at the output side, (experts, out, rank) at the input side.
        """
        if self.side == "output":
            return _pseudo_inverse(self.shared) @ weight
        return weight @ _pseudo_inverse(self.shared.mT).mT


def joint_basis(weight: Tensor, *, side: str, rank: int = 0, bits: int = 8) -> JointBasis:
    """Decompose the experts of one projection jointly.

    Args:
        weight: (experts, out, in).
        side: ``"output"`` concatenates the experts along their inputs, as the paper does; ``"input"`` along their outputs.
        rank: directions to keep; 0 keeps all of them. Never more than the matrices have.
        bits: bits of the shared factor: 16 keeps fp16, fewer round each direction symmetrically.
    """
    experts, out, inputs = weight.shape
    rank = joint_rank((experts, out, inputs), side, rank)
    values, vectors = descending_eigh(_gram(weight, side))
    values, vectors = values[:rank], vectors[:, :rank]
    # Directions that no expert uses are dropped to exact zeros: what is left of them is rounding noise of the Gram matrix.
    values = torch.where(values > 1e-12 * values[:1], values, 0)
    directions = (vectors * values.sqrt()).float()  # (channels, rank)
    if side == "input":
        packed = _round(directions.mT.contiguous(), bits)
        spread = torch.ones(rank, device=weight.device)
        return JointBasis(side, packed.unpack()[0], packed, spread)
    # Integers have a scale per row of the matrix. Dividing each column by its peak first, which the expert factors undo,
    # gives every direction its full range as well: a weak direction would otherwise drown in the rounding of a strong one.
    spread = directions.abs().amax(0)
    packed = _round(directions / spread.clamp_min(torch.finfo(torch.float32).tiny), bits)
    return JointBasis(side, packed.unpack()[0] * spread, packed, spread)


def joint_rank(shape: tuple[int, int, int], side: str, rank: int = 0) -> int:
    """Directions of the joint SVD of (experts, out, in) matrices: ``min(out, experts · in)`` at the output side."""
    experts, out, inputs = shape
    full = min(out, experts * inputs) if side == "output" else min(inputs, experts * out)
    return min(rank, full) if rank else full


def shared_factor_skeleton(shape: tuple[int, int, int], *, side: str, rank: int = 0, bits: int = 8) -> Packed:
    """The packed shared factor of :func:`joint_basis` with tensors on the meta device, for matrices of this shape."""
    _, out, inputs = shape
    kept = joint_rank(shape, side, rank)
    rows, columns = (out, kept) if side == "output" else (kept, inputs)
    if bits == 16:
        return empty_like_spec(Dense(1, rows, columns).spec())
    return empty_like_spec(Integers(1, rows, columns, bits, columns, False).spec())


def _gram(weight: Tensor, side: str) -> Tensor:
    """``Σ_e W_e W_eᵀ`` or ``Σ_e W_eᵀ W_e`` in float64, one expert at a time so that no float64 copy of all is needed."""
    channels = weight.shape[1] if side == "output" else weight.shape[2]
    gram = torch.zeros(channels, channels, dtype=torch.float64, device=weight.device)
    for matrix in weight:
        columns = matrix.double() if side == "output" else matrix.double().mT
        gram += symmetric_product(columns, columns.mT)
    return gram


def _round(matrix: Tensor, bits: int) -> Packed:
    """A matrix in fp16, or as symmetric integers with one scale per row."""
    if bits == 16:
        return Dense.pack(matrix.unsqueeze(0))
    levels = 2**bits - 1
    scales = (matrix.abs().amax(1, keepdim=True) * (2 / levels)).half().float()  # as stored: codes must fit these scales
    steps = torch.where(scales > 0, matrix / scales, 0)
    codes = (steps + levels / 2).round().clamp(0, levels)
    return Integers.pack(codes.unsqueeze(0), scales.unsqueeze(0), None, bits=bits, group_size=matrix.shape[1])


def _pseudo_inverse(shared: Tensor) -> Tensor:
    """Left inverse of (channels, rank), float32 (rank, channels); zero for directions that are zero.

    The columns of a rounded eigenbasis are nearly orthogonal, so that once they have unit length their Gram matrix is close
    to the identity and its Cholesky factor is safe, however small some directions are.
    """
    columns = shared.double()
    lengths = columns.norm(dim=0)
    columns = torch.where(lengths > 0, columns / lengths, 0)
    gram = columns.mT @ columns
    gram.diagonal().copy_(gram.diagonal().clamp_min(1) + 1e-9)  # a direction of zeros gets a one, and a zero inverse
    inverse = torch.cholesky_solve(columns.mT, torch.linalg.cholesky(gram))
    return torch.where(lengths > 0, 1 / lengths, 0).unsqueeze(1).mul(inverse).float()
