"""The budget is spent, exactly counted, and spent well: against brute force, against swaps, against its own bound."""

from __future__ import annotations

import itertools

import pytest
import torch

from moebius.allocate.budget import Allocation, Units, allocate, expected_loss, prefix_values, stored_bytes
from moebius.errors import RecipeError
from moebius.formats.graded import Graded
from moebius.formats.planes import DISTORTION, Planes

GRADES = (8, 6, 5, 4, 3)


def random_units(seed: int, experts: int = 16, directions: int = 96, entries: int = 128) -> Units:
    generator = torch.Generator().manual_seed(seed)
    decay = torch.exp(-torch.arange(directions) / (10 + 20 * seed % 50))
    liking = torch.rand(experts, 1, generator=generator).square()
    # Losses are tiny: nothing may depend on their unit.
    values = 1e-13 * (seed + 1) * liking * decay * torch.rand(experts, directions, generator=generator)
    return Units(prefix_values(values), entries, directions)


GROUPS = [random_units(seed) for seed in range(4)]
WEIGHTS = sum(units.values.numel() * units.entries for units in GROUPS)


def spend(bits: float, groups: list[Units] = GROUPS, **options: object) -> tuple[int, list[Allocation]]:
    budget = int(bits * WEIGHTS / 8)
    return budget, allocate(groups, budget, **{"scale_bits": 5, "grades": GRADES, "most_planes": 4, **options})


def total(groups: list[Units], allocations: list[Allocation], scale_bits: int = 5) -> int:
    return sum(stored_bytes(units, a, scale_bits) for units, a in zip(groups, allocations, strict=True))


def loss(groups: list[Units], allocations: list[Allocation]) -> float:
    return sum(expected_loss(units, a) for units, a in zip(groups, allocations, strict=True))


@pytest.mark.parametrize("bits", [0.3, 0.5, 0.75, 1.0, 1.37, 2.0, 3.0, 4.0])
def test_the_budget_is_spent_within_one_percent(bits: float) -> None:
    budget, allocations = spend(bits)
    assert 0.99 * budget <= total(GROUPS, allocations) <= budget


@pytest.mark.parametrize("most_planes", [1, 4, 7])
def test_no_direction_has_more_planes_than_are_allowed(most_planes: int) -> None:
    """And where there are bits for them, some direction has all of these."""
    _, allocations = spend(3.5, most_planes=most_planes)
    assert max(a.widths.shape[1] for a in allocations) == most_planes


def test_costs_are_those_of_the_stored_tensors() -> None:
    _, allocations = spend(0.7)
    for units, a in zip(GROUPS, allocations, strict=True):
        kept = len(a.basis_bits)
        planes = Planes.skeleton(a.widths, side="input", directions=kept, entries=units.entries, scale_bits=5)
        basis = Graded.skeleton(side="input", bits=a.basis_bits, entries=units.basis_entries)
        assert planes.stored_bits() + basis.stored_bits() == 8 * stored_bytes(units, a, 5)


def test_planes_are_nested_and_basis_bits_fall() -> None:
    for bits in (0.4, 1.0, 2.5):
        for a in spend(bits)[1]:
            assert (a.widths.diff(dim=1) <= 0).all() and (a.widths >= 0).all()
            assert a.widths[:, :1].max() == len(a.basis_bits)  # every direction that is kept is used
            assert list(a.basis_bits) == sorted(a.basis_bits, reverse=True)


def test_more_bits_never_lose_more_and_the_unit_of_the_loss_does_not_matter() -> None:
    losses = [loss(GROUPS, spend(bits)[1]) for bits in (0.3, 0.5, 1.0, 2.0, 4.0)]
    assert losses == sorted(losses, reverse=True)
    scaled = [Units(units.values * 1e20, units.entries, units.basis_entries) for units in GROUPS]
    for small, large in zip(spend(0.8)[1], spend(0.8, scaled)[1], strict=True):
        assert torch.equal(small.widths, large.widths) and small.basis_bits == large.basis_bits


def with_planes(a: Allocation, expert: int, plane: int, change: int) -> Allocation | None:
    """With one direction more or less in one plane of one expert, if that nests."""
    widths = a.widths.clone()
    if not 0 <= plane < widths.shape[1]:
        return None
    widths[expert, plane] += change
    row = widths[expert].tolist()
    fits = all(x >= y for x, y in itertools.pairwise(row)) and row[-1] >= 0 and row[0] <= len(a.basis_bits)
    return Allocation(widths, a.basis_bits) if fits else None


def test_no_swap_of_a_plane_between_two_units_improves_it() -> None:
    groups = [random_units(seed, experts=4, directions=12, entries=64) for seed in range(2)]
    weights = sum(units.values.numel() * units.entries for units in groups)
    for bits in (1.5, 2.0, 2.6):
        budget = int(bits * weights / 8)
        best = allocate(groups, budget, scale_bits=8, grades=(8,), most_planes=5)
        least, places = loss(groups, best), list(itertools.product(range(2), range(4), range(5)))
        swaps = 0
        for (g, e, p), (h, f, q) in itertools.product(places, places):
            taken = with_planes(best[g], e, p, -1)
            if taken is None or taken.widths[e, 0] == 0:  # the scales of a whole expert are another matter
                continue
            changed = [taken if i == g else a for i, a in enumerate(best)]
            given = with_planes(changed[h], f, q, 1)
            if given is None or best[h].widths[f, 0] == 0:
                continue
            changed[h] = given
            if total(groups, changed, 8) <= min(budget, total(groups, best, 8)):
                swaps += 1
                assert loss(groups, changed) >= least * (1 - 1e-12)
        assert swaps > 10


def test_brute_force_finds_nothing_better_than_what_one_unit_can_be_worth() -> None:
    values = torch.tensor([[9.0, 4.0, 1.0], [5.0, 2.0, 0.5]])
    units = Units(values.double(), 64, 8)
    rows = [w for w in itertools.product(range(4), repeat=4) if all(x >= y for x, y in itertools.pairwise(w))]
    candidates = []
    for first, second in itertools.product(rows, rows):
        for bits in itertools.product((8, 4), repeat=max(first[0], second[0])):
            if list(bits) == sorted(bits, reverse=True):
                widths = torch.tensor([first, second])
                a = Allocation(widths[:, : int((widths.sum(0) > 0).sum())], bits)
                candidates.append((stored_bytes(units, a, 8), expected_loss(units, a)))
    hull_gap = 0.0
    for budget in range(80, 260, 12):
        got = expected_loss(units, allocate([units], budget, scale_bits=8, grades=(8, 4), most_planes=4)[0])
        best = min(value for cost, value in candidates if cost <= budget)
        assert got >= best - 1e-9
        hull_gap = max(hull_gap, got - best)
    # A price is blind between the corners of the convex hull, which are one direction of all experts apart.
    assert hull_gap <= values[:, 0].sum() * (1 - DISTORTION[1])


def test_units_without_value_get_nothing() -> None:
    dead = Units(torch.zeros(4, 12, dtype=torch.float64), 64, 12)
    alive = random_units(1, experts=4, directions=12, entries=64)
    allocations = allocate([dead, alive], 1500, scale_bits=5, grades=GRADES, most_planes=4)
    assert not allocations[0].widths.any() and allocations[0].basis_bits == ()
    assert allocations[1].widths.any()


def test_a_budget_below_what_nothing_costs_is_refused() -> None:
    with pytest.raises(RecipeError, match="wanted at least"):
        allocate(GROUPS, 3, scale_bits=5, grades=GRADES, most_planes=4)


def test_prefix_values_are_the_nearest_falling_ones() -> None:
    values = torch.rand(5, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    falling = prefix_values(values)
    assert (falling.diff(dim=1) <= 1e-12).all()
    assert torch.allclose(falling.sum(1), values.sum(1))  # pools keep their sums
    assert torch.allclose(prefix_values(falling), falling)
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        other = (falling + 0.1 * torch.randn(5, 30, generator=generator, dtype=torch.float64)).cummin(1).values
        assert ((other - values).square().sum(1) >= (falling - values).square().sum(1) - 1e-9).all()
