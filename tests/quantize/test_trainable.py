"""Trainable planes: what a loss sees is what is stored, in as many bytes, and gradients pass through the codes."""

from __future__ import annotations

import pytest
import torch

from moebius.formats.projection import PackedProjection
from moebius.methods import METHODS
from moebius.quantize.trainable import TrainableProjection
from moebius.recipe import Recipe
from moebius.types import ProjectionStats

EXPERTS, OUTPUTS, INPUTS = 4, 20, 24


WEIGHT = torch.randn(EXPERTS, OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(3))


def packed(projection: str, bits: float = 2.5) -> PackedProjection:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(EXPERTS, OUTPUTS, INPUTS, generator=generator)
    x = torch.randn(EXPERTS, 80, INPUTS, generator=generator)
    stats = ProjectionStats(torch.full((EXPERTS,), 80), x.mean(1), x.mT @ x)
    return METHODS["moebius"].quantize(weight, stats, Recipe.make("moebius", bits), projection)


def matrices(trainable: TrainableProjection) -> torch.Tensor:
    """(experts, out, in) from the parts, as a forward puts them together."""
    directions, entries = trainable.scales()
    if trainable.before_factor:
        return (trainable.levels * directions.unsqueeze(1) * entries.unsqueeze(2)) @ trainable.basis()
    return trainable.basis().mT @ (trainable.levels * directions.unsqueeze(2) * entries.unsqueeze(1))


@pytest.mark.parametrize("projection", ["gate_up", "down"])
def test_what_was_trained_is_what_is_stored(projection: str) -> None:
    before = packed(projection)
    trainable = TrainableProjection(before)
    with torch.no_grad():
        for seed, parameter in enumerate(trainable.parameters()):
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    after = trainable.packed()
    assert torch.allclose(after.unpack(), matrices(trainable), atol=1e-4)
    assert (after.unpack() - before.unpack()).norm() > 0.1 * before.unpack().norm()
    assert after.spec() == before.spec() and after.stored_bits() == before.stored_bits()
    after.check("here")


@pytest.mark.parametrize("projection", ["gate_up", "down"])
def test_untrained_it_stays_within_a_step_of_the_scales(projection: str) -> None:
    before = packed(projection)
    after = TrainableProjection(before).packed()
    assert (after.unpack() - before.unpack()).norm() < 0.05 * before.unpack().norm()


@pytest.mark.parametrize("projection", ["gate_up", "down"])
def test_gradients_pass_straight_through_the_codes(projection: str) -> None:
    """A matrix is linear in its basis, in its direction scales and in its entry scales: Euler's theorem for each."""
    trainable = TrainableProjection(packed(projection))
    probe = torch.randn(EXPERTS, OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(9))
    (matrices(trainable) * probe).sum().backward()
    for parameter in (trainable.log_directions, trainable.log_entries):
        assert parameter.grad is not None
        got = parameter.grad.sum()
        assert torch.allclose(got, (matrices(trainable) * probe).sum(), rtol=1e-3)
    assert trainable.directions.grad is not None
    inner = (trainable.directions.grad * trainable.basis()).sum()
    assert torch.allclose(inner, (matrices(trainable) * probe).sum(), rtol=1e-3)


@pytest.mark.parametrize("bits", [1.0, 2.5])
@pytest.mark.parametrize("projection", ["gate_up", "down"])
def test_signs_begin_where_they_are_stored(projection: str, bits: float) -> None:
    before = packed(projection, bits)
    again = TrainableProjection(before, WEIGHT).packed()
    assert torch.equal(again.factor.tensors()["signs"], before.factor.tensors()["signs"])


@pytest.mark.parametrize("projection", ["gate_up", "down"])
def test_signs_that_were_trained_are_what_is_stored(projection: str) -> None:
    before = packed(projection)
    trainable = TrainableProjection(before, WEIGHT)
    assert trainable.values is not None
    with torch.no_grad():
        trainable.values += torch.randn(trainable.values.shape, generator=torch.Generator().manual_seed(5))
    after = trainable.packed()
    assert torch.allclose(after.unpack(), matrices(trainable), atol=1e-4)
    assert after.stored_bits() == before.stored_bits() and after.spec() == before.spec()
    different = after.factor.tensors()["signs"] != before.factor.tensors()["signs"]
    assert 0.1 < different.float().mean() < 1
    after.check("here")


@pytest.mark.parametrize("projection", ["gate_up", "down"])
def test_gradients_reach_what_signs_are_of(projection: str) -> None:
    trainable = TrainableProjection(packed(projection), WEIGHT)
    assert trainable.values is not None
    probe = torch.randn(EXPERTS, OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(9))
    (matrices(trainable) * probe).sum().backward()
    assert trainable.values.grad is not None
    levels = trainable.levels.mT if trainable.before_factor else trainable.levels
    inner = (trainable.values.grad * levels).sum()  # a matrix is linear in its levels: Euler's theorem
    assert torch.allclose(inner, (matrices(trainable) * probe).sum(), rtol=1e-3)
