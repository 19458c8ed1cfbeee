from __future__ import annotations

import pytest
import torch

from moebius.linalg.eigen import descending_eigh, used_directions
from moebius.linalg.hessian import (
    conditioned,
    feedback_factor,
    feedback_weights,
    inverse_diagonal,
    layer_mean,
    solve_unit_upper,
    unit_upper,
)
from moebius.linalg.products import quadratic_forms, symmetric_product


def moments(experts: int, inputs: int, tokens: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(experts, tokens, inputs, generator=torch.Generator().manual_seed(seed))
    return x.mT @ x


def test_eigenvectors_rebuild_the_matrix_largest_first() -> None:
    gram = moments(2, 6, 20).double()
    values, vectors = descending_eigh(gram)
    assert torch.allclose(vectors * values.unsqueeze(-2) @ vectors.mT, gram)
    assert (values.diff(dim=-1) <= 0).all()
    peaks = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    assert (peaks > 0).all()


def test_the_null_space_holds_what_no_token_used() -> None:
    x = torch.randn(2, 4, 9)  # 4 tokens, 9 inputs: 5 directions unused
    x[1, 3] = 0  # and 6
    used = used_directions(x.mT @ x, 1e-6)
    assert used.shape == (2, 9, 4)
    there = used.norm(dim=1) > 0.5
    assert there.sum(1).tolist() == [4, 3]
    assert torch.allclose(used.mT @ used, torch.diag_embed(there.float()), atol=1e-5)
    assert torch.allclose((x @ used) @ used.mT, x, atol=1e-4)
    assert used_directions(torch.zeros(2, 3, 3), 1e-3).shape == (2, 3, 0)


def test_only_eigenvalues_above_the_threshold_count() -> None:
    vectors = torch.linalg.qr(torch.randn(6, 6)).Q
    moment = (vectors * torch.tensor([100.0, 50, 2, 0.9, 0.5, 0])) @ vectors.mT
    used = used_directions(moment.unsqueeze(0), 1e-2)[0]
    assert torch.allclose(used @ used.mT, vectors[:, :3] @ vectors[:, :3].mT, atol=1e-5)


def test_conditioned_hessians_lean_on_the_layer_and_are_damped() -> None:
    seen = moments(3, 5, 20)
    seen[1] = 0  # an expert without tokens
    got = conditioned(seen, shrinkage=0.5, damping=0.1)
    leaned = seen + 0.5 * seen.mean(0)
    want = leaned + 0.1 * torch.diag_embed(leaned.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).expand(-1, 5))
    assert torch.allclose(got, want)
    assert (torch.linalg.eigvalsh(got) > 0).all()
    assert torch.equal(conditioned(seen[1:], shrinkage=0.5, damping=0.1, layer=layer_mean(seen)), got[1:])


def test_conditioned_keeps_groups_apart() -> None:
    grouped = torch.stack([moments(3, 5, 20, 1), moments(3, 5, 20, 2)], dim=1)
    got = conditioned(grouped, shrinkage=0.1, damping=0.01)
    for group in range(2):
        assert torch.allclose(got[:, group], conditioned(grouped[:, group], shrinkage=0.1, damping=0.01))


def test_a_layer_without_tokens_gets_identities() -> None:
    assert torch.equal(conditioned(torch.zeros(2, 3, 3), shrinkage=0.1, damping=0.0), torch.eye(3).expand(2, 3, 3))
    assert torch.isfinite(feedback_factor(conditioned(moments(2, 9, 1), shrinkage=0.0, damping=0.0))).all()


def test_inverse_and_its_factor() -> None:
    hessians = conditioned(moments(2, 6, 20), shrinkage=0.1, damping=0.01)
    inverse = torch.linalg.inv(hessians)
    assert torch.allclose(inverse_diagonal(hessians), inverse.diagonal(dim1=1, dim2=2).float(), rtol=1e-4)
    factor = feedback_factor(hessians)
    assert torch.equal(factor, factor.triu())
    assert torch.allclose(factor.mT @ factor, inverse.float(), rtol=1e-4)
    weights = feedback_weights(hessians).double()
    assert torch.equal(weights, weights.triu()) and (weights.diagonal(dim1=1, dim2=2) == 1).all()
    back = torch.linalg.solve_triangular(weights, hessians, upper=True)  # D Vᵀ
    assert torch.allclose(back, back.tril(), atol=1e-4)
    upper, roots = unit_upper(hessians)
    wanted = torch.randn(2, 6, 3)
    assert torch.allclose(solve_unit_upper(upper, roots, wanted), inverse.float() @ wanted, rtol=1e-3, atol=1e-5)


def test_large_triangles_are_inverted_in_halves() -> None:
    hessians = conditioned(moments(2, 150, 300), shrinkage=0.1, damping=0.01)
    inverse, factor = torch.linalg.inv(hessians).float(), feedback_factor(hessians)
    assert torch.allclose(inverse_diagonal(hessians), inverse.diagonal(dim1=1, dim2=2), rtol=1e-3)
    assert (factor.mT @ factor - inverse).norm() < 1e-4 * inverse.norm()


@pytest.mark.parametrize("rank", [20, 700])
def test_few_directions_of_many_are_those_of_the_whole_decomposition(rank: int) -> None:
    generator = torch.Generator().manual_seed(3)
    vectors = torch.linalg.qr(torch.randn(700, 700, generator=generator)).Q
    spectrum = torch.cat([torch.linspace(1, 0.02, 40), 5e-3 / torch.arange(1, 661)])
    moment = (vectors[:, :rank] * spectrum[:rank]) @ vectors[:, :rank].mT
    used = used_directions(moment.unsqueeze(0), 1e-2)[0]
    wanted = vectors[:, : min(rank, 40)]
    assert used.shape == wanted.shape
    assert torch.allclose(used @ used.mT, wanted @ wanted.mT, atol=1e-3)


def test_many_directions_are_found_as_well() -> None:
    moment = torch.diag(torch.linspace(1, 0.5, 600))
    assert used_directions(moment.unsqueeze(0), 1e-2).shape == (1, 600, 600)
    assert used_directions(moment.unsqueeze(0), 0.8)[0].norm(dim=1).round().sum() == 240
    # A space that holds nothing but what is wanted cannot know that this is all.
    moment = torch.diag(torch.cat([torch.ones(200), torch.full((400,), 0.5)]))
    assert used_directions(moment.unsqueeze(0), 1e-2).shape == (1, 600, 600)


def test_what_was_never_seen_has_no_directions_at_any_size() -> None:
    assert used_directions(torch.zeros(1, 600, 600), 1e-2).shape == (1, 600, 0)


def test_directions_are_orthonormal_and_the_same_every_time() -> None:
    vectors = torch.linalg.qr(torch.randn(600, 600, generator=torch.Generator().manual_seed(4)).double()).Q
    moment = ((vectors * 0.9 ** torch.arange(600).double()) @ vectors.mT).float().unsqueeze(0)
    used = used_directions(moment, 1e-2)
    assert torch.allclose(used.mT @ used, torch.eye(used.shape[2]), atol=1e-4)
    assert torch.equal(used, used_directions(moment, 1e-2))


def test_products_from_half_of_the_work() -> None:
    matrix, rows = torch.randn(2, 600, 30).double(), torch.randn(2, 7, 600).double()
    gram = symmetric_product(matrix, matrix.mT)
    assert torch.allclose(gram, matrix @ matrix.mT)
    assert torch.allclose(quadratic_forms(rows, gram), (rows @ gram @ rows.mT).diagonal(dim1=1, dim2=2))


def test_hessians_that_float32_cannot_factor_are_factored_in_float64() -> None:
    hessian = torch.ones(1, 3, 3).double() + torch.diag(torch.tensor([1e-8, 2e-8, 3e-8]).double())
    assert torch.linalg.cholesky_ex(hessian.float()).info.item() != 0
    upper, roots = unit_upper(hessian)
    assert (roots > 0).all()
    assert torch.allclose((upper * roots.square().unsqueeze(1)) @ upper.mT, hessian.float(), rtol=1e-5)
    assert torch.allclose(inverse_diagonal(hessian).double(), torch.linalg.inv(hessian).diagonal(dim1=1, dim2=2), rtol=1e-2)
