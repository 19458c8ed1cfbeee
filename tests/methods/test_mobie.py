"""What MoBiE's joint decomposition and its null space are for, where it can be known what they must do."""

from __future__ import annotations

import pytest
import torch
from scipy.linalg import hadamard
from torch import Tensor

from moebius.correct.null_space import null_space_scales
from moebius.formats import PackedProjection
from moebius.formats.signs import Signs
from moebius.linalg.eigen import used_directions
from moebius.linalg.hessian import layer_mean
from moebius.methods import METHODS, mobie
from moebius.recipe import Recipe
from moebius.types import ProjectionStats

BARE = {"glas": False, "nges": False, "salient_fraction": 0.0}
EXPERTS, TOKENS = 4, 256


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def laplace(*shape: int, seed: int) -> Tensor:
    uniform = torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) - 0.5
    return -uniform.sign() * (1 - 2 * uniform.abs()).clamp_min(1e-6).log()


def seen(x: Tensor) -> ProjectionStats:
    return ProjectionStats(torch.full((len(x),), x.shape[1]), x.mean(1), x.mT @ x)


def packed(weight: Tensor, x: Tensor, **options: object) -> PackedProjection:
    return METHODS["mobie"].quantize(weight, seen(x), Recipe.make("mobie", **{**BARE, **options}), "gate_up")


def error(weight: Tensor, x: Tensor, **options: object) -> float:
    return float(((packed(weight, x, **options).unpack() - weight) @ x.mT).norm() / (weight @ x.mT).norm())


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("bits", [16, 8])
def test_cejd_at_full_rank_is_the_svd_of_eq_4_and_not_any_basis_that_reproduces_the_weights(side: str, bits: int) -> None:
    """``[W_1 ... W_n] = U Σ [V_1 ... V_n]ᵀ``: the factors of all experts together are orthonormal, the shared one ``U Σ``."""
    weight = gaussian(EXPERTS, 20, 20, seed=8)
    basis = mobie._basis(weight, Recipe.make("mobie", side=side, shared_bits=bits), "down")
    assert basis is not None
    factors = basis.factors(weight)
    back = basis.shared @ factors if side == "output" else factors @ basis.shared
    assert torch.allclose(back, weight, atol=1e-4)
    if side == "input":
        weight, factors, shared = weight.mT, factors.mT, basis.shared.mT
    else:
        shared = basis.shared
    concatenated = torch.cat(list(weight), 1)
    own = torch.cat(list(factors), 1)
    assert torch.allclose(own @ own.mT, torch.eye(20), atol={16: 2e-3, 8: 3e-2}[bits])
    left, values, _ = torch.linalg.svd(concatenated, full_matrices=False)
    alignment = ((shared / shared.norm(dim=0)) * left).sum(0).abs()
    assert (alignment > {16: 0.9999, 8: 0.999}[bits]).all()
    assert torch.allclose(shared.norm(dim=0), values, rtol={16: 1e-3, 8: 1e-2}[bits])


@pytest.mark.parametrize("side", ["output", "input"])
def test_experts_that_are_signs_in_their_joint_basis_come_back_whole(side: str) -> None:
    """Only the singular vectors of Eq. 4 make signs of these matrices: one bit then loses nothing, and without them a lot."""
    rotation = torch.linalg.qr(gaussian(16, 16, seed=1))[0]
    signs = torch.from_numpy(hadamard(128)[1:17]).float()  # orthogonal rows
    weight = torch.stack((rotation * torch.logspace(0, -2, 16) @ signs).chunk(EXPERTS, 1))  # (experts, 16, 32)
    weight = weight if side == "output" else weight.mT.contiguous()
    x = gaussian(EXPERTS, TOKENS, weight.shape[2], seed=2)
    assert error(weight, x, side=side, shared_bits=16, error_feedback=False) < 1e-2
    assert error(weight, x, cejd=False, error_feedback=False) > 0.3


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_cejd_wins_where_tails_are_heavy_and_inputs_have_few_directions(seed: int) -> None:
    """As in trained networks: signs keep half of the energy of a Laplace matrix and 2/π of a rotated one. Where weights are
    larger in the directions of the inputs too, these become the leading columns of the factors, and salient.
    """
    inputs, few = 96, 8
    directions = torch.linalg.qr(gaussian(inputs, inputs, seed=seed))[0][:, :few]
    line = directions @ directions.mT
    x = gaussian(EXPERTS, 512, inputs, seed=seed + 20) @ (torch.eye(inputs) + line)
    weight = laplace(EXPERTS, 64, inputs, seed=seed + 10)
    for options in ({}, {"salient_fraction": 0.1}, {"error_feedback": False}):
        assert error(weight, x, side="input", **options) < 0.92 * error(weight, x, cejd=False, **options)
    lined_up = weight @ (torch.eye(inputs) + line)
    options = {"salient_fraction": 0.1}
    assert error(lined_up, x, side="input", **options) < 0.92 * error(lined_up, x, cejd=False, **options)


def test_a_rotation_gives_signs_nothing_where_weights_are_gaussian_and_inputs_white() -> None:
    """Why the toys did not show it: 2/π of the energy is kept either way, and every direction is as good as another."""
    weight, x = gaussian(EXPERTS, 64, 96, seed=3), gaussian(EXPERTS, TOKENS, 96, seed=4)
    without, with_basis = (error(weight, x, cejd=cejd, error_feedback=False, side="input") for cejd in (False, True))
    assert with_basis == pytest.approx(without, rel=0.02)


def test_lambda_counts_in_the_energy_of_a_row() -> None:
    """The factors of a joint basis are thirty times smaller than weights: what NGES does must not depend on that."""
    weight, x = laplace(EXPERTS, 24, 40, seed=5), gaussian(EXPERTS, TOKENS, 6, seed=6) @ gaussian(6, 40, seed=7)
    for relative, same in ((True, True), (False, False)):
        options = {"nges": True, "cejd": False, "nges_relative": relative}
        large, small = (packed(scale * weight, x, **options).unpack() / scale for scale in (1.0, 1 / 32))
        assert torch.allclose(large, small, rtol=2e-2, atol=2e-3) == same


def test_the_null_space_is_that_of_the_layer_unless_asked_otherwise() -> None:
    weight = laplace(EXPERTS, 24, 40, seed=5)
    x = gaussian(EXPERTS, TOKENS, 4, seed=6) @ gaussian(EXPERTS, 4, 40, seed=7)  # every expert has four directions of its own
    moments = x.mT @ x
    for whose in ("layer", "expert"):
        options = {"nges": True, "cejd": False, "null_space": whose}
        plain, scaled = packed(weight, x, cejd=False).factor, packed(weight, x, **options).factor
        assert isinstance(plain, Signs) and isinstance(scaled, Signs)
        binary = plain.unpack()
        threshold = Recipe.make("mobie").null_space_threshold
        for expert in range(EXPERTS):
            mine = slice(expert, expert + 1)
            used = used_directions(layer_mean(moments)[None] if whose == "layer" else moments[mine], threshold)
            assert used.shape[2] == (16 if whose == "layer" else 4)
            pull = 0.2 * float(binary[mine].square().sum(2).mean())
            rows, columns = null_space_scales(weight[mine], binary[mine], used, pull=pull, iterations=15)
            wanted = binary[expert] * rows[0].unsqueeze(1) * columns[0]
            assert torch.allclose(scaled.unpack()[expert], wanted, rtol=2e-2, atol=2e-3)
