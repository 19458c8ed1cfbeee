"""Whitened bases by their mathematics: white coordinates, sorted energies, and errors that the energies predict."""

from __future__ import annotations

import pytest
import torch

from moebius.basis.whitened import coordinates, input_basis, loss_metric, output_basis, rounded_basis
from moebius.formats.graded import ROUNDING_NOISE

EXPERTS, OUT, INPUTS, TOKENS = 4, 20, 12, 300


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHT = randn(EXPERTS, OUT, INPUTS, seed=0)
X = randn(EXPERTS, TOKENS, INPUTS, seed=1) @ randn(INPUTS, INPUTS, seed=2)
MOMENTS = X.mT @ X


def output_error(difference: torch.Tensor) -> torch.Tensor:
    """Squared error of each expert's outputs, measured on its tokens."""
    return (X @ difference.mT).square().sum((1, 2))


def test_whitened_coordinates_have_identity_covariance() -> None:
    basis = input_basis(WEIGHT, MOMENTS)
    coordinate = X.flatten(0, 1) @ basis.directions.mT
    covariance = coordinate.mT @ coordinate
    spread = covariance.diagonal().sqrt()
    correlation = covariance / spread / spread.unsqueeze(1)
    assert (correlation - torch.eye(INPUTS)).abs().max() < 0.02  # the damping of C is all that is left
    assert torch.allclose(basis.directions.norm(dim=1), torch.ones(INPUTS), atol=1e-5)


@pytest.mark.parametrize("expert", range(EXPERTS))
def test_the_energy_of_an_input_direction_is_the_error_without_it(expert: int) -> None:
    basis = input_basis(WEIGHT, MOMENTS)
    factors = WEIGHT @ torch.linalg.inv(basis.directions)
    for direction in (0, 5, INPUTS - 1):
        without = factors.clone()
        without[:, :, direction] = 0
        error = output_error(WEIGHT - without @ basis.directions)[expert]
        assert basis.energies[expert, direction].item() == pytest.approx(error.item(), rel=1e-3)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_energy_of_an_output_direction_is_the_error_without_it(weighted: bool) -> None:
    gradients = randn(500, OUT, seed=3) * torch.linspace(0.1, 2, OUT)
    metric = loss_metric(gradients.mT @ gradients) if weighted else torch.eye(OUT, dtype=torch.float64)
    basis = output_basis(WEIGHT, MOMENTS, metric if weighted else None)
    factors = torch.linalg.inv(basis.directions.mT) @ WEIGHT
    for direction in (0, 7):
        without = factors.clone()
        without[:, direction] = 0
        errors = X @ (WEIGHT - basis.directions.mT @ without).mT
        measured = ((errors @ metric.float()) * errors).sum((1, 2))
        assert torch.allclose(basis.energies[:, direction].float(), measured, rtol=1e-3)
    # Orthogonal under the metric: what one direction errs, no other one can mend.
    gram = basis.directions.double() @ metric @ basis.directions.double().mT
    off = gram - torch.diag(gram.diagonal())
    assert off.abs().max() < 1e-4 * gram.diagonal().max()


@pytest.mark.parametrize("find", [input_basis, output_basis])
def test_directions_come_sorted_by_what_all_experts_lose(find: object) -> None:
    moments = MOMENTS.mean(0, keepdim=True).expand(EXPERTS, -1, -1)  # where all experts see the same, exactly so
    total = find(WEIGHT, moments).energies.sum(0)  # type: ignore[operator]
    assert (total.diff() <= 1e-4 * total[0]).all()


def test_layers_without_tokens_or_gradients_have_a_basis_too() -> None:
    for find in (input_basis, output_basis):
        basis = find(WEIGHT, torch.zeros_like(MOMENTS))
        assert basis.directions.isfinite().all() and not basis.energies.any()
    assert torch.equal(loss_metric(torch.zeros(3, 3)), torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("side", ["input", "output"])
def test_rounded_directions_err_as_much_as_their_bits_say(side: str) -> None:
    directions = torch.nn.functional.normalize(randn(40, 512, seed=4), dim=1)
    bits = [8] * 8 + [6] * 8 + [5] * 8 + [4] * 8 + [3] * 8
    packed = rounded_basis(directions, bits, side)
    packed.check("basis")
    back = packed.unpack()[0] if side == "input" else packed.unpack()[0].mT
    error = (back - directions).square().sum(1).view(5, 8).mean(1)
    for grade, got in zip((8, 6, 5, 4, 3), error.tolist(), strict=True):
        assert got == pytest.approx(ROUNDING_NOISE[grade], rel=0.35)


def test_coordinates_are_least_squares_under_the_metric() -> None:
    directions, vectors = randn(5, 16, seed=5), randn(16, 7, seed=6)
    root = randn(16, 16, seed=7)
    metric = root @ root.mT + torch.eye(16)
    best = coordinates(directions, metric) @ vectors
    residual = vectors - directions.mT @ best
    assert (directions @ metric @ residual).abs().max() < 1e-2 * (directions @ metric @ vectors).abs().max()
    assert torch.allclose(coordinates(directions) @ directions.mT, torch.eye(5), atol=1e-3)
