from __future__ import annotations

import pytest
import torch

from moebius.basis.joint_svd import JointBasis, joint_basis, joint_rank, shared_factor_skeleton

SIDES = ("output", "input")


def experts(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rebuilt(basis: JointBasis, weight: torch.Tensor) -> torch.Tensor:
    """From what is stored, with the spread where it belongs: in the rows of the factors."""
    factors = basis.factors(weight)
    stored = basis.packed.unpack()
    if basis.side == "output":
        return stored @ (basis.spread.unsqueeze(1) * factors)
    return factors @ stored


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("shape", [(4, 6, 10), (4, 10, 6), (1, 5, 5), (3, 16, 16)])
def test_full_rank_reproduces_the_weights(side: str, bits: int, shape: tuple[int, int, int]) -> None:
    weight = experts(*shape)
    basis = joint_basis(weight, side=side, bits=bits)
    if joint_rank(shape, side) == shape[1 if side == "output" else 2]:
        assert torch.allclose(rebuilt(basis, weight), weight, atol=1e-4)
    else:  # fewer directions than channels: rounding tilts the subspace, a little
        error = (rebuilt(basis, weight) - weight).norm() / weight.norm()
        assert error < {16: 1e-3, 8: 2e-2, 4: 0.3}[bits]


@pytest.mark.parametrize("side", SIDES)
def test_the_basis_is_the_svd_of_the_concatenation(side: str) -> None:
    weight = experts(3, 5, 4)
    stacked = torch.cat(list(weight), dim=1) if side == "output" else torch.cat(list(weight), dim=0).mT
    left, values, _ = torch.linalg.svd(stacked, full_matrices=False)
    shared = joint_basis(weight, side=side, bits=16).shared
    shared = shared if side == "output" else shared.mT
    for direction in range(4):
        want = left[:, direction] * values[direction]
        got = shared[:, direction]
        assert min((got - want).norm(), (got + want).norm()) < 5e-3 * values[0]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_directions_that_no_expert_uses_do_not_blow_up(side: str, bits: int) -> None:
    weight = experts(3, 8, 2) @ experts(2, 8)  # rank 2 on the input side
    weight[:, 6:] = 0  # and two outputs that are never written
    basis = joint_basis(weight, side=side, bits=bits)
    factors = basis.factors(weight)
    assert torch.isfinite(factors).all()
    assert basis.shared.any(0 if side == "output" else 1).sum() == {"output": 6, "input": 2}[side]
    assert (rebuilt(basis, weight) - weight).norm() < {16: 1e-3, 8: 2e-2, 4: 0.3}[bits] * weight.norm()
    zeros = joint_basis(torch.zeros(2, 4, 4), side=side, bits=bits)
    assert not zeros.factors(torch.zeros(2, 4, 4)).any()
    assert not zeros.shared.any()


@pytest.mark.parametrize("bits", [8, 4])
def test_weak_directions_do_not_drown_in_strong_ones(bits: int) -> None:
    rotation, _ = torch.linalg.qr(experts(8, 8).double())
    weight = (rotation * torch.logspace(0, -5, 8)).float() @ experts(4, 8, 8)
    basis = joint_basis(weight, side="output", bits=bits)
    unit = basis.shared / basis.shared.norm(dim=0)
    want = torch.linalg.svd(torch.cat(list(weight.double()), dim=1))[0].float()
    assert ((unit * want).sum(0).abs() > {8: 0.999, 4: 0.97}[bits]).all()


def test_rank_keeps_the_strongest_directions() -> None:
    weight = experts(4, 6, 5)
    errors = []
    for rank in (1, 3, 6):
        basis = joint_basis(weight, side="output", rank=rank, bits=16)
        assert basis.factors(weight).shape == (4, rank, 5)
        errors.append((rebuilt(basis, weight) - weight).norm().item())
    best = torch.linalg.svdvals(torch.cat(list(weight), dim=1))[3:].norm().item()
    assert errors[1] == pytest.approx(best, rel=1e-3)
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_the_skeleton_has_the_shape_of_the_real_one(side: str, bits: int) -> None:
    for shape, rank in [((4, 6, 10), 0), ((2, 30, 5), 0), ((4, 6, 10), 3), ((4, 6, 10), 99)]:
        skeleton = shared_factor_skeleton(shape, side=side, rank=rank, bits=bits)
        assert skeleton.expected() == joint_basis(experts(*shape), side=side, rank=rank, bits=bits).packed.expected()
