from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius.linalg.hessian import conditioned, feedback_weights
from moebius.quantize.binary import mixed_order, rank_one_scales, signs
from moebius.quantize.feedback import mixed_order_with_feedback


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_salient(experts: int, columns: int, count: int, seed: int) -> torch.Tensor:
    mask = torch.zeros(experts, columns, dtype=torch.bool)
    return mask.scatter_(1, randn(experts, columns, seed=seed).argsort(1)[:, :count], True)


def test_the_sign_of_zero_is_plus() -> None:
    assert signs(torch.tensor([-1.0, -0.0, 0.0, 2.0])).tolist() == [-1, 1, 1, 1]


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), seed=st.integers(0, 1 << 30), zeros=st.booleans())
def test_alternating_updates_never_raise_the_error(rows: int, columns: int, seed: int, zeros: bool) -> None:
    weight = randn(2, rows, columns, seed=seed).double() * randn(2, rows, 1, seed=seed + 1).exp()
    if zeros:
        weight[0, 0], weight[1, :, 0] = 0, 0
    planes = signs(weight)
    last = torch.full((2,), float("inf"), dtype=torch.float64)
    for alternations in range(6):
        row_scales, column_scales = rank_one_scales(weight, planes, alternations)
        error = (weight - row_scales.unsqueeze(2) * planes * column_scales.unsqueeze(1)).square().sum((1, 2))
        assert (error <= last + 1e-9).all()
        last = error
    assert torch.isfinite(last).all()


def test_the_closed_forms_converge_to_the_best_rank_one_fit() -> None:
    weight = randn(1, 6, 8, seed=3).double()
    row_scales, column_scales = rank_one_scales(weight, signs(weight), 200)
    error = (weight.abs() - row_scales.unsqueeze(2) * column_scales.unsqueeze(1)).norm()
    best = torch.linalg.svdvals(weight[0].abs())[1:].norm()
    assert torch.allclose(error, best)


def test_the_second_order_touches_salient_columns_alone_and_lowers_their_error() -> None:
    weight, salient = randn(3, 16, 24, seed=5), some_salient(3, 24, 8, seed=6)
    first = mixed_order(weight, torch.zeros_like(salient), 5).matrix()
    both = mixed_order(weight, salient, 5).matrix()
    changed = (both != first).any(1)
    assert not (changed & ~salient).any()
    before, after = ((weight - matrix).square().sum(1) for matrix in (first, both))
    assert (after[salient] < before[salient]).all()


def test_planes_pack_to_what_they_stand_for() -> None:
    weight, salient = randn(3, 16, 24, seed=7), some_salient(3, 24, 8, seed=8)
    planes = mixed_order(weight, salient, 5)
    assert torch.allclose(planes.pack().unpack(), planes.matrix(), rtol=2e-3, atol=1e-5)
    rows, columns = randn(3, 16, seed=9), randn(3, 24, seed=10)
    want = rows.unsqueeze(2) * planes.matrix() * columns.unsqueeze(1)
    assert torch.allclose(planes.scaled(rows, columns).matrix(), want, atol=1e-6)


def test_feedback_without_correlation_changes_no_sign() -> None:
    weight, salient = randn(2, 8, 12, seed=11), some_salient(2, 12, 4, seed=12)
    weights = torch.eye(12).expand(2, -1, -1)
    fed = mixed_order_with_feedback(weight, salient, weights, alternations=4, block_size=5)
    plain = mixed_order(weight, salient, 4)
    assert torch.equal(fed.first, plain.first)
    assert torch.allclose(fed.matrix(), plain.matrix(), atol=1e-2)  # column scales see the final row scales


def test_feedback_lowers_the_error_of_the_output() -> None:
    weight, salient = randn(4, 32, 32, seed=13), some_salient(4, 32, 8, seed=14)
    x = randn(4, 200, 32, seed=15) @ randn(4, 32, 32, seed=16)
    moments = x.mT @ x
    weights = feedback_weights(conditioned(moments, shrinkage=0.0, damping=0.01))

    def output_error(matrix: torch.Tensor) -> torch.Tensor:
        return (((weight - matrix) @ moments) * (weight - matrix)).sum((1, 2))

    fed = mixed_order_with_feedback(weight, salient, weights, alternations=4, block_size=8)
    assert (output_error(fed.matrix()) < 0.9 * output_error(mixed_order(weight, salient, 4).matrix())).all()


def test_the_block_size_of_the_feedback_changes_nothing_but_speed() -> None:
    weight, salient = randn(2, 8, 20, seed=17).double(), some_salient(2, 20, 8, seed=18)
    moments = randn(2, 50, 20, seed=19).double()
    weights = feedback_weights(moments.mT @ moments).double()
    whole, blocks = (
        mixed_order_with_feedback(weight, salient, weights, alternations=4, block_size=size).matrix() for size in (20, 3)
    )
    assert torch.allclose(whole, blocks)


def test_zero_weights_stay_zero() -> None:
    weight, weights = torch.zeros(2, 4, 8), torch.eye(8).expand(2, 8, 8)
    planes = mixed_order_with_feedback(weight, some_salient(2, 8, 8, seed=0), weights, alternations=3, block_size=4)
    assert not planes.matrix().any()
    assert not mixed_order(weight, some_salient(2, 8, 8, seed=0), 3).matrix().any()
