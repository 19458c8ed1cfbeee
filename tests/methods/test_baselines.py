"""The baselines against small implementations of their own, column by column and entry by entry, in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from tests.methods.test_methods import EXPERTS, INPUTS, OUT, TOKENS, WEIGHT, X, output_error, quantized, randn, statistics
from torch import Tensor

from moebius.errors import RecipeError
from moebius.formats.codebook import Codebook
from moebius.formats.integers import Integers
from moebius.formats.spectral import MAX_BITS, Spectral
from moebius.linalg.hessian import conditioned
from moebius.methods import METHODS, mxmoe
from moebius.quantize.codebook import nearest, quantize_vectors, quantize_weighted
from moebius.quantize.integers import round_to_nearest
from moebius.recipe import Recipe
from moebius.types import CalibrationNeeds, ProjectionStats

#: Hessians as they come, but for the least damping that there is.
BARE = {"shrinkage": 0.0, "damping": 0.0}
HESSIANS = conditioned(X.mT @ X, shrinkage=0.0, damping=0.0).double()


def one_after_the_other(weight: Tensor, hessian: Tensor, order: list[int], quantize: Callable[[int, Tensor], Tensor]) -> Tensor:
    """A column at a time, with the inverse of the Hessian itself, from which the columns that are done are eliminated."""
    weight, inverse = weight.double().clone(), torch.linalg.inv(hessian)
    done = torch.zeros_like(weight)
    for column in order:
        done[:, column] = quantize(column, weight[:, column])
        error = (weight[:, column] - done[:, column]) / inverse[column, column]
        weight -= error.unsqueeze(1) * inverse[column]
        inverse = inverse - inverse[:, [column]] @ inverse[[column]] / inverse[column, column]
    return done


@pytest.mark.parametrize("group_size", [0, 16])
def test_activation_order_rounds_large_inputs_first_with_the_levels_of_the_weights_as_they_came(group_size: int) -> None:
    packed = quantized(Recipe.make("gptq", 3, act_order=True, group_size=group_size, **BARE)).factor
    size = group_size or INPUTS
    assert isinstance(packed, Integers)
    got = packed.unpack()
    for expert in range(EXPERTS):
        groups = [WEIGHT[expert, :, start : start + size] for start in range(0, INPUTS, size)]
        low = torch.stack([group.amin(1).clamp_max(0) for group in groups], 1).double()
        high = torch.stack([group.amax(1).clamp_min(0) for group in groups], 1).double()
        scale = (high - low) / 7
        zero = (-low / scale).round()

        def nearest_level(column: int, values: Tensor, scale: Tensor = scale, zero: Tensor = zero) -> Tensor:
            s, z = scale[:, column // size], zero[:, column // size]
            return (((values / s).round() + z).clamp(0, 7) - z) * s

        order = HESSIANS[expert].diagonal().argsort(descending=True).tolist()
        wanted = one_after_the_other(WEIGHT[expert], HESSIANS[expert], order, nearest_level)
        assert torch.allclose(got[expert].double(), wanted, atol=2e-3 * float(high.max()))
    assert packed.stored_bits() == quantized(Recipe.make("gptq", 3, group_size=group_size)).stored_bits()


def test_activation_order_pays_where_few_inputs_are_large() -> None:
    x = X * torch.logspace(1.5, -1.5, INPUTS).flip(0)  # the largest inputs come last
    stats = ProjectionStats(torch.full((EXPERTS,), TOKENS), x.mean(1), x.mT @ x)
    error = {}
    for order in (True, False):
        packed = METHODS["gptq"].quantize(WEIGHT, stats, Recipe.make("gptq", 2, act_order=order), "gate_up")
        error[order] = (x @ (packed.unpack() - WEIGHT).mT).norm()
    assert error[True] < 0.9 * error[False]


@pytest.mark.parametrize("clip", [False, True])
def test_awq_finds_the_scales_that_err_least_on_the_tokens_themselves(clip: bool) -> None:
    x = X * torch.logspace(-0.5, 1, INPUTS)  # some channels matter more
    stats = ProjectionStats(torch.full((EXPERTS,), TOKENS), x.mean(1), x.mT @ x)
    packed = METHODS["awq"].quantize(WEIGHT, stats, Recipe.make("awq", 3, group_size=20, clip=clip, **BARE), "gate_up").factor
    assert isinstance(packed, Integers) and packed.column_scales is not None
    got = packed.unpack()
    for expert in range(EXPERTS):
        weight, tokens = WEIGHT[expert], x[expert]
        size = tokens.square().sum(0).sqrt()
        tried = {}
        for step in range(20):
            scale = size ** (step / 20)
            scale = scale / (scale.max() * scale.min()).sqrt()
            rounded = round_to_nearest((weight * scale).unsqueeze(0), 3, 20).matrix()[0] / scale
            tried[step] = (float(((rounded - weight) @ tokens.mT).norm()), scale)
        error, scale = min(tried.values(), key=lambda pair: pair[0])
        assert torch.allclose(packed.column_scales[expert].float(), 1 / scale, rtol=5e-3)
        mine = float(((got[expert] - weight) @ tokens.mT).norm())
        if not clip:
            assert mine == pytest.approx(error, rel=0.02)
            assert error < 0.97 * tried[0][0]  # of no scales at all
            continue
        clipped = weight * scale
        for start in (0, 20):
            group, seen = clipped[:, start : start + 20].clone(), tokens[:, start : start + 20] / scale[start : start + 20]
            for row in range(OUT):
                errors = []
                for step in range(10):
                    limit = float(group[row].abs().max()) * (1 - step / 20)
                    kept = group[row].clamp(-limit, limit)
                    rounded = round_to_nearest(kept.view(1, 1, -1), 3, 20).matrix().view(-1)
                    errors.append((float((seen @ (rounded - group[row])).norm()), kept))
                clipped[row, start : start + 20] = min(errors, key=lambda pair: pair[0])[1]
        wanted = round_to_nearest(clipped.unsqueeze(0), 3, 20).matrix()[0] / scale
        assert mine == pytest.approx(float(((wanted - weight) @ tokens.mT).norm()), rel=0.02)


def test_nowag_is_a_fixed_point_of_k_means_under_its_own_loss() -> None:
    packed = quantized(Recipe.make("nowag", 1, **BARE)).factor
    assert isinstance(packed, Codebook) and packed.codebooks is not None
    rows, columns = packed.row_scales, packed.column_scales
    assert rows is not None and columns is not None
    assert torch.allclose(columns.float(), WEIGHT.norm(dim=1), rtol=1e-2)
    normalized = WEIGHT / columns.float().unsqueeze(1) / rows.float().unsqueeze(2)
    assert torch.allclose((normalized / INPUTS**0.5).norm(dim=2), torch.ones(EXPERTS, OUT), rtol=1e-2)
    got = packed.unpack() / columns.float().unsqueeze(1) / rows.float().unsqueeze(2)
    importance = HESSIANS.diagonal(dim1=1, dim2=2).float().view(EXPERTS, 1, INPUTS // 4, 4)
    vectors, chosen = normalized.view(EXPERTS, OUT, -1, 4), got.view(EXPERTS, OUT, -1, 4)
    books = packed.codebooks.float()
    loss = lambda entries: (importance * (vectors - entries).square()).sum(3)  # noqa: E731
    every = torch.stack([loss(books[:, entry, None, None, :]) for entry in range(books.shape[1])], 3)
    assert torch.allclose(loss(chosen), every.amin(3), rtol=1e-3, atol=1e-3 * float(every.max()))
    # k-means is done where an iteration takes less than a thousandth off the loss: entries are means of their vectors, nearly.
    weights = importance.expand_as(vectors)
    total = 0.0
    for expert, entry in itertools.product(range(EXPERTS), range(books.shape[1])):
        mine = every[expert].argmin(2) == entry
        if mine.any():
            mean = (weights[expert][mine] * vectors[expert][mine]).sum(0) / weights[expert][mine].sum(0)
            total += float((weights[expert][mine] * (vectors[expert][mine] - mean).square()).sum())
    assert float(loss(chosen).sum()) < 1.01 * total


def test_weighted_vectors_are_nearest_by_brute_force_and_err_less_where_it_counts() -> None:
    vectors, books, weights = randn(2, 50, 4, seed=1), randn(2, 7, 4, seed=2), randn(2, 50, 4, seed=3).square()
    codes, distances = nearest(vectors, books, weights)
    every = (weights.unsqueeze(2) * (vectors.unsqueeze(2) - books.unsqueeze(1)).square()).sum(3)
    assert torch.equal(codes, every.argmin(2)) and torch.allclose(distances, every.amin(2), atol=1e-4)
    importance = torch.logspace(2, -2, INPUTS).expand(EXPERTS, -1)
    loss = [
        (importance.unsqueeze(1) * (packed.unpack() - WEIGHT).square()).sum()
        for packed in (
            quantize_weighted(WEIGHT, importance, bits=1, length=4, iterations=50),
            quantize_vectors(WEIGHT, None, bits=1, length=4, iterations=50),
        )
    ]
    assert loss[0] < 0.8 * loss[1]


@pytest.mark.parametrize("outputs", [24, 22])
def test_vptq_codes_columns_one_after_the_other(outputs: int) -> None:
    """With 22 outputs the last vector of a column reaches beyond its end."""
    weight, recipe = WEIGHT[:, :outputs].contiguous(), Recipe.make("vptq", 1, **BARE)
    packed = METHODS["vptq"].quantize(weight, statistics(recipe), recipe, "gate_up").factor
    assert isinstance(packed, Codebook) and packed.transposed and packed.codebooks is not None
    got, missing = packed.unpack(), -outputs % 4
    for expert in range(EXPERTS):
        book = packed.codebooks[expert].double()

        def entry(column: int, values: Tensor, book: Tensor = book) -> Tensor:
            pieces = torch.nn.functional.pad(values, (0, missing)).view(-1, 1, 4)
            return book[(pieces - book).square().sum(2).argmin(1)].flatten()[:outputs]

        wanted = one_after_the_other(weight[expert], HESSIANS[expert], list(range(INPUTS)), entry)
        same = (got[expert].double() - wanted).abs().amax(0) < 1e-3
        assert same.float().mean() > 0.9  # where two entries are as near, rounding decides, and what follows follows it
        errors = [float(((found - weight[expert].double()) @ X[expert].double().mT).norm()) for found in (got[expert], wanted)]
        assert errors[0] == pytest.approx(errors[1], rel=0.02)


def test_idre_and_bcos_plug_into_vptq() -> None:
    plain = quantized(Recipe.make("vptq", 1))
    both = quantized(Recipe.make("vptq", 1, idre=True, rank_share=0.1, bcos="mean_variance", **BARE))
    assert output_error(both) < output_error(plain)
    assert both.bias is not None
    got = X @ both.unpack().mT + both.bias.unpack()
    want = X @ WEIGHT.mT
    assert torch.allclose(got.mean(1), want.mean(1), atol=2e-2 * float(want.std()))
    assert torch.allclose(got.std(1), want.std(1), rtol=2e-2)


def test_moequant_is_gptq_on_other_hessians() -> None:
    needs = {
        (True, True): CalibrationNeeds(inputs=True, affinity=True, self_sampled=True),
        (True, False): CalibrationNeeds(inputs=True, affinity=True),
        (False, False): CalibrationNeeds(inputs=True),
    }
    for (affinity, sampling), want in needs.items():
        assert METHODS["moequant"].needs(Recipe.make("moequant", affinity=affinity, self_sampling=sampling)) == want
    mine, other = (quantized(Recipe.make(name, 2)).tensors() for name in ("moequant", "gptq"))
    assert all(torch.equal(mine[name], other[name]) for name in mine)


def test_mxmoe_spends_its_budget_as_an_exhaustive_search_would() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate_up": (2, 8, 24), "down": (1, 24, 4)}
    surveys = []
    for projection, shape in shapes.items():
        falling = torch.rand(shape[0], mxmoe._blocks(shape[1], projection), MAX_BITS, generator=generator, dtype=torch.float64)
        surveys.append({"shape": torch.tensor(shape), "costs": falling.cumsum(2).flip(2)})
    recipe = Recipe.make("mxmoe", 4.5, group_size=0)
    shares = mxmoe.allocate(surveys, recipe)
    # Records are two bytes of scale and the packed codes of a row; a matrix has four bits for the width of each row.
    sizes = [
        torch.tensor([rows * (2 + -(-columns * bits // 8)) for bits in range(1, 9)]) for rows, columns in ((4, 24), (24, 4))
    ]
    costs = [*surveys[0]["costs"].flatten(0, 1), *surveys[1]["costs"].flatten(0, 1)]
    taken = [*[sizes[0]] * 4, sizes[1]]
    budget = int(4.5 * 2 * 8 * 24 / 8) + int(4.5 * 24 * 4 / 8) - 2 * 4 - 12
    cost, size = (sum(np.ix_(*(part.numpy() for part in parts))) for parts in (costs, taken))
    best = float(np.where(size <= budget, cost, np.inf).min())
    chosen = torch.cat([share["widths"].flatten() for share in shares]) - 1
    assert sum(int(part[width]) for part, width in zip(taken, chosen.tolist(), strict=True)) <= budget
    got = sum(float(part[width]) for part, width in zip(costs, chosen.tolist(), strict=True))
    assert got == pytest.approx(best, rel=1e-4)


def test_mxmoe_gives_bits_to_blocks_that_the_loss_feels() -> None:
    recipe = Recipe.make("mxmoe", 3, group_size=0)
    stats = statistics(recipe)
    felt = torch.full((EXPERTS, OUT), 0.01)
    felt[1, OUT // 2 :] = 100.0  # the second half of the channels of one expert
    stats = ProjectionStats(stats.tokens, stats.mean, stats.second_moment, fisher_diagonal=felt * TOKENS)
    seen = mxmoe.survey(WEIGHT, stats, recipe, "gate_up")
    widths = mxmoe.allocate([seen], recipe)[0]["widths"]
    assert widths.shape == (EXPERTS, 2) and widths[1, 1] == widths.max() > widths[1, 0]
    packed = mxmoe.quantize(WEIGHT, stats, recipe, "gate_up").factor
    assert isinstance(packed, Spectral)
    assert packed.stored_bits() <= 3 * WEIGHT.numel()
    error = (X @ (packed.unpack() - WEIGHT).mT).square().sum(1)
    assert error[1, OUT // 2 :].mean() < 0.01 * error[1, : OUT // 2].mean()


def test_mxmoe_rows_of_different_widths_are_rounded_with_feedback() -> None:
    recipe = Recipe.make("mxmoe", 4, group_size=0, **BARE)
    widths = torch.tensor([[2, 5], [1, 3], [4, 4], [8, 2]])
    packed = mxmoe.quantize(WEIGHT, statistics(recipe), recipe, "gate_up", share={"widths": widths}).factor
    got = packed.unpack()
    for expert in range(EXPERTS):
        most = (2.0 ** widths[expert].repeat_interleave(OUT // 2) - 1).double()
        levels = got[expert].double()
        step = torch.stack([row.unique().diff().min() for row in levels])

        def nearest_level(column: int, values: Tensor, step: Tensor = step, most: Tensor = most) -> Tensor:
            return ((values / step + most / 2).round().clamp(min=0).minimum(most) - most / 2) * step

        wanted = one_after_the_other(WEIGHT[expert], HESSIANS[expert], list(range(INPUTS)), nearest_level)
        assert ((levels - wanted).abs() < 1e-3).float().mean() > 0.95


def test_mxmoe_says_before_the_work_that_a_budget_is_too_small() -> None:
    with pytest.raises(RecipeError, match=r"mxmoe: got 1\.25 bits, but 4 experts of 24 x 40 take"):
        METHODS["mxmoe"].plan((EXPERTS, OUT, INPUTS), Recipe.make("mxmoe", 1.25), "gate_up")
