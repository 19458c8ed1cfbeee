from __future__ import annotations

import torch

from moebius.linalg.eigen import descending_eigh, null_space_projector
from moebius.linalg.hessian import conditioned, feedback_factor, inverse_diagonal, layer_mean


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
    projector = null_space_projector(x.mT @ x, 1e-6)
    assert torch.allclose(projector @ projector, projector, atol=1e-5)
    assert torch.allclose(projector.diagonal(dim1=1, dim2=2).sum(1), torch.tensor([5.0, 5.0]), atol=1e-4)
    assert (x @ projector).abs().max() < 1e-5
    assert torch.allclose(null_space_projector(torch.zeros(3, 3), 1e-3), torch.eye(3))


def test_conditioned_hessians_lean_on_the_layer_and_are_damped() -> None:
    seen = moments(3, 5, 20)
    seen[1] = 0  # an expert without tokens
    got = conditioned(seen, lean=0.5, damping=0.1)
    leaned = seen.double() + 0.5 * seen.double().mean(0)
    want = leaned + 0.1 * torch.diag_embed(leaned.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).expand(-1, 5))
    assert torch.allclose(got, want)
    assert (torch.linalg.eigvalsh(got) > 0).all()
    assert torch.equal(conditioned(seen[1:], lean=0.5, damping=0.1, layer=layer_mean(seen)), got[1:])


def test_conditioned_keeps_groups_apart() -> None:
    grouped = torch.stack([moments(3, 5, 20, 1), moments(3, 5, 20, 2)], dim=1)
    got = conditioned(grouped, lean=0.1, damping=0.01)
    for group in range(2):
        assert torch.allclose(got[:, group], conditioned(grouped[:, group], lean=0.1, damping=0.01))


def test_a_layer_without_tokens_gets_identities() -> None:
    assert torch.equal(conditioned(torch.zeros(2, 3, 3), lean=0.1, damping=0.0), torch.eye(3).double().expand(2, 3, 3))
    assert torch.isfinite(feedback_factor(conditioned(moments(2, 9, 1), lean=0.0, damping=0.0))).all()


def test_inverse_and_its_factor() -> None:
    hessians = conditioned(moments(2, 6, 20), lean=0.1, damping=0.01)
    inverse = torch.linalg.inv(hessians)
    assert torch.allclose(inverse_diagonal(hessians), inverse.diagonal(dim1=1, dim2=2))
    factor = feedback_factor(hessians)
    assert torch.equal(factor, factor.triu())
    assert torch.allclose(factor.mT @ factor, inverse.float(), rtol=1e-4)
