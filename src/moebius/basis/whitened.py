"""Whitened joint bases: the coordinates in which the errors of all experts of a projection are independent.

At the input side (``gate_up``) all experts share ``T``: with ``C = Σ_e C_e = L Lᵀ`` and ``M = Σ_e Lᵀ W_eᵀ W_e L = N Σ² Nᵀ``,
``T = Nᵀ L⁻¹``. In these coordinates the input is white, so the squared error of a factor is the error of the output, and the
directions come sorted by how much they carry in all experts together. At the output side (``down``) the eigenvectors of
``M = Σ_e W_e C_e W_eᵀ`` do the same. Directions have unit length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.formats.graded import SCALE_BITS, Graded
from moebius.formats.logarithmic import decode, encode
from moebius.linalg.eigen import descending_eigh
from moebius.linalg.products import quadratic_forms, symmetric_product

_DAMPING = 1e-3  # of the mean eigenvalue of C: directions that no input uses cannot be whitened
_METRIC_PULL = 0.1
_CLIPPING = (1.0, 0.93, 0.86, 0.79, 0.72, 0.65, 0.58, 0.5)  # shares of the largest entry that the levels may span


@dataclass(frozen=True)
class WhitenedBasis:
    """A basis before it is rounded.

    Attributes:
        directions: unit vectors, the one that carries most first. float32 (directions, in) or (directions, out)
        energies: what each expert's output would lose without the direction, ``Σ_t`` of squared error. float64 (experts,
            directions)
    """

    directions: Tensor
    energies: Tensor


def input_basis(weight: Tensor, moments: Tensor) -> WhitenedBasis:
    """The basis of projections that share their input.

    Args:
        weight: (experts, out, in) of any float type.
        moments: ``C_e``, (experts, in, in).

    Returns:
        Directions (in, in), so that ``W_e = B_e T``; the energy of direction ``k`` is ``‖B_e[:, k]‖² (T C_e Tᵀ)_kk``.
    """
    inputs = weight.shape[2]
    total = weight.new_zeros(inputs, inputs, dtype=torch.float64)
    gram = torch.zeros_like(total)
    for matrix, moment in zip(weight, moments, strict=True):
        total += moment
        matrix = matrix.float()
        gram += symmetric_product(matrix.mT, matrix)
    root, inverse_root = _roots(total)
    _, vectors = descending_eigh(root.mT @ gram @ root)
    whitening = vectors.mT @ inverse_root
    lengths = whitening.norm(dim=1)
    directions = (whitening / lengths.unsqueeze(1)).float()
    back = ((root @ vectors) * lengths).float()  # the inverse of the directions
    energies = [
        (matrix.float() @ back).square().sum(0) * quadratic_forms(directions, moment.float())
        for matrix, moment in zip(weight, moments, strict=True)
    ]
    return WhitenedBasis(directions, torch.stack(energies).double())


def output_basis(weight: Tensor, moments: Tensor, metric: Tensor | None = None) -> WhitenedBasis:
    """The basis of projections whose outputs are added up.

    Args:
        weight: (experts, out, in) of any float type.
        moments: ``C_e``, (experts, in, in).
        metric: ``G``, how the loss weighs errors of the output, see :func:`loss_metric`; None weighs channels alike. (out, out)

    Returns:
        Directions (out, out) with ``W_e = Uᵀ F_e``, orthogonal under ``G``; the energy of direction ``k`` is
        ``(U G Uᵀ)_kk · F_e[k] C_e F_e[k]ᵀ``.
    """
    outputs = weight.shape[1]
    gram = weight.new_zeros(outputs, outputs, dtype=torch.float64)
    for matrix, moment in zip(weight, moments, strict=True):
        matrix = matrix.float()
        gram += symmetric_product(matrix @ moment.float(), matrix.mT)
    root = inverse_root = torch.eye(outputs, dtype=torch.float64, device=weight.device)
    if metric is not None:
        values, vectors = descending_eigh(metric)
        root, inverse_root = (vectors * values.sqrt()) @ vectors.mT, (vectors / values.sqrt()) @ vectors.mT
    gram = root @ gram @ root
    _, vectors = descending_eigh((gram + gram.mT) / 2)
    analysis, directions = (vectors.mT @ root).float(), (vectors.mT @ inverse_root).float()
    energies = [
        quadratic_forms(analysis @ matrix.float(), moment.float()).clamp_min(0)
        for matrix, moment in zip(weight, moments, strict=True)
    ]
    return WhitenedBasis(directions / directions.norm(dim=1, keepdim=True), torch.stack(energies).double())


def loss_metric(output_fisher: Tensor) -> Tensor:
    """``G = Σ δ δᵀ`` of a projection's output, scaled to a mean diagonal of one and pulled towards the identity.

    The pull keeps directions in which the calibration text happened to have no gradient. (out, out) to float64 (out, out)
    """
    fisher = output_fisher.double()
    mean = fisher.diagonal().mean()
    identity = torch.eye(len(fisher), dtype=torch.float64, device=fisher.device)
    return (fisher / mean + _METRIC_PULL * identity) / (1 + _METRIC_PULL) if mean > 0 else identity


def rounded_basis(directions: Tensor, bits: Sequence[int], side: str) -> Graded:
    """Directions rounded to their bits, each with the scale that errs least.

    Args:
        directions: (kept, length).
        bits: of every direction, not increasing.
        side: ``"input"`` or ``"output"``, see :class:`moebius.formats.graded.Graded`.
    """
    levels = (2.0 ** torch.tensor(bits, device=directions.device, dtype=torch.float32) - 1).unsqueeze(1)  # (kept, 1)
    peaks = directions.abs().amax(1, keepdim=True) if len(directions) else directions.new_zeros(0, 1)
    best, scales = torch.full_like(peaks, torch.inf), peaks
    for share in _CLIPPING:
        scale = peaks * share * 2 / levels
        error = (directions - _centred(directions, scale, levels) * scale).square().sum(1, keepdim=True)
        best, scales = torch.minimum(error, best), torch.where(error < best, scale, scales)
    codes, grid = encode(scales.mT, SCALE_BITS)
    steps = decode(codes, grid).mT
    values = _centred(directions, steps, levels) + levels / 2
    return Graded.pack(values.round().unsqueeze(0), codes, grid, side=side, bits=bits)


def coordinates(directions: Tensor, metric: Tensor | None = None) -> Tensor:
    """``(T G Tᵀ)⁻¹ T G`` of rounded directions (kept, length): what turns vectors into the coordinates that err least under
    the metric ``G`` (length, length), or under the identity. (kept, length)
    """
    rows = directions.double()
    weighted = rows if metric is None else rows @ metric.double()
    gram = weighted @ rows.mT
    gram.diagonal().mul_(1 + 1e-6)
    return torch.cholesky_solve(weighted, torch.linalg.cholesky(gram)).float()


def _centred(directions: Tensor, scale: Tensor, levels: Tensor) -> Tensor:
    """The nearest levels in units of the scale: halves, symmetric around zero."""
    steps = torch.where(scale > 0, directions / scale, 0)
    return (steps + levels / 2).round().clamp_min(0).minimum(levels) - levels / 2


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """``L`` with ``C = L Lᵀ`` and its inverse, for a damped ``C``; identities where there was nothing to see."""
    values, vectors = descending_eigh(moment)
    if not values[0] > 0:
        values = torch.ones_like(values)
    values = values + _DAMPING * values.mean()
    return vectors * values.sqrt(), (vectors / values.sqrt()).mT
