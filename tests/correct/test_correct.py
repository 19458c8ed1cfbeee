from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius.correct.gain import row_gain
from moebius.correct.null_space import null_space_scales
from moebius.linalg.eigen import used_directions
from moebius.quantize.binary import mixed_order
from moebius.quantize.integers import round_to_nearest


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def objective(weight, approximation, projector, rows, columns, pull):  # Eq. 50
    target = weight - (weight - approximation) @ projector
    fit = (target - rows.unsqueeze(2) * approximation * columns.unsqueeze(1)).square().sum((1, 2))
    return fit + pull * ((rows - 1).square().sum(1) + (columns - 1).square().sum(1))


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(1, 8),
    columns=st.integers(1, 8),
    tokens=st.integers(0, 12),
    pull=st.sampled_from([0.0, 1e-3, 0.2, 5.0]),
    seed=st.integers(0, 1 << 30),
)
def test_null_space_scaling_never_raises_its_objective(rows: int, columns: int, tokens: int, pull: float, seed: int) -> None:
    weight, x = randn(2, rows, columns, seed=seed).double(), randn(2, tokens, columns, seed=seed + 1).double()
    approximation = mixed_order(weight, torch.zeros(2, columns, dtype=torch.bool), 3).matrix()
    used = used_directions(x.mT @ x, 1e-3).double()
    projector = torch.eye(columns) - used @ used.mT
    last = objective(weight, approximation, projector, *(torch.ones(2, n).double() for n in (rows, columns)), pull)
    for iterations in range(1, 6):
        scales = null_space_scales(weight, approximation, used, pull=pull, iterations=iterations)
        now = objective(weight, approximation, projector, *scales, pull)
        assert (now <= last + 1e-8).all()
        last = now


def test_null_space_scales_are_stationary() -> None:
    weight, x = randn(1, 5, 6, seed=0).double(), randn(1, 4, 6, seed=1).double()
    approximation, used = weight.sign() * 0.7, used_directions(x.mT @ x, 1e-3).double()
    projector = torch.eye(6) - used @ used.mT
    rows, columns = null_space_scales(weight, approximation, used, pull=0.2, iterations=500)
    rows.requires_grad_(True)
    columns.requires_grad_(True)
    objective(weight, approximation, projector, rows, columns, 0.2).sum().backward()
    assert rows.grad is not None and columns.grad is not None
    assert max(rows.grad.abs().max(), columns.grad.abs().max()) < 1e-6


def test_nothing_moves_where_every_direction_is_unused_or_the_pull_is_strong() -> None:
    weight = randn(2, 4, 5, seed=2)
    nothing, everything = torch.zeros(2, 5, 0), torch.eye(5).expand(2, 5, 5)
    for scales in (
        null_space_scales(weight, weight.sign(), nothing, pull=0.2, iterations=15),
        null_space_scales(weight, weight.sign(), everything, pull=1e9, iterations=15),
    ):
        for scale in scales:
            assert torch.allclose(scale, torch.ones_like(scale), atol=1e-5)
    zeros = null_space_scales(0 * weight, 0 * weight, everything, pull=0.0, iterations=3)
    assert all(torch.isfinite(scale).all() for scale in zeros)


def test_gain_gives_every_row_its_output_energy_back() -> None:
    weight, x = randn(2, 6, 9, seed=3), randn(2, 40, 9, seed=4)
    moments = x.mT @ x

    def energy(matrix: torch.Tensor) -> torch.Tensor:
        return (x @ matrix.mT).square().sum(1)

    planes = mixed_order(weight, torch.zeros(2, 9, dtype=torch.bool), 3)
    codes = round_to_nearest(weight, 1, 9)
    for quantized in (planes, codes):
        gained = quantized.scaled(row_gain(weight, quantized.matrix(), moments))
        assert not torch.allclose(energy(quantized.matrix()), energy(weight), rtol=0.05)
        assert torch.allclose(energy(gained.matrix()), energy(weight), rtol=1e-4)
        assert torch.allclose(energy(gained.pack().unpack()), energy(weight), rtol=5e-3)


def test_gain_leaves_rows_of_zeros_alone() -> None:
    assert torch.equal(row_gain(torch.ones(1, 2, 3), torch.zeros(1, 2, 3), torch.eye(3).unsqueeze(0)), torch.ones(1, 2))
