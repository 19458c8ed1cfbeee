"""Bias-corrected output stabilization (BCOS, KBVQ-MoE Sec. 4.2): a scale and a bias for every output channel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.linalg.hessian import layer_mean
from moebius.types import ProjectionStats

#: What is corrected: nothing, one of the two moments, both (Eq. 24), or the regression that least squares ask for (Eq. 21).
MODES = ("off", "mean", "variance", "mean_variance", "regression")


@dataclass(frozen=True)
class InputMoments:
    """Mean and covariance of what each expert takes in.

    Attributes:
        mean: (experts, in).
        covariance: (experts, in, in).
    """

    mean: Tensor
    covariance: Tensor


def input_moments(stats: ProjectionStats, chunk: slice, average: tuple[Tensor, ...], *, shrinkage: float) -> InputMoments:
    """Moments of each expert's inputs, as if ``shrinkage`` times the average expert of the layer had been seen on top.

    Args:
        stats: of the whole layer.
        chunk: which experts.
        average: :func:`layer_average` of the same.
        shrinkage: ρ.

    Returns:
        float32; zeros where the layer saw no token.
    """
    count, total, moment = average
    tokens, mean = stats.tokens[chunk].double(), stats.mean[chunk].double()
    seen = (tokens + shrinkage * count).clamp_min(torch.finfo(torch.float64).tiny)
    mean = (tokens.unsqueeze(1) * mean + shrinkage * total) / seen.unsqueeze(1)
    second = (stats.second_moment[chunk].double() + shrinkage * moment) / seen[:, None, None]
    return InputMoments(mean.float(), (second - mean.unsqueeze(2) * mean.unsqueeze(1)).float())


def layer_average(stats: ProjectionStats) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, sum of inputs and sum of outer products of the average expert: (), (in,) and (in, in), float64."""
    tokens = stats.tokens.double()
    return tokens.mean(), (tokens.unsqueeze(1) * stats.mean.double()).mean(0), layer_mean(stats.second_moment)


def channel_correction(weight: Tensor, approximation: Tensor, inputs: InputMoments, mode: str) -> tuple[Tensor, Tensor]:
    """``1 + s`` and ``b`` such that ``(1 + s) Ŵ x + b`` has the mean and the variance of ``W x``, channel by channel.

    Args:
        weight: ``W`` (experts, out, in).
        approximation: ``Ŵ``, of the same shape.
        inputs: of the same experts.
        mode: one of :data:`MODES` but ``"off"``. ``"regression"`` has the slope ``Cov(y, ŷ) / Var(ŷ)`` instead.

    Returns:
        (experts, out) each; ones where ``ŷ`` does not vary, and where only the mean is corrected; zeros where it is not.
    """
    spread = approximation @ inputs.covariance
    got = (spread * approximation).sum(2)
    if mode == "mean":
        scale = torch.ones_like(got)
    else:
        regression = mode == "regression"
        wanted = (spread * weight).sum(2) if regression else ((weight @ inputs.covariance) * weight).sum(2)
        ratio = torch.where(got > 0, wanted / got, 1)
        scale = ratio if regression else ratio.clamp_min(0).sqrt()
    means = (inputs.mean.unsqueeze(1) @ torch.cat([weight, scale.unsqueeze(2) * approximation], 1).mT).squeeze(1)
    wanted_mean, got_mean = means.chunk(2, dim=1)
    return scale, torch.zeros_like(scale) if mode == "variance" else wanted_mean - got_mean
