"""Sign planes: the nearest levels, GPTQ's feedback without an inverse, and errors that fall with planes."""

from __future__ import annotations

import itertools

import pytest
import torch

from moebius.formats.planes import AMPLITUDES, DISTORTION
from moebius.linalg.hessian import feedback_factor, feedback_weights
from moebius.quantize.feedback import columns_with_feedback, with_all_errors, with_feedback
from moebius.quantize.planes import PlaneLevels, deviations, nested_levels, over_directions, over_entries

EXPERTS, DIRECTIONS, ENTRIES = 3, 24, 40


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hessian(size: int, seed: int = 1) -> torch.Tensor:
    x = (randn(EXPERTS, 4 * size, size, seed=seed) @ randn(size, size, seed=seed + 1)).double()
    return x.mT @ x + torch.eye(size)


@pytest.mark.parametrize("planes", AMPLITUDES)
def test_nested_signs_are_the_nearest_levels(planes: int) -> None:
    values = 2 * randn(1000, seed=0)
    levels = torch.tensor([sum(p) for p in itertools.product(*((a, -a) for a in AMPLITUDES[planes]))])
    nearest = levels[(values.unsqueeze(1) - levels).abs().argmin(1)]
    assert torch.allclose(nested_levels(values, torch.tensor(AMPLITUDES[planes])), nearest, atol=1e-6)


@pytest.mark.parametrize("block_size", [1, 7, 64])
def test_feedback_is_that_of_gptq(block_size: int) -> None:
    """QuIP's Theorem 6: the factor of the Hessian and that of its inverse push the same errors."""
    weight, moments = randn(EXPERTS, 9, DIRECTIONS, seed=3), hessian(DIRECTIONS)
    mine, theirs = torch.zeros_like(weight), torch.zeros_like(weight)

    def rounded(into: torch.Tensor, step: int, values: torch.Tensor) -> torch.Tensor:
        into[:, :, step] = values.round()
        return values.round()

    with_feedback(weight.mT.contiguous(), feedback_weights(moments), block_size, lambda k, v: rounded(mine, k, v))
    columns_with_feedback(weight.clone(), feedback_factor(moments), 8, lambda k, v: rounded(theirs, k, v))
    assert torch.equal(mine, theirs)
    plain = weight - weight.round()
    fed = weight - mine
    assert ((fed.double() @ moments) * fed).sum() < 0.7 * ((plain.double() @ moments) * plain).sum()


def test_deviations_of_a_product_are_found() -> None:
    directions, entries = randn(EXPERTS, DIRECTIONS, seed=4).exp(), randn(EXPERTS, ENTRIES, seed=5).exp()
    live = torch.arange(DIRECTIONS) < torch.tensor([[24], [10], [0]])
    signs = randn(EXPERTS, DIRECTIONS, ENTRIES, seed=6).sign()
    found = deviations(signs * directions.unsqueeze(2) * entries.unsqueeze(1), live)
    product = found[0].unsqueeze(2) * found[1].unsqueeze(1)
    want = directions.unsqueeze(2) * entries.unsqueeze(1) * live.unsqueeze(2)
    assert torch.allclose(product, want, rtol=1e-3, atol=1e-6)


def quantized(side: str, target: torch.Tensor, moments: torch.Tensor, counts: torch.Tensor, sweeps: int = 0) -> PlaneLevels:
    if side == "entries":
        return over_entries(target, moments.float(), counts, sweeps=sweeps, block_size=16)
    return over_directions(target, moments.float(), feedback_weights(moments), counts, sweeps=sweeps, block_size=16)


def output_error(wrong: torch.Tensor, side: str, moments: torch.Tensor) -> float:
    wrong = (wrong if side == "directions" else wrong.mT).double()
    return (wrong * (moments @ wrong)).sum().item()


@pytest.mark.parametrize("sweeps", [0, 1])
@pytest.mark.parametrize("planes", AMPLITUDES)
@pytest.mark.parametrize("side", ["directions", "entries"])
def test_white_gaussians_err_by_the_distortion(planes: int, side: str, sweeps: int) -> None:
    target = randn(2, 128, 256, seed=7)
    identity = torch.eye(128 if side == "directions" else 256, dtype=torch.float64).expand(2, -1, -1)
    got = quantized(side, target, identity, torch.full((2, 128), planes), sweeps)
    error = (got.factor() - target).square().mean() / target.square().mean()
    # A sweep fits levels to the scales of the rows, and errs a little less than the levels of a Gaussian do.
    assert 0.88 * DISTORTION[planes] < error.item() < 1.06 * DISTORTION[planes]


@pytest.mark.parametrize("side", ["directions", "entries"])
def test_planes_follow_their_counts(side: str) -> None:
    target = randn(EXPERTS, DIRECTIONS, ENTRIES, seed=8)
    counts = (torch.arange(DIRECTIONS) < torch.tensor([[[20], [12], [3]], [[0], [0], [0]], [[24], [24], [24]]])).sum(1)
    moments = hessian(DIRECTIONS if side == "directions" else ENTRIES)
    if side == "directions":
        live = (counts > 0).double()
        moments = moments * live.unsqueeze(2) * live.unsqueeze(1) + torch.diag_embed(1 - live)
    got = quantized(side, target, moments, counts, sweeps=1)
    factor = got.factor()
    assert not factor[counts == 0].any() and factor[counts > 0].any(1).all()
    assert (got.entry_scales[0] > 0).all()
    amplitudes = torch.tensor([[0.0] * 7, *((*a, *[0.0] * (7 - len(a))) for a in AMPLITUDES.values())])[counts]
    rebuilt = torch.zeros_like(target)
    for plane, positive in enumerate(got.positive().unbind(1)):
        rebuilt += torch.where(positive, 1.0, -1.0) * amplitudes[..., plane, None]
    assert torch.allclose(rebuilt, got.levels, atol=1e-6)
    coarse, fine = got.rounded_scales(4).factor(), got.rounded_scales(8).factor()
    assert (fine - factor).norm() < 0.02 * factor.norm() < (coarse - factor).norm() + 0.02 * factor.norm()


@pytest.mark.parametrize("side", ["directions", "entries"])
def test_feedback_lowers_the_error_it_is_for_and_sweeps_lower_it_further(side: str) -> None:
    target = randn(EXPERTS, DIRECTIONS, ENTRIES, seed=9)
    moments = hessian(DIRECTIONS if side == "directions" else ENTRIES)
    identity = torch.eye(moments.shape[-1], dtype=torch.float64).expand_as(moments)
    counts = torch.ones(EXPERTS, DIRECTIONS, dtype=torch.int64)

    def error(used: torch.Tensor, sweeps: int = 0) -> float:
        return output_error(target - quantized(side, target, used, counts, sweeps).factor(), side, moments)

    assert error(moments) < 0.99 * error(identity)
    assert error(moments, 3) < error(moments, 1) < 0.98 * error(moments)


def test_a_sweep_is_coordinate_descent() -> None:
    """With nothing to round, one pass over each step in turn is Gauss-Seidel: the error never rises, and reaches zero."""
    target, moments = randn(EXPERTS, DIRECTIONS, ENTRIES, seed=10), hessian(DIRECTIONS)
    current = torch.zeros_like(target)
    errors = [output_error(target - current, "directions", moments)]
    for _ in range(200):
        with_all_errors(target, current, moments.float(), 7, lambda step, values: values)
        errors.append(output_error(target - current, "directions", moments))
    assert all(now <= last * (1 + 1e-6) + 1e-6 for last, now in itertools.pairwise(errors))
    assert errors[1] < 0.9 * errors[0] and errors[-1] < 1e-2 * errors[0]
