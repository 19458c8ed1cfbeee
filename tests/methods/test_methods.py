"""Every method and every switch, on small random experts: plans match, bytes repeat, errors fall where they should."""

from __future__ import annotations

import itertools

import pytest
import torch

from moebius.formats import PackedProjection
from moebius.linalg.eigen import used_directions
from moebius.methods import METHODS, base
from moebius.methods.options import GLAS_GROUPS
from moebius.methods.router import plan_router, quantize_router
from moebius.quantize.binary import mixed_order
from moebius.recipe import Recipe
from moebius.types import PROJECTIONS, CalibrationNeeds, ProjectionStats

EXPERTS, OUT, INPUTS, TOKENS = 4, 24, 40, 200


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHT = 0.05 * randn(EXPERTS, OUT, INPUTS, seed=0)
X = randn(EXPERTS, TOKENS, INPUTS, seed=1) @ randn(INPUTS, INPUTS, seed=2)
DELTA = randn(EXPERTS, TOKENS, OUT, seed=3)


def statistics(recipe: Recipe, projection: str = "gate_up", unseen: tuple[int, ...] = ()) -> ProjectionStats:
    """What calibration would hand over, with ``unseen`` experts that no token reached."""
    x, delta = X.clone(), DELTA.clone()
    x[list(unseen)] = 0
    left = METHODS[recipe.method].left_factor(WEIGHT, recipe, projection)
    delta = delta if left is None else delta @ left
    groups, channels = recipe.value(GLAS_GROUPS), delta.shape[2]
    group = torch.arange(channels) * groups // channels
    weights = torch.stack([delta[:, :, group == g].square().mean(2) for g in range(groups)], dim=1)
    return ProjectionStats(
        tokens=torch.full((EXPERTS,), TOKENS),
        mean=x.mean(1),
        second_moment=x.mT @ x,
        weighted_moment=torch.einsum("egt,eta,etb->egab", weights, x, x),
    )


def quantized(recipe: Recipe, projection: str = "gate_up", unseen: tuple[int, ...] = ()) -> PackedProjection:
    return METHODS[recipe.method].quantize(WEIGHT, statistics(recipe, projection, unseen), recipe, projection)


def output_error(packed: PackedProjection) -> float:
    return ((X @ (packed.unpack() - WEIGHT).mT).norm() / (X @ WEIGHT.mT).norm()).item()


def recipes() -> list[Recipe]:
    switches = itertools.product([True, False], repeat=4)
    mobies = [
        Recipe.make("mobie", cejd=cejd, glas=glas, nges=nges, gain=gain, salient_fraction=0.2)
        for cejd, glas, nges, gain in switches
    ]
    return [
        *mobies,
        *(
            Recipe.make("mobie", side=side, shared_bits=bits)
            for side in ("output", "input", "hidden", "inner")
            for bits in (16, 8, 4)
        ),
        *(Recipe.make("mobie", side=side, rank=7, block_size=16) for side in ("output", "input")),
        Recipe.make("mobie", error_feedback=False),
        *(Recipe.make("mobie", null_space=whose, nges_relative=rel) for whose in ("layer", "expert") for rel in (True, False)),
        Recipe.make("mobie", salient_fraction=0.0),
        Recipe.make("mobie", glas_groups=4, salient_fraction=0.2),
        *(Recipe.make(name, bits, gain=gain) for name in ("rtn", "gptq") for bits in range(1, 9) for gain in (True, False)),
        *(Recipe.make(name, 2, group_size=size) for name in ("rtn", "gptq") for size in (0, 16)),
        *(
            Recipe.make(name, glas=glas, nges=nges, gain=gain, group_size=16)
            for name in ("billm", "arb")
            for glas, nges, gain in itertools.product([True, False], repeat=3)
        ),
        *(Recipe.make("gptvq", bits, error_feedback=feedback) for bits in (1, 1.5, 2) for feedback in (True, False)),
        *(Recipe.make("kbvq", bcos=mode) for mode in ("off", "mean", "variance", "mean_variance", "regression")),
        *(Recipe.make("kbvq", 1, idre=idre, klt=klt, rank_share=0.1) for idre in (True, False) for klt in (True, False)),
    ]


def label(recipe: Recipe) -> str:
    default = Recipe.make(recipe.method, recipe.bits).to_dict()
    changed = [f"{k}={v}" for k, v in recipe.to_dict().items() if default[k] != v]
    return ",".join([f"{recipe.method}-{recipe.bits:g}", *changed])


@pytest.mark.parametrize("recipe", recipes(), ids=label)
def test_plans_match_and_packed_experts_are_sound(recipe: Recipe) -> None:
    for projection in PROJECTIONS:
        packed, plan = quantized(recipe, projection), METHODS[recipe.method].plan((EXPERTS, OUT, INPUTS), recipe, projection)
        packed.check("layer")
        assert packed.shape == plan.shape == (EXPERTS, OUT, INPUTS)
        assert packed.spec() == plan.spec()
        assert packed.stored_bits() == plan.stored_bits()
        assert all(t.is_meta for t in plan.tensors().values())
        assert output_error(packed) < 1.0


@pytest.mark.parametrize("recipe", recipes()[::3], ids=label)
def test_the_same_input_gives_the_same_bytes(recipe: Recipe) -> None:
    first, second = quantized(recipe).tensors(), quantized(recipe).tensors()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", METHODS)
def test_experts_without_tokens_lean_on_their_layer(name: str) -> None:
    recipe = Recipe.make(name, 8 if name == "bitsmoe" else None, gain=True)  # on shapes this small a basis is most of it
    packed = quantized(recipe, unseen=(0, 2))
    packed.check("layer")
    error = (packed.unpack() - WEIGHT).norm(dim=(1, 2)) / WEIGHT.norm(dim=(1, 2))
    assert (error < 1.2).all()
    quantized(recipe, unseen=(0, 1, 2, 3)).check("layer")  # a layer that no token reached at all


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", METHODS)
def test_chunks_of_experts_change_nothing(name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe.make(name, 8 if name == "bitsmoe" else None, gain=True)  # on shapes this small a basis is most of it
    whole = quantized(recipe).unpack()
    monkeypatch.setattr(base, "_CHUNK_BYTES", 8 * INPUTS * INPUTS * size)
    assert torch.allclose(quantized(recipe).unpack(), whole, atol=1e-4)


def test_weights_in_half_precision_are_read() -> None:
    recipe = Recipe.make("mobie")
    packed = METHODS["mobie"].quantize(WEIGHT.bfloat16(), statistics(recipe), recipe, "gate_up")
    assert output_error(packed) < 1.0


def test_what_each_recipe_needs() -> None:
    inputs = CalibrationNeeds(inputs=True)
    needs = {
        ("rtn", "gain=false"): CalibrationNeeds(),
        ("rtn", "gain=true"): inputs,
        ("gptq", "gain=false"): inputs,
        ("mobie", "glas=true"): CalibrationNeeds(inputs=True, glas_groups=1),
        ("mobie", "glas=false"): inputs,
    }
    for (name, option), want in needs.items():
        key, value = option.split("=")
        assert METHODS[name].needs(Recipe.make(name, **{key: value})) == want
    recipe = Recipe.make("rtn", 2)
    METHODS["rtn"].quantize(WEIGHT, None, recipe, "down").check("layer")


def test_the_sides_of_the_shared_factor() -> None:
    parts = {
        (side, projection): set(quantized(Recipe.make("mobie", side=side), projection).parts())
        for side in ("output", "input", "hidden", "inner")
        for projection in PROJECTIONS
    }
    left, right = {"factor", "left"}, {"factor", "right"}
    assert parts == {
        ("output", "gate_up"): left,
        ("output", "down"): left,
        ("input", "gate_up"): right,
        ("input", "down"): right,
        ("hidden", "gate_up"): right,
        ("hidden", "down"): left,
        ("inner", "gate_up"): left,
        ("inner", "down"): right,
    }
    for (side, projection), names in parts.items():
        factor = METHODS["mobie"].left_factor(WEIGHT, Recipe.make("mobie", side=side), projection)
        assert (factor is not None) == ("left" in names)
    assert METHODS["mobie"].left_factor(WEIGHT, Recipe.make("mobie", cejd=False), "down") is None


def test_the_components_do_what_they_are_for() -> None:
    def error(**options: object) -> float:
        return output_error(quantized(Recipe.make("mobie", **{"nges": False, **options})))

    assert error() < 0.9 * error(error_feedback=False)
    assert error(salient_fraction=0.4) < error(salient_fraction=0.0)
    assert output_error(quantized(Recipe.make("gptq", 2))) < output_error(quantized(Recipe.make("rtn", 2)))


def test_gain_restores_the_energy_of_every_output() -> None:
    want = (X @ WEIGHT.mT).square().sum(1)
    exact = {"gain": True, "shrinkage": 0.0, "damping": 0.0}
    for recipe in (Recipe.make("mobie", cejd=False, **exact), Recipe.make("rtn", 1, **exact), Recipe.make("gptq", 2, **exact)):
        got = (X @ quantized(recipe).unpack().mT).square().sum(1)
        assert torch.allclose(got, want, rtol=1e-2)


def test_glas_chooses_columns_by_the_gradient() -> None:
    """Tokens that the loss feels use other inputs than the rest: GLAS must pick those, the local Hessian must not."""
    generator = torch.Generator().manual_seed(5)
    felt = torch.arange(INPUTS) < 8
    x = torch.randn(EXPERTS, TOKENS, INPUTS, generator=generator)
    x[:, :20, ~felt] *= 0.1
    x[:, 20:, felt] *= 0.1
    delta = torch.ones(EXPERTS, TOKENS)
    delta[:, 20:] = 0.01
    weighted = torch.einsum("et,eta,etb->eab", delta.square(), x, x).unsqueeze(1)
    stats = ProjectionStats(torch.full((EXPERTS,), TOKENS), x.mean(1), x.mT @ x, weighted)
    picked = {}
    for glas in (True, False):
        recipe = Recipe.make("mobie", glas=glas, cejd=False, salient_fraction=0.2)
        factor = METHODS["mobie"].quantize(WEIGHT, stats, recipe, "gate_up").factor
        plain = factor.unpack().abs() / factor.tensors()["row_scales"].float().unsqueeze(2)
        second = plain.std(1) > 1e-4 * plain.mean(1)  # a column of one plane has one magnitude
        picked[glas] = second[:, felt].float().mean().item()
    assert picked[True] == 1.0
    assert picked[False] < 0.5


def test_the_router_is_binarized_and_held_in_place() -> None:
    recipe = Recipe.make("mobie", router="binary", nges_iterations=100, nges_lambda=1e-6)
    weight, x = randn(8, 24, seed=7), randn(12, 24, seed=8)
    packed = quantize_router(weight, x.T @ x, recipe)
    packed.check("router")
    assert plan_router((8, 24), recipe).spec() == packed.spec()
    assert packed.stored_bits() == 8 * 24 + 16 * (8 + 24)
    # In the directions that inputs use, the scaled router errs less than the one without null-space scaling.
    used = used_directions((x.T @ x).unsqueeze(0), recipe.null_space_threshold)
    plain = mixed_order(weight.unsqueeze(0), torch.zeros(1, 24, dtype=torch.bool), recipe.alternations).matrix()
    assert ((packed.unpack() - weight) @ used).norm() < ((plain - weight) @ used).norm()
