"""Vector quantization by k-means: seeding, Lloyd's iterations, and assignment with error feedback (GPTVQ, KBVQ-MoE, VPTQ)."""

from __future__ import annotations

import torch
from torch import Tensor

from moebius.formats.codebook import Codebook
from moebius.quantize.feedback import columns_with_feedback

_SEEDING_VECTORS = 1 << 14  # k-means++ walks over its vectors once per entry: more than this is not worth the time
_TRAINING_VECTORS = 64  # per entry: twice as many take twice as long and lower the error by 3 %
_SCORES = 1 << 26  # distances held at a time: 256 MiB
_BLOCK_SIZE = 128  # columns whose errors are gathered before they are pushed further
_ENOUGH = 1e-3  # k-means stops for an expert once an iteration takes less than this share off its error


def code_bits(bits: float, length: int) -> int:
    """Bits of a code for ``length`` columns at so many bits per weight."""
    return round(bits * length)


def quantize_vectors(
    weight: Tensor, cholesky: Tensor | None, *, bits: float, length: int, iterations: int, seed: int = 0
) -> Codebook:
    """Train a codebook for each expert on its own vectors and give each vector a code.

    Args:
        weight: (experts, rows, columns) float32.
        cholesky: upper Cholesky factor of the inverse Hessian (experts, columns, columns): each group of ``length`` columns is
            coded in the metric of the Hessian and its error pushed into the columns after it. None: to the nearest entry.
        bits: per weight; ``2 ** (bits · length)`` entries.
        length: columns per vector.
        iterations: of k-means, at most.
        seed: of the seeding; every expert draws the same numbers, so that it does not matter which experts come along.
    """
    experts, rows, columns = weight.shape
    short = -columns % length
    padded = torch.nn.functional.pad(weight, (0, short)).contiguous()  # some models keep their matrices transposed
    vectors = padded.view(experts, -1, length)
    entries = 2 ** code_bits(bits, length)
    seeds = seed_codebooks(_some(vectors, _SEEDING_VECTORS), entries, seed)
    codebooks = train_codebooks(_some(vectors, _TRAINING_VECTORS * entries), seeds, iterations)[0].half().float()
    if cholesky is None:
        codes = nearest(vectors, codebooks)[0].view(experts, rows, -1)
    else:
        codes = _codes_with_feedback(padded, _padded_cholesky(cholesky, short), codebooks)
    return Codebook.pack(codes, codebooks, columns)


def quantize_weighted(
    weight: Tensor, importance: Tensor, *, bits: float, length: int, iterations: int, seed: int = 0
) -> Codebook:
    """Train a codebook for each expert on its own vectors, and give each the code that is best for it, by weighted errors.

    Args:
        weight: (experts, rows, columns) float32.
        importance: what squared errors in each column count. (experts, columns)
        bits, length, iterations, seed: as for :func:`quantize_vectors`.
    """
    experts, rows, columns = weight.shape
    short = -columns % length
    vectors = torch.nn.functional.pad(weight, (0, short)).reshape(experts, -1, length)
    weights = torch.nn.functional.pad(importance, (0, short)).reshape(experts, 1, -1, length)
    weights = weights.expand(-1, rows, -1, -1).reshape(experts, -1, length)
    books = _weighted_books(vectors, weights, bits, iterations, seed)
    return Codebook.pack(nearest(vectors, books, weights)[0].view(experts, rows, -1), books, columns)


def quantize_columns(
    weight: Tensor, importance: Tensor, factor: Tensor, *, bits: float, length: int, iterations: int, seed: int = 0
) -> Codebook:
    """Vectors along the columns, coded column after column, each error pushed into the columns after it (VPTQ, Algorithm 1).

    All of a vector meets one input: how much its error counts is one number, the entry nearest to it is the best one, and
    what the columns after it make up for is GPTQ's.

    Args:
        weight: (experts, rows, columns) float32.
        importance: what squared errors in each column count while the codebooks are trained. (experts, columns)
        factor: see :func:`moebius.quantize.feedback.columns_with_feedback`.
        bits, length, iterations, seed: as for :func:`quantize_vectors`.
    """
    experts, rows, columns = weight.shape
    short = -rows % length
    vectors = torch.nn.functional.pad(weight.mT, (0, short)).reshape(experts, -1, length)
    weights = importance.repeat_interleave(vectors.shape[1] // columns, 1).unsqueeze(2).expand_as(vectors)
    books = _weighted_books(vectors, weights, bits, iterations, seed)
    codes = torch.empty(experts, columns, vectors.shape[1] // columns, dtype=torch.int64, device=weight.device)

    def code(column: int, values: Tensor) -> Tensor:
        pieces = torch.nn.functional.pad(values, (0, short)).view(experts, -1, length)
        codes[:, column] = chosen = nearest(pieces, books)[0]
        return books.gather(1, chosen.unsqueeze(2).expand(-1, -1, length)).flatten(1)[:, :rows]

    columns_with_feedback(weight.clone(), factor, _BLOCK_SIZE, code)
    return Codebook.pack(codes, books, rows, transposed=True)


def _weighted_books(vectors: Tensor, weights: Tensor, bits: float, iterations: int, seed: int) -> Tensor:
    """Codebooks (experts, entries, length) as they are stored, trained on vectors drawn by seed."""
    entries = 2 ** code_bits(bits, vectors.shape[2])
    # Not every so many of them: that could be the same columns of all rows.
    order = torch.randperm(vectors.shape[1], generator=torch.Generator().manual_seed(seed)).to(vectors.device)
    seeds = seed_codebooks(vectors[:, order[:_SEEDING_VECTORS]], entries, seed)
    some = order[: _TRAINING_VECTORS * entries].sort().values
    return train_codebooks(vectors[:, some], seeds, iterations, weights[:, some])[0].half().float()


def seed_codebooks(vectors: Tensor, entries: int, seed: int = 0) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii, 2007): each entry is a vector, drawn in proportion to its distance from the others.

    Args:
        vectors: (experts, count, length).
        entries: of each codebook.
        seed: of the draws, which are the same for every expert.

    Returns:
        (experts, entries, length).
    """
    draws = torch.rand(entries, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    count, every = vectors.shape[1], torch.arange(len(vectors), device=vectors.device)
    chosen = vectors.new_empty(len(vectors), entries, vectors.shape[2])
    distances = torch.ones_like(vectors[:, :, 0])
    for entry, draw in enumerate(draws):
        reach = distances.double().cumsum(1)
        place = torch.searchsorted(reach, draw * reach[:, -1:], right=True).squeeze(1).clamp(max=count - 1)
        chosen[:, entry] = vectors[every, place]
        distance = (vectors - chosen[:, entry, None]).square().sum(2)
        distances = distance if entry == 0 else torch.minimum(distances, distance)
    return chosen


def train_codebooks(
    vectors: Tensor, codebooks: Tensor, iterations: int, weights: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Lloyd's iterations from the codebooks given, for each expert until its error hardly falls any more.

    Args:
        vectors: (experts, count, length).
        codebooks: (experts, entries, length).
        iterations: at most.
        weights: what the squared error of each entry of each vector counts, not negative (experts, count, length); None: one.

    Returns:
        New codebooks, and the squared errors (experts,) at the start of each iteration.
    """
    codebooks = codebooks.clone()
    active = torch.arange(len(vectors), device=vectors.device)
    errors = vectors.new_full((len(vectors),), torch.inf)
    history = []
    for _ in range(iterations):
        mine = None if weights is None else weights[active]
        codes, distances = nearest(vectors[active], codebooks[active], mine)
        before = errors[active]
        errors[active] = distances.double().sum(1).float()
        history.append(errors.clone())
        codebooks[active] = _centroids(vectors[active], codes, codebooks[active], mine)
        active = active[errors[active] < (1 - _ENOUGH) * before]
        if not len(active):
            break
    return codebooks, history


def nearest(vectors: Tensor, codebooks: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The nearest entry of every vector and the squared distance to it.

    Args:
        vectors: (experts, count, length).
        codebooks: (experts, entries, length).
        weights: as for :func:`train_codebooks`.

    Returns:
        int64 (experts, count) and (experts, count).
    """
    if weights is not None:
        # Σ w (v − c)² = Σ w v² + 2 (w · c²/2 − (w v) · c): one product with twice as long vectors.
        longer = torch.cat([weights, -weights * vectors], 2)
        found, lowest_scores = _lowest(longer, torch.cat([codebooks.square() / 2, codebooks], 2))
        return found, ((weights * vectors.square()).sum(2) + 2 * lowest_scores).clamp_min(0)
    half_norms = codebooks.square().sum(2).unsqueeze(1) / 2  # (experts, 1, entries)
    step = max(1, _SCORES // (len(vectors) * codebooks.shape[1]))
    codes, scores = [], []
    for piece in vectors.split(step, dim=1):
        lowest = torch.baddbmm(half_norms, piece, codebooks.mT, alpha=-1).min(2)
        codes.append(lowest.indices)
        scores.append(lowest.values)
    return torch.cat(codes, 1), (vectors.square().sum(2) + 2 * torch.cat(scores, 1)).clamp_min(0)


def _lowest(vectors: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
    """The entry with the smallest product with every vector, and that product. (experts, count) each"""
    step = max(1, _SCORES // (len(vectors) * entries.shape[1]))
    lowest = [(piece @ entries.mT).min(2) for piece in vectors.split(step, dim=1)]
    return torch.cat([found.indices for found in lowest], 1), torch.cat([found.values for found in lowest], 1)


def _centroids(vectors: Tensor, codes: Tensor, codebooks: Tensor, weights: Tensor | None) -> Tensor:
    """The mean of the vectors of each code; an entry that nobody chose stays where it is."""
    # float64 sums of float32 values of like size are exact: their order, and with it the device, changes no byte.
    sums = torch.zeros_like(codebooks, dtype=torch.float64)
    if weights is not None:
        place, heavy = codes.unsqueeze(2).expand_as(vectors), weights.double()
        sums.scatter_add_(1, place, heavy * vectors.double())
        total = torch.zeros_like(sums).scatter_add_(1, place, heavy)
        return torch.where(total > 0, sums / total, codebooks.double()).float()
    sums.scatter_add_(1, codes.unsqueeze(2).expand_as(vectors), vectors.double())
    counts = torch.zeros_like(sums[:, :, 0]).scatter_add_(1, codes, torch.ones_like(codes, dtype=torch.float64)).unsqueeze(2)
    return torch.where(counts > 0, sums / counts.clamp_min(1), codebooks.double()).float()


def _codes_with_feedback(weight: Tensor, cholesky: Tensor, codebooks: Tensor, block_size: int = 128) -> Tensor:
    """GPTQ by groups of columns: with ``H⁻¹ = Uᵀ U``, the entry nearest to ``v U_g⁻¹`` among ``c U_g⁻¹`` is the one that hurts
    least once the columns after the group have made up for it (GPTVQ Eq. 4), and the difference is what is pushed on.
    """
    experts, _, columns = weight.shape
    length = codebooks.shape[2]
    weight, codes = weight.clone(), []
    identity = torch.eye(length, device=weight.device).expand(experts, -1, -1)
    block_size = max(block_size // length, 1) * length
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        block, errors = weight[:, :, start:stop], torch.empty_like(weight[:, :, start:stop])
        for offset in range(0, stop - start, length):
            here, after = slice(offset, offset + length), slice(offset + length, None)
            rows = cholesky[:, start + offset : start + offset + length, start:stop]
            inverse = torch.linalg.solve_triangular(rows[:, :, here], identity, upper=True)
            values, entries = block[:, :, here] @ inverse, codebooks @ inverse
            code = nearest(values, entries)[0]
            errors[:, :, here] = values - entries.gather(1, code.unsqueeze(2).expand(-1, -1, length))
            block[:, :, after] -= errors[:, :, here] @ rows[:, :, after]
            codes.append(code)
        weight[:, :, stop:].baddbmm_(errors, cholesky[:, start:stop, stop:], alpha=-1)
    return torch.stack(codes, 2)


def _padded_cholesky(cholesky: Tensor, short: int) -> Tensor:
    """The Cholesky factor for columns of zeros at the end, which nothing is pushed into."""
    padded = torch.nn.functional.pad(cholesky, (0, short, 0, short))
    padded.diagonal(dim1=1, dim2=2)[:, cholesky.shape[1] :] = 1
    return padded


def _some(vectors: Tensor, most: int) -> Tensor:
    """Every so many of the vectors, at most ``most``."""
    return vectors[:, :: -(-vectors.shape[1] // most)]
