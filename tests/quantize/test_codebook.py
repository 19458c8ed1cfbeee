"""k-means never raises its error, and error feedback lowers that of the outputs."""

from __future__ import annotations

import itertools

import torch

from moebius.linalg.hessian import conditioned, feedback_factor
from moebius.quantize.codebook import nearest, quantize_vectors, seed_codebooks, train_codebooks

G = torch.Generator().manual_seed(0)
VECTORS = torch.randn(3, 900, 4, generator=G)


def test_an_iteration_never_raises_the_error() -> None:
    seeds = seed_codebooks(VECTORS, 32)
    trained, errors = train_codebooks(VECTORS, seeds, 100)
    assert len(errors) > 3
    for before, after in itertools.pairwise(errors):
        assert (after <= before * (1 + 1e-6)).all()
    assert (nearest(VECTORS, trained)[1].sum(1) < 0.95 * nearest(VECTORS, seeds)[1].sum(1)).all()


def test_seeds_are_vectors_and_differ() -> None:
    seeds = seed_codebooks(VECTORS, 32)
    assert nearest(seeds, VECTORS)[1].max() < 1e-4
    assert all(len(book.unique(dim=0)) == 32 for book in seeds)


def test_few_vectors_are_kept_exactly() -> None:
    weight = torch.randn(2, 3, 8, generator=G).half().float()
    packed = quantize_vectors(weight, None, bits=1, length=4, iterations=10)
    assert torch.equal(packed.unpack(), weight)


def test_nearest_is_nearest() -> None:
    books = torch.randn(3, 7, 4, generator=G)
    codes, distances = nearest(VECTORS, books)
    every = (VECTORS.unsqueeze(2) - books.unsqueeze(1)).square().sum(3)
    assert torch.equal(codes, every.argmin(2))
    assert torch.allclose(distances, every.amin(2), atol=1e-4)


def test_error_feedback_lowers_the_error_of_the_outputs() -> None:
    weight = torch.randn(2, 64, 30, generator=G)  # 30 columns: the last vector of a row reaches beyond its end
    x = torch.randn(2, 300, 30, generator=G) @ torch.randn(30, 30, generator=G)
    factor = feedback_factor(conditioned(x.mT @ x, shrinkage=0.0, damping=0.01))
    error = {
        name: (x @ (quantize_vectors(weight, f, bits=1.5, length=4, iterations=50).unpack() - weight).mT).norm()
        for name, f in (("plain", None), ("feedback", factor))
    }
    assert error["feedback"] < 0.9 * error["plain"]
