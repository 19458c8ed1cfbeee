from __future__ import annotations

import itertools

import pytest
import torch

from moebius.linalg.hessian import conditioned, feedback_factor
from moebius.quantize.integers import round_to_nearest, round_with_feedback, whole_rows


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group_size", [4, 5, 12])
def test_rounding_errs_by_at_most_a_step(bits: int, group_size: int) -> None:
    weight = randn(2, 3, 12)
    rounded = round_to_nearest(weight, bits, group_size)
    step = rounded.scales.repeat_interleave(group_size, 2)[..., :12]
    # Half a step for the entry; the zero point is an integer too, so that the ends may be cut by another half.
    assert ((rounded.matrix() - weight).abs() <= step * 1.0001).all()
    assert torch.allclose(rounded.pack().unpack(), rounded.matrix(), rtol=2e-3, atol=1e-3)


def test_more_bits_err_less() -> None:
    weight = randn(2, 16, 128)
    errors = [(round_to_nearest(weight, bits, 32).matrix() - weight).norm().item() for bits in range(2, 9)]
    assert all(later < 0.7 * earlier for earlier, later in itertools.pairwise(errors))


def test_one_bit_is_plus_or_minus_the_mean_magnitude() -> None:
    weight = randn(2, 3, 12)
    want = torch.where(weight >= 0, 1, -1) * weight.abs().mean(2, keepdim=True)
    assert torch.allclose(round_to_nearest(weight, 1, 12).matrix(), want)
    assert round_to_nearest(weight, 1, 12).zeros is None


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_zero_is_a_level_and_groups_of_zeros_stay_zero(bits: int) -> None:
    weight = randn(1, 2, 8)
    weight[:, :, :4] = 0
    assert not round_to_nearest(weight, bits, 4).matrix()[:, :, :4].any()
    assert not round_with_feedback(weight * 0, torch.eye(8).unsqueeze(0), bits, 4, 4).matrix().any()
    one_sided = round_to_nearest(torch.tensor([[[0.0, 3.0, 4.0, 5.0]]]), 2, 4).matrix()
    if bits > 1:
        assert one_sided[0, 0, 0] == 0


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_feedback_without_correlation_is_rounding_to_nearest(bits: int) -> None:
    weight, factor = randn(2, 5, 24), torch.diag_embed(torch.rand(2, 24) + 0.5)
    fed, plain = round_with_feedback(weight, factor, bits, 8, 8), round_to_nearest(weight, bits, 8)
    assert torch.equal(fed.codes, plain.codes)
    assert torch.equal(fed.matrix(), plain.matrix())


@pytest.mark.parametrize(("bits", "group_size", "block_size"), [(1, 32, 8), (2, 8, 8), (3, 16, 128), (2, 8, 12)])
def test_feedback_lowers_the_error_of_the_output(bits: int, group_size: int, block_size: int) -> None:
    weight, x = randn(3, 16, 32), randn(3, 200, 32, seed=1) @ randn(3, 32, 32, seed=2)
    moments = x.mT @ x
    factor = feedback_factor(conditioned(moments, shrinkage=0.0, damping=0.01))

    def output_error(matrix: torch.Tensor) -> torch.Tensor:
        return (((weight - matrix) @ moments) * (weight - matrix)).sum((1, 2))

    fed = round_with_feedback(weight, factor, bits, group_size, block_size).matrix()
    assert (output_error(fed) < 0.9 * output_error(round_to_nearest(weight, bits, group_size).matrix())).all()


def test_feedback_follows_gptq_column_by_column() -> None:
    """The textbook loop: after each column, the optimal update of the rest, from the inverse of what is left of H."""
    weight, x = randn(1, 4, 6).double(), randn(30, 6, seed=1).double()
    hessian = x.mT @ x
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).unsqueeze(0)
    got = round_with_feedback(weight, factor, 2, 6, 3)
    low, high = weight.amin(2).clamp_max(0), weight.amax(2).clamp_min(0)
    scale = (high - low)[0] / 3
    zero = (-low[0] / scale).round()
    rest, want = weight[0].clone(), torch.zeros(4, 6).double()
    for j in range(6):
        want[:, j] = (((rest[:, j] / scale).round() + zero).clamp(0, 3) - zero) * scale
        error = rest[:, j] - want[:, j]
        inverse = torch.linalg.inv(hessian[j:, j:])
        rest[:, j:] -= error.unsqueeze(1) * inverse[0] / inverse[0, 0]
    assert torch.allclose(got.matrix()[0], want)


def test_row_factors_are_fused_into_the_scales() -> None:
    rounded, rows = round_to_nearest(randn(2, 3, 12), 2, 4), torch.rand(2, 3)
    assert torch.allclose(rounded.scaled(rows).matrix(), rows.unsqueeze(2) * rounded.matrix())


def test_group_size_zero_is_the_whole_row() -> None:
    assert [whole_rows(size, 256) for size in (0, 128, 1000)] == [256, 128, 256]
