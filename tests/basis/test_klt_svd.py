"""KLT coordinates are white, and the shared part is the best of its rank for the outputs."""

from __future__ import annotations

import pytest
import torch

from moebius.basis.klt_svd import klt_basis, shared_directions

G = torch.Generator().manual_seed(0)
X = torch.randn(500, 12, generator=G) @ torch.randn(12, 12, generator=G)
WEIGHT = torch.randn(4, 9, 12, generator=G)


def test_coordinates_have_identity_covariance() -> None:
    basis, inverse = klt_basis(X.T @ X / len(X))
    coordinates = X.double() @ inverse.T
    assert torch.allclose(coordinates.T @ coordinates / len(X), torch.eye(12).double(), atol=1e-4)
    assert torch.allclose(basis @ inverse, torch.eye(12).double(), atol=1e-9)


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("klt", [True, False])
def test_full_rank_reproduces_the_weights(klt: bool, dead: bool) -> None:
    x = X.clone()
    x[:, :3] *= 0 if dead else 1
    shared = shared_directions(WEIGHT, x.T @ x if klt else None, 12)
    error = x @ (shared.matrix() - WEIGHT).mT
    assert error.norm() < 2e-3 * (x @ WEIGHT.mT).norm()
    if not dead:
        assert (shared.matrix() - WEIGHT).norm() < 5e-3 * WEIGHT.norm()


def test_output_error_is_the_tail_of_the_spectrum() -> None:
    """Eq. 16, and no other subspace of this rank does better: not that of the weights alone."""
    moment = X.T @ X
    basis, _ = klt_basis(moment)
    stacked = (WEIGHT.double() @ basis).flatten(0, 1)
    tail = torch.linalg.svdvals(stacked)[3:].square().sum()
    error = {
        klt: (X @ (shared_directions(WEIGHT, moment if klt else None, 3).matrix() - WEIGHT).mT).square().sum().item()
        for klt in (True, False)
    }
    assert error[True] == pytest.approx(tail.item(), rel=1e-3)
    assert error[True] < error[False]
