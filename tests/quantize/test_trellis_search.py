"""The search for trellis codes: near the theory, the same with and without the compiled search, errors fed back."""

from __future__ import annotations

import itertools

import pytest
import torch

from moebius import native
from moebius.formats.projection import PackedProjection
from moebius.formats.trellis import DISTORTION, levels_of
from moebius.quantize import trellis
from moebius.quantize.trainable import TrainableCodes, trainable
from moebius.quantize.trellis import best_codes, quantize_columns, share_rates


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rate", [1, 2, 3, 4])
def test_distortion_is_that_which_budgets_reckon_with(rate: int) -> None:
    values = gaussian(40, 512)
    _, levels = best_codes(values, torch.ones_like(values), torch.full((40,), rate))
    error = float((values - levels).square().mean())
    assert 4.0**-rate < error == pytest.approx(DISTORTION[rate], rel=0.06)


@pytest.mark.parametrize("rate", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [3, 40])
def test_without_the_compiled_search_codes_are_as_good(rate: int, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values, scales, rates = gaussian(6, length), gaussian(6, length, seed=1).abs() + 0.5, torch.full((6,), rate)
    _, compiled = best_codes(values, scales, rates)
    monkeypatch.setattr(native, "_extension", None)
    monkeypatch.setattr(native, "_MISSING", "nothing was compiled", raising=False)
    _, plain = best_codes(values, scales, rates)
    errors = [float((values - levels * scales).square().sum()) for levels in (compiled, plain)]
    assert errors[1] == pytest.approx(errors[0], rel=0.1)


def test_short_sequences_get_the_best_of_all_codes() -> None:
    values = gaussian(3, 6)
    _, found = best_codes(values, torch.ones_like(values), torch.ones(3, dtype=torch.int64))
    every = levels_of(torch.tensor(list(itertools.product((0, 1), repeat=6))), 1)
    least = (values.unsqueeze(1) - every).square().sum(2).amin(1)
    torch.testing.assert_close((values - found).square().sum(1), least)


def quantized() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, trellis.TrellisCodes]:
    weight, inputs = gaussian(2, 48, 24), gaussian(2, 200, 24, seed=1) @ gaussian(24, 24, seed=2)
    moments = inputs.mT @ inputs
    rates = torch.tensor([[1, 2, 3] * 8, [2, 0, 4] * 8])
    return weight, moments, rates, quantize_columns(weight, moments, rates, sweeps=1, block_size=8)


def test_errors_are_fed_back() -> None:
    weight, moments, rates, found = quantized()
    diagonal = torch.diag_embed(moments.diagonal(dim1=1, dim2=2))
    alone = quantize_columns(weight, diagonal, rates, sweeps=0, block_size=8)
    losses = [
        float(((weight - f.values()) @ moments @ (weight - f.values()).mT).diagonal(dim1=1, dim2=2).sum())
        for f in (found, alone)
    ]
    assert losses[0] < 0.6 * losses[1]


def test_what_is_packed_is_what_was_quantized() -> None:
    _, _, rates, found = quantized()
    packed = found.packed()
    torch.testing.assert_close(packed.unpack(), found.values())
    assert torch.equal(packed.each_rate(), rates)
    assert all(
        torch.equal(a, b) for a, b in zip(packed.tensors().values(), quantized()[3].packed().tensors().values(), strict=True)
    )


def test_training_changes_scales_alone_and_no_byte_of_size() -> None:
    packed = quantized()[3].packed()
    student = trainable(PackedProjection(packed))
    assert isinstance(student, TrainableCodes)
    with torch.no_grad():
        student.log_entries += 0.5
    again = student.packed().factor
    assert again.stored_bits() == packed.stored_bits()
    torch.testing.assert_close(again.unpack(), packed.unpack() * torch.tensor(0.5).exp(), rtol=0.02, atol=1e-6)
    columns, rows = student.scales()
    (columns.sum() + rows.sum()).backward()
    assert student.log_directions.grad is not None and bool((student.log_entries.grad > 0).all())


def test_bits_go_where_they_save_most_and_fit_the_budget() -> None:
    values = [torch.tensor([[100.0, 1.0, 0.0001]]), torch.tensor([[10.0, 10.0]])]
    rates = share_rates(values, [4, 4], 4 * 7)
    assert sum(int(r.sum()) for r in rates) == 7
    assert rates[0].tolist()[0] == sorted(rates[0].tolist()[0], reverse=True) and int(rates[0][0, 2]) == 0
