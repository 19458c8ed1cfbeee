from __future__ import annotations

import torch

from moebius.quantize.saliency import column_saliency, salient_columns, salient_count


def test_one_group_per_channel_is_the_printed_formula() -> None:
    """Eq. 10 and 11 by brute force: a Hessian for each output channel, weighted by its own gradient."""
    generator = torch.Generator().manual_seed(0)
    tokens, rows, columns = 40, 5, 6
    weight = torch.randn(1, rows, columns, generator=generator).double()
    x = torch.randn(tokens, columns, generator=generator).double()
    gradient = torch.randn(tokens, rows, generator=generator).double()

    want = torch.zeros(rows, columns).double()
    for j in range(rows):
        hessian = torch.zeros(columns, columns).double()
        for i in range(tokens):
            hessian += gradient[i, j] ** 2 * torch.outer(x[i], x[i])
        inverse = torch.linalg.inv(hessian)
        for i in range(columns):
            want[j, i] = weight[0, j, i] ** 2 / inverse[i, i] ** 2

    grouped = torch.einsum("tj,ta,tb->jab", gradient.square(), x, x)  # S_g with as many groups as rows
    diagonals = torch.linalg.inv(grouped).diagonal(dim1=1, dim2=2).unsqueeze(0)
    assert torch.allclose(column_saliency(weight, diagonals)[0], want.mean(0))


def test_rows_share_the_hessian_of_their_group() -> None:
    weight, diagonals = torch.randn(2, 7, 4), torch.rand(2, 3, 4) + 0.1
    want = sum(weight[:, row].square() / diagonals[:, row * 3 // 7].square() for row in range(7)) / 7
    assert torch.allclose(column_saliency(weight, diagonals).float(), want)


def test_as_many_columns_are_salient_in_every_expert_and_they_are_the_top() -> None:
    saliency = torch.rand(5, 100)
    mask = salient_columns(saliency, 0.1)
    assert mask.sum(1).tolist() == [16] * 5  # 10 columns, up to whole bytes
    assert (saliency.masked_fill(~mask, 1).amin(1) > saliency.masked_fill(mask, 0).amax(1)).all()


def test_the_count_fills_whole_bytes() -> None:
    assert [salient_count(256, f) for f in (0.0, 0.001, 0.05, 1.0)] == [0, 0, 16, 256]
    assert salient_count(6, 0.5) == 6
    assert not salient_columns(torch.rand(2, 8), 0.0).any()


def test_ties_are_broken_the_same_way_each_time() -> None:
    mask = salient_columns(torch.ones(2, 32), 0.25)
    assert mask[:, :8].all()
    assert not mask[:, 8:].any()
