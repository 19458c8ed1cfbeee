"""Batches of similar counts: every row once, few batches, little padding, and the products of a loop over experts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius.calibrate.grouped import Assignment, grouped_linear

EXPERTS = 12


def assignments(counts: list[int]) -> Assignment:
    chosen = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    shuffled = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))]
    return Assignment.of(shuffled.unsqueeze(1), len(counts))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=24), st.integers(1, 1 << 27))
def test_every_row_is_in_one_batch(counts: list[int], entries: int) -> None:
    assignment = assignments(counts)
    rows, experts = [], []
    for batch in assignment.batches(entries, 1):
        rows += batch.index[batch.filled].tolist()
        experts += batch.experts.tolist()
        owners = assignment.expert_of_row[batch.index[batch.filled]]
        assert torch.equal(owners, batch.experts.repeat_interleave(batch.filled.sum(1)))
        if batch.filled.shape[1] > 16:
            assert batch.filled.float().mean() >= 0.74
    assert sorted(rows) == list(range(sum(counts)))
    assert sorted(experts) == [e for e, count in enumerate(counts) if count]


def test_lopsided_routing_needs_few_batches() -> None:
    counts = [int(2000 / (1 + e)) for e in range(256)]
    assert sum(1 for _ in assignments(counts).batches(1, 1)) <= 20


def test_grouped_linear_and_its_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    choice = torch.randint(0, EXPERTS, (70, 3), generator=generator) ** 2 // EXPERTS  # lopsided; the last experts get nothing
    choice[5, 1] = choice[9, 0] = EXPERTS  # left out
    assignment = Assignment.of(choice, EXPERTS)
    weight = torch.randn(EXPERTS, 7, 5, generator=generator)
    rows = torch.randn(len(assignment.order), 5, generator=generator, requires_grad=True)
    upstream = torch.randn(len(assignment.order), 7, generator=generator)
    got = grouped_linear(rows, weight, assignment)
    (got_gradient,) = torch.autograd.grad(got, rows, upstream)
    experts = [e for e in sorted(choice.flatten().tolist()) if e < EXPERTS]
    assert assignment.expert_of_row.tolist() == experts
    assert len(experts) == 208
    wanted = torch.stack([weight[e] @ row for e, row in zip(experts, rows, strict=True)])
    (wanted_gradient,) = torch.autograd.grad(wanted, rows, upstream)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(got_gradient, wanted_gradient)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_gradient_of_the_weights_is_that_of_a_loop(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(1)
    assignment = Assignment.of(torch.randint(0, EXPERTS, (70, 3), generator=generator) ** 2 // EXPERTS, EXPERTS)
    weight = torch.randn(EXPERTS, 7, 5, generator=generator, requires_grad=True)
    rows = torch.randn(len(assignment.order), 5, generator=generator, requires_grad=True)
    upstream = torch.randn(len(assignment.order), 7, generator=generator)
    got = grouped_linear(rows, weight, assignment, dtype)
    wanted = torch.stack([weight[e] @ row for e, row in zip(assignment.expert_of_row.tolist(), rows, strict=True)])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=3 * tolerance)
    for found, true in zip(*(torch.autograd.grad(y, (rows, weight), upstream) for y in (got, wanted)), strict=True):
        assert found.dtype == torch.float32
        assert (found - true).norm() < tolerance * true.norm()


def test_no_rows_at_all() -> None:
    assignment = Assignment.of(torch.full((4, 2), EXPERTS), EXPERTS)
    assert grouped_linear(torch.zeros(0, 5), torch.zeros(EXPERTS, 7, 5), assignment).shape == (0, 7)
