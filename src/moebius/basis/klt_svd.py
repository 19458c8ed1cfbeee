"""KLT-guided SVD (IDRE, KBVQ-MoE Sec. 4.1): the few input directions that inputs use and experts share stay in 16 bit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.linalg.eigen import descending_eigh

_FLOOR = 1e-8  # inputs of less than this share of the largest energy are dead: their coordinates cannot be undone


@dataclass(frozen=True)
class SharedDirections:
    """``W_share,e = loadings_e · directions``, both rounded to fp16.

    Attributes:
        loadings: ``W_e U_X V_k``. float32 (experts, out, k)
        directions: ``V_kᵀ U_X⁻¹``. float32 (k, in)
    """

    loadings: Tensor
    directions: Tensor

    def matrix(self) -> Tensor:
        """The shared part of every expert. (experts, out, in)"""
        return self.loadings @ self.directions


def klt_basis(moment: Tensor, floor: float = _FLOOR) -> tuple[Tensor, Tensor]:
    """The input coherence basis ``U_X = Q Λ^½`` of ``C = Q Λ Qᵀ`` and its inverse, float64 (in, in) each.

    Inputs have identity covariance in the coordinates ``U_X⁻¹ x``, so that there the squared error of a matrix is the error
    of its outputs (Eq. 10). ``Λ`` is floored: where inputs hardly point the basis is no longer theirs, but can be inverted.

    Args:
        moment: second moment of the inputs. (in, in)
        floor: the least eigenvalue, as a share of the largest.
    """
    values, vectors = descending_eigh(moment)
    peak = values[0] if values[0] > 0 else values.new_ones(())
    root = values.clamp_min(floor * peak).sqrt()
    return vectors * root, vectors.mT / root.unsqueeze(1)


def shared_directions(weight: Tensor, moment: Tensor | None, rank: int) -> SharedDirections:
    """The top directions of the experts stacked along their outputs, seen in the coordinates of the inputs (Eq. 3 to 5).

    The SVD is that of the Gram matrix ``Σ_e U_Xᵀ W_eᵀ W_e U_X``: the stack itself is never formed.

    Args:
        weight: (experts, out, in) float32.
        moment: second moment of the inputs over the layer (in, in); None for a plain SVD without KLT.
        rank: directions to keep.
    """
    inputs = weight.shape[2]
    gram = torch.zeros(inputs, inputs, dtype=torch.float64, device=weight.device)
    for matrix in weight:
        gram.addmm_(matrix.double().mT, matrix.double())
    identity = torch.eye(inputs, dtype=torch.float64, device=weight.device)
    basis, inverse = (identity, identity) if moment is None else klt_basis(moment)
    _, vectors = descending_eigh(basis.mT @ gram @ basis)
    leading = vectors[:, :rank]
    directions, projector = leading.mT @ inverse, basis @ leading
    # The scale of the coordinates is arbitrary between the two factors; unit directions keep both inside fp16.
    lengths = directions.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
    directions = (directions / lengths.unsqueeze(1)).half().float()
    loadings = weight @ (projector * lengths).float()
    return SharedDirections(loadings.half().float(), directions)
