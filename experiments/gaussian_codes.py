"""docs/experiments/codes.md: squared error of codes for a Gaussian of unit variance, by bits per sample.

Signs and nested planes by their amplitudes; vectors by k-means; trellises with trained levels, whose states slide by the bits
of a sample, found by Viterbi's algorithm (tail-biting is left out: sequences are long).

usage: python experiments/gaussian_codes.py [--samples N] [--rounds N] [--states N ...] [--lengths N ...]
"""

from __future__ import annotations

import argparse

import torch
from torch import Generator, Tensor

from moebius.formats.planes import AMPLITUDES


def planes(count: int, samples: Tensor) -> float:
    """Of the nearest sum of signed amplitudes."""
    signs = torch.tensor([[1.0 if code >> bit & 1 else -1.0 for bit in range(count)] for code in range(2**count)])
    levels = (signs @ torch.tensor(AMPLITUDES[count])).sort().values
    nearest = torch.bucketize(samples, (levels[1:] + levels[:-1]) / 2)
    return float((samples - levels[nearest]).square().mean())


def vectors(length: int, samples: Tensor, rounds: int, generator: Generator) -> float:
    """Of one bit per sample: the nearest of ``2 ** length`` vectors, by k-means."""
    points = samples[: len(samples) // length * length].view(-1, length)
    book = points[torch.randperm(len(points), generator=generator)[: 2**length]].clone()
    for _ in range(rounds):
        nearest = torch.cat([torch.cdist(some, book).argmin(1) for some in points.split(1 << 14)])
        sums = torch.zeros_like(book).index_add_(0, nearest, points)
        count = torch.zeros(len(book)).index_add_(0, nearest, torch.ones(len(points)))
        book = torch.where(count[:, None] > 0, sums / count.clamp_min(1)[:, None], book)
    return float((points - book[nearest]).square().mean())


def trellis(states: int, bits: int, samples: Tensor, rounds: int, generator: Generator) -> float:
    """Of a trellis: state ``s`` goes to ``(s << bits | code) % states``, and each state has a level."""
    levels = torch.randn(states, generator=generator)
    sequences = samples[: len(samples) // 256 * 256].view(-1, 256)
    error = 0.0
    for _ in range(rounds):
        path = viterbi(sequences, levels, bits)
        error = float((sequences - levels[path]).square().mean())
        sums = torch.zeros(states).index_add_(0, path.flatten(), sequences.flatten())
        count = torch.zeros(states).index_add_(0, path.flatten(), torch.ones(sequences.numel()))
        levels = torch.where(count > 0, sums / count.clamp_min(1), levels)
    return error


def viterbi(sequences: Tensor, levels: Tensor, bits: int) -> Tensor:
    """The states of least squared error of each sequence. (sequences, length) to (sequences, length) int64"""
    states, branches = len(levels), 2**bits
    # State s is reached from those whose lower bits are its upper ones.
    before = (torch.arange(states) >> bits)[:, None] + torch.arange(branches) * (states // branches)
    cost, came = torch.zeros(len(sequences), states), []
    for step in range(sequences.shape[1]):
        least = cost[:, before].min(2)
        came.append(least.indices.to(torch.uint8))
        cost = least.values + (sequences[:, step, None] - levels).square()
    state, path = cost.argmin(1), []
    for choices in reversed(came):
        path.append(state)
        state = before[state, choices.gather(1, state[:, None]).squeeze(1).long()]
    return torch.stack(path[::-1], 1)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1 << 17)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--states", type=int, nargs="*", default=[8, 32, 256, 1024])
    parser.add_argument("--lengths", type=int, nargs="*", default=[2, 4, 8, 10])
    chosen = parser.parse_args(arguments)
    generator = Generator().manual_seed(0)
    samples = torch.randn(chosen.samples, generator=generator)
    found = {f"{count} plane{'s' * (count > 1)}": planes(count, samples) for count in AMPLITUDES}
    for length in chosen.lengths:
        found[f"vectors of {length}, one bit"] = vectors(length, samples, chosen.rounds, generator)
    for states in chosen.states:
        found[f"trellis of {states} states, one bit"] = trellis(states, 1, samples, chosen.rounds, generator)
    for name, error in found.items():
        print(f"{name}: {error:.5f}")
    return found


if __name__ == "__main__":
    main()
