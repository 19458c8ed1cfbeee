"""The exact and the fast solution of the allocation against each other, and both against every possibility."""

from __future__ import annotations

import itertools

import pytest
import torch

from moebius.allocate.ilp import allocate, allocate_exactly
from moebius.errors import RecipeError

SIZES = torch.tensor([0, 18, 34, 50, 66])


def costs(units: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    energy = torch.randn(units, 1, generator=generator).mul(2).exp()
    steps = 0.2 + 0.2 * torch.rand(units, 4, generator=generator)
    return energy * torch.cat([torch.ones(units, 1), steps.cumprod(1)], 1)


def total(table: torch.Tensor, choice: torch.Tensor) -> float:
    return table.gather(1, choice.unsqueeze(1)).sum().item()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [0, 60, 133, 330])
def test_the_exact_solver_finds_the_best_of_all(seed: int, budget: int) -> None:
    table = costs(5, seed)
    every = [torch.tensor(c) for c in itertools.product(range(5), repeat=5) if SIZES[list(c)].sum() <= budget]
    best = min(total(table, choice) for choice in every)
    found = allocate_exactly(table, SIZES, budget)
    assert SIZES[found].sum() <= budget
    assert total(table, found) == pytest.approx(best, rel=1e-4)
    fast = allocate(table, SIZES, budget)
    assert SIZES[fast].sum() <= budget
    assert total(table, fast) >= best - 1e-6


@pytest.mark.parametrize("share", [0.1, 0.4, 0.8])
def test_the_fast_solution_agrees_with_the_exact_one(share: float) -> None:
    table = costs(1500, 7)
    budget = int(share * 66 * 1500)
    exact, fast = allocate_exactly(table, SIZES, budget), allocate(table, SIZES, budget)
    assert SIZES[fast].sum() <= budget
    assert total(table, exact) * (1 - 1e-4) <= total(table, fast) <= total(table, exact) * 1.001
    assert SIZES[fast].sum() > budget - 66


def test_room_for_everything_and_for_nothing() -> None:
    table = costs(20, 1)
    assert (allocate(table, SIZES, 66 * 20) == 4).all()
    assert (allocate(table, SIZES, 0) == 0).all()
    for solve in (allocate, allocate_exactly):
        with pytest.raises(RecipeError, match="ask for more bits"):
            solve(table, SIZES + 1, 19)
