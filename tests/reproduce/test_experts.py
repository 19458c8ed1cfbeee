"""Similarity of experts, of their outputs, spectra, and what happens inside a packed model, beside their definitions."""

from __future__ import annotations

import pytest
import torch
from tests.tiny import tiny_model
from torch import Generator, Tensor

from moebius.evaluate.routing import recorded_decisions
from moebius.models.load import describe
from moebius.reproduce import hidden
from moebius.reproduce.allocation import spread_of
from moebius.reproduce.experts import centered_kernel_alignment, energy_captured, output_similarity
from moebius.reproduce.hidden import choices_kept


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=Generator().manual_seed(seed), dtype=torch.float64)


def test_cka_is_that_of_its_definition() -> None:
    matrices = random(3, 10, 7)
    centring = torch.eye(10, dtype=torch.float64) - 1 / 10

    def hsic(x: Tensor, y: Tensor) -> Tensor:
        return (x @ x.mT @ centring @ y @ y.mT @ centring).trace()

    expected = [[hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt() for y in matrices] for x in matrices]
    torch.testing.assert_close(centered_kernel_alignment(matrices), torch.tensor(expected, dtype=torch.float64))


def test_cka_is_one_for_rotations_and_scales_of_one_matrix() -> None:
    matrix, (rotation, _) = random(12, 6), torch.linalg.qr(random(6, 6, seed=1))
    alike = centered_kernel_alignment(torch.stack([matrix, 3 * matrix @ rotation, random(12, 6, seed=2)]))
    assert alike[0, 1] == pytest.approx(1)
    assert alike[0, 2] < 0.9


def test_output_similarity_is_that_of_the_outputs() -> None:
    matrices, inputs = random(3, 5, 8), random(40, 8, seed=1) * torch.arange(1, 9)
    outputs = (matrices @ inputs.mT).flatten(1)
    expected = torch.nn.functional.cosine_similarity(outputs.unsqueeze(1), outputs.unsqueeze(0), dim=2)
    torch.testing.assert_close(output_similarity(matrices, inputs.mT @ inputs), expected, rtol=1e-6, atol=1e-6)


def test_energy_captured_is_that_of_the_stacked_outputs() -> None:
    weight, inputs = random(4, 6, 8), random(50, 8, seed=1) * torch.arange(1, 9)
    captured = energy_captured(weight, inputs.mT @ inputs)
    assert captured[-1] == pytest.approx(1)
    values = torch.linalg.svdvals(torch.cat(list(weight)) @ torch.linalg.cholesky(inputs.mT @ inputs)).square()
    torch.testing.assert_close(captured, values.cumsum(0) / values.sum(), rtol=1e-6, atol=1e-9)


def test_choices_are_kept_whatever_their_order() -> None:
    original = torch.tensor([[0, 1], [2, 3], [4, 5]])
    assert choices_kept(original, torch.tensor([[1, 0], [2, 9], [8, 9]])) == pytest.approx(3 / 6)
    assert choices_kept(original, original.flip(1)) == 1


def test_decisions_are_what_the_experts_are_handed() -> None:
    model = tiny_model("olmoe")
    names = [layer.name for layer in describe(model).moe_layers]
    ids = torch.arange(12).view(1, 12)
    with torch.inference_mode(), recorded_decisions(model, names) as decisions:
        model(input_ids=ids, use_cache=False)
    for name in names:
        index, weights = decisions[name]
        assert index.shape == weights.shape == (12, 2)
        assert int(index.max()) < 8
    assert not model.get_submodule(names[0])._forward_pre_hooks


def test_moments_are_those_of_the_experts_output() -> None:
    model = tiny_model("olmoe")
    name = describe(model).moe_layers[1].name
    windows = torch.randint(0, 256, (3, 16), generator=Generator().manual_seed(0))
    rows = []
    handle = model.get_submodule(name).register_forward_hook(lambda _, __, output: rows.append(output.flatten(0, -2)))
    with torch.inference_mode():
        mean, variance = hidden._moments(model, name, windows)
    handle.remove()
    everything = torch.cat(rows).double()
    torch.testing.assert_close(mean, everything.mean(0))
    torch.testing.assert_close(variance, everything.var(0, unbiased=False))


def test_spread_is_a_share_of_the_mean() -> None:
    values = random(200, 3).square() + 1
    expected = values.numpy().std(axis=0, ddof=1) / values.numpy().mean(axis=0)
    torch.testing.assert_close(spread_of(values, "cv"), torch.from_numpy(expected))
    torch.testing.assert_close(spread_of(values, "rmcse"), torch.from_numpy(expected / 200**0.5))
