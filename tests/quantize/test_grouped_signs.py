"""Magnitudes are split where the error is least, and alternating scales lower it further."""

from __future__ import annotations

import itertools

import torch

from moebius.quantize.grouped_signs import _zones, grouped_planes, split_magnitudes

G = torch.Generator().manual_seed(0)


def test_the_split_is_the_best_of_all() -> None:
    magnitudes = torch.rand(2, 3, 9, generator=G)
    counted = torch.ones(2, 9, dtype=torch.bool)
    counted[0, 4] = False
    upper = split_magnitudes(magnitudes, counted)
    for expert in range(2):
        for row in range(3):
            values = magnitudes[expert, row][counted[expert]]
            error = lambda group: ((group - group.mean()) ** 2).sum().item() if len(group) else 0.0  # noqa: E731
            ordered = values.sort().values
            best = min(error(ordered[:k]) + error(ordered[k:]) for k in range(len(ordered) + 1))
            mine = upper[expert, row][counted[expert]]
            assert abs(error(values[mine]) + error(values[~mine]) - best) < 1e-5
    assert not upper[0, :, 4].any()


def test_alternations_never_raise_the_error_of_the_groups() -> None:
    block, salient = torch.randn(2, 16, 40, generator=G).exp(), torch.zeros(2, 40, dtype=torch.bool)
    errors = []
    for alternations in range(6):
        small, large, _, _ = _zones(block, salient, alternations)
        errors.append(torch.minimum((block - small.matrix()).abs(), (block - large.matrix()).abs()).square().sum())
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.95 * errors[0]


def test_what_is_packed_is_what_was_quantized() -> None:
    weight = torch.randn(2, 12, 40, generator=G)
    salient = torch.zeros(2, 40, dtype=torch.bool)
    salient[:, :8] = True
    identity = torch.eye(40).expand(2, -1, -1)
    for alternations in (None, 5):
        planes = grouped_planes(weight, salient, identity, block=16, alternations=alternations)
        assert torch.allclose(planes.pack().unpack(), planes.matrix(), atol=5e-3)
        error = (planes.matrix() - weight).norm() / weight.norm()
        assert error < 0.45
        rows = torch.rand(2, 12, generator=G)
        assert torch.allclose(planes.scaled(rows).matrix(), rows.unsqueeze(2) * planes.matrix(), atol=1e-6)
