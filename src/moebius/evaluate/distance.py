"""How far one next-token distribution is from another, position by position.

The original's distributions come whole, or as their likeliest tokens and the mass of all others, which takes a thousandth of
the space. The divergence between such coarse distributions is at most that between the whole ones (data processing
inequality), and close to it where the tail is light.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WholeDistribution:
    """log-probabilities of every token. (positions, vocabulary)"""

    log_probabilities: Tensor

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        return self.log_probabilities.shape[-1]

    def rows(self, rows: slice) -> WholeDistribution:
        """Some of the positions."""
        return WholeDistribution(self.log_probabilities[rows])

    def to(self, device: torch.device) -> WholeDistribution:
        """The same on another device."""
        return WholeDistribution(self.log_probabilities.to(device))

    def likeliest(self) -> Tensor:
        """(positions,) int64"""
        return self.log_probabilities.argmax(-1)

    def divergence(self, log_model: Tensor) -> Tensor:
        """KL(this || model), nats. (positions,) float32

        Args:
            log_model: log-probabilities of the model. (positions, vocabulary) float32
        """
        log_mine = self.log_probabilities.float()
        mine = log_mine.exp()
        # A token that is forbidden here (a logit of -inf) has 0 · (-inf), and means 0.
        return torch.where(mine > 0, mine * (log_mine - log_model), 0.0).sum(-1)


@dataclass(frozen=True)
class LikeliestTokens:
    """The likeliest tokens, and how likely all others are together.

    Attributes:
        tokens: (positions, top_k) int64, the likeliest first.
        log_probabilities: of those. (positions, top_k) float32
        log_tail: log of the probability of all others together. (positions,) float32
        vocabulary: how many tokens there are.
    """

    tokens: Tensor
    log_probabilities: Tensor
    log_tail: Tensor
    vocabulary: int

    @classmethod
    def of(cls, log_probabilities: Tensor, top_k: int) -> LikeliestTokens:
        """From log-probabilities of every token. (positions, vocabulary) float32"""
        values, tokens = log_probabilities.topk(top_k, dim=-1)
        others = log_probabilities.scatter(-1, tokens, float("-inf"))
        return cls(tokens, values, others.logsumexp(-1), log_probabilities.shape[-1])

    def rows(self, rows: slice) -> LikeliestTokens:
        """Some of the positions."""
        return LikeliestTokens(self.tokens[rows], self.log_probabilities[rows], self.log_tail[rows], self.vocabulary)

    def to(self, device: torch.device) -> LikeliestTokens:
        """The same on another device."""
        return LikeliestTokens(
            self.tokens.to(device), self.log_probabilities.to(device), self.log_tail.to(device), self.vocabulary
        )

    def likeliest(self) -> Tensor:
        """(positions,) int64"""
        return self.tokens[:, 0]

    def divergence(self, log_model: Tensor) -> Tensor:
        """KL between the two distributions over the likeliest tokens here and "any other", nats. (positions,) float32"""
        log_same = log_model.gather(-1, self.tokens)
        log_others = log_model.scatter(-1, self.tokens, float("-inf")).logsumexp(-1)
        inside = WholeDistribution(self.log_probabilities).divergence(log_same)
        tail = self.log_tail.exp()
        return inside + torch.where(tail > 0, tail * (self.log_tail - log_others), 0.0)


Distribution = WholeDistribution | LikeliestTokens
