"""BCOS: on the calibration data mean and variance of every output channel are those of the original."""

from __future__ import annotations

import pytest
import torch

from moebius.correct.bias import channel_correction, input_moments, layer_average
from moebius.types import ProjectionStats

G = torch.Generator().manual_seed(0)
X = torch.randn(3, 400, 10, generator=G) @ torch.randn(10, 10, generator=G) + torch.randn(3, 1, 10, generator=G)
WEIGHT = torch.randn(3, 6, 10, generator=G)
ROUGH = 0.7 * WEIGHT + 0.3 * torch.randn(3, 6, 10, generator=G)


def corrected(mode: str) -> torch.Tensor:
    stats = ProjectionStats(torch.full((3,), 400), X.mean(1), X.mT @ X)
    inputs = input_moments(stats, slice(None), layer_average(stats), shrinkage=0.0)
    scale, bias = channel_correction(WEIGHT, ROUGH, inputs, mode)
    return (X @ ROUGH.mT) * scale.unsqueeze(1) + bias.unsqueeze(1)


@pytest.mark.parametrize("mode", ["mean", "variance", "mean_variance", "regression"])
def test_moments_are_restored(mode: str) -> None:
    wanted, got = X @ WEIGHT.mT, corrected(mode)
    assert torch.allclose(got.mean(1), wanted.mean(1), atol=1e-3) == (mode != "variance")
    assert torch.allclose(got.var(1), wanted.var(1), rtol=1e-3) == (mode in ("variance", "mean_variance"))


def test_regression_has_the_least_squared_error() -> None:
    wanted = X @ WEIGHT.mT
    errors = {mode: (corrected(mode) - wanted).square().mean() for mode in ("mean", "mean_variance", "regression")}
    assert errors["regression"] < errors["mean"]
    assert errors["regression"] < errors["mean_variance"]


def test_an_unseen_expert_takes_the_moments_of_its_layer() -> None:
    x = X.clone()
    tokens = torch.tensor([400, 0, 400])
    mean, moment = x.mean(1), x.mT @ x
    mean[1], moment[1] = 0, 0
    stats = ProjectionStats(tokens, mean, moment)
    inputs = input_moments(stats, slice(1, 2), layer_average(stats), shrinkage=0.03)
    pooled = torch.cat([x[0], x[2]])
    assert torch.allclose(inputs.mean[0], pooled.mean(0), atol=1e-4)
    assert torch.allclose(inputs.covariance[0], pooled.T.cov(correction=0), rtol=1e-2, atol=1e-2)
