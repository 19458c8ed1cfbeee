"""One width for every unit under one budget of bytes: BitsMoE's integer linear program, exactly and fast.

The problem is a multiple-choice knapsack: ``min Σ_u cost[u, c_u]`` subject to ``Σ_u size[c_u] ≤ budget``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moebius.errors import RecipeError

_GAP = 1e-5  # of the objective, where HiGHS may stop
_BISECTIONS = 100


def allocate_exactly(costs: Tensor, sizes: Tensor, budget: int) -> Tensor:
    """Solve the integer linear program with HiGHS.

    Args:
        costs: (units, choices).
        sizes: of each choice, ascending; the first is what a unit takes at least. Integers, (choices,) where they are the same
            for every unit, else (units, choices).
        budget: what all units may take.

    Returns:
        The choice of every unit. int64 (units,)

    Raises:
        RecipeError: a budget in which not even the smallest choices fit, or a problem that HiGHS gives up.
    """
    import numpy as np
    from scipy import sparse
    from scipy.optimize import Bounds, LinearConstraint, milp

    _check(costs, sizes, budget)
    units, choices = costs.shape
    variables = np.arange(units * choices)
    one_each = sparse.csr_array((np.ones(len(variables)), (variables // choices, variables)))
    taken = sparse.csr_array(sizes.expand(units, choices).cpu().numpy().astype(float).reshape(1, -1))
    scale = float(costs.abs().max()) or 1.0
    found = milp(
        (costs.double().cpu().numpy() / scale).ravel(),
        integrality=np.ones(len(variables)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(taken, -np.inf, budget)],
        options={"mip_rel_gap": _GAP},
    )
    if found.x is None:
        raise RecipeError(f"bit allocation: HiGHS gave up ({found.message}); wanted a solution, use allocation=lagrangian")
    return torch.from_numpy(found.x.reshape(units, choices).argmax(1)).to(costs.device)


def allocate(costs: Tensor, sizes: Tensor, budget: int) -> Tensor:
    """Solve it by its Lagrangian: at a price per byte every unit chooses for itself; the price is found by bisection.

    What the price leaves of the budget goes to the units that would change next, the best bargain first. The result misses
    the optimum by less than one unit's change: with thousands of units, a tiny share of the objective.

    Args and raises: as :func:`allocate_exactly`; sizes are the same for every unit.
    """
    _check(costs, sizes, budget)
    costs, sizes = costs.double(), sizes.to(costs.device)
    steps = (costs[:, :1] - costs).abs().max()
    low, high = 0.0, float(steps / sizes.diff().min()) + 1.0  # at the upper price nobody takes more than the least
    frugal = _choices(costs, sizes, high)
    generous = _choices(costs, sizes, low)
    if int(sizes[generous].sum()) <= budget:
        return generous
    for _ in range(_BISECTIONS):
        price = (low + high) / 2
        choice = _choices(costs, sizes, price)
        if int(sizes[choice].sum()) <= budget:
            frugal, high = choice, price
        else:
            generous, low = choice, price
        if high - low <= 1e-12 * high:
            break
    return _spend(costs, sizes, frugal, generous, budget)


def _choices(costs: Tensor, sizes: Tensor, price: float) -> Tensor:
    """What every unit takes at this price; the smaller of two that are as good."""
    return (costs + price * sizes).argmin(1)


def _spend(costs: Tensor, sizes: Tensor, frugal: Tensor, generous: Tensor, budget: int) -> Tensor:
    """Let units change from ``frugal`` to ``generous`` while that fits, then take whatever single changes still fit."""
    every = torch.arange(len(costs), device=costs.device)
    left = budget - int(sizes[frugal].sum())
    extra = sizes[generous] - sizes[frugal]
    saved = costs[every, frugal] - costs[every, generous]
    order = torch.where(extra > 0, saved / extra.clamp_min(1), -torch.inf).argsort(descending=True, stable=True)
    order = order[extra[order] > 0]
    taken = order[extra[order].cumsum(0) <= left]
    choice = frugal.clone()
    choice[taken] = generous[taken]
    for _ in range(len(sizes)):  # one more pass of changes to any larger choice
        left = budget - int(sizes[choice].sum())
        extra = sizes - sizes[choice].unsqueeze(1)  # (units, choices)
        saved = costs[every, choice].unsqueeze(1) - costs
        value = torch.where((extra > 0) & (extra <= left), saved, 0)
        best, where = value.max(1)
        unit = int(best.argmax())
        if best[unit] <= 0:
            break
        choice[unit] = where[unit]
    return choice


def _check(costs: Tensor, sizes: Tensor, budget: int) -> None:
    least = int(sizes.expand(costs.shape)[:, 0].sum())
    if budget < least:
        raise RecipeError(f"bit allocation: got a budget of {budget} bytes, wanted at least {least}; ask for more bits")
