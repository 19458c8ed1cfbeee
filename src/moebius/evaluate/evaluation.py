"""Perplexity of a model, and how far it is from the original it was made from."""

from __future__ import annotations

import dataclasses
import math
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moebius.errors import CalibrationError, CheckpointError, ShapeError
from moebius.evaluate.routing import recorded_router_logits, routing_similarity
from moebius.models.load import describe
from moebius.progress import Progress, Silent

# Positions compared at once: a float32 copy of their logits is 150 MB at a vocabulary of 150,000.
_POSITIONS = 256


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate_model` measured. The fields after ``tokens`` need a reference, and are None or empty without one.

    Attributes:
        perplexity: exponential of the mean next-token cross-entropy.
        perplexity_error: standard error of ``perplexity``, windows taken as independent; None for a single window.
        tokens: predicted tokens, one less than its length for every window.
        kl: mean over those positions of KL(reference || model), in nats.
        top1_agreement: share of positions where both models hold the same token for the likeliest.
        routing_similarity: of each MoE layer, the mean cosine between both models' routing distributions (MoBiE Eq. 55).
        reference_perplexity: perplexity of the reference on the same windows.
    """

    perplexity: float
    perplexity_error: float | None
    tokens: int
    kl: float | None = None
    top1_agreement: float | None = None
    routing_similarity: list[float] = field(default_factory=list)
    reference_perplexity: float | None = None

    @property
    def mean_routing_similarity(self) -> float | None:
        """Mean over the MoE layers; None without reference."""
        return sum(self.routing_similarity) / len(self.routing_similarity) if self.routing_similarity else None

    def to_dict(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        return {**dataclasses.asdict(self), "mean_routing_similarity": self.mean_routing_similarity}


@torch.inference_mode()
def evaluate_model(
    model: nn.Module,
    windows: Tensor,
    *,
    reference: PreTrainedModel | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Evaluation:
    """Perplexity on windows of tokens and, against a reference, KL, top-1 agreement and routing similarity per layer.

    Both models see every batch before the next one is touched: the logits of one batch are all that is held. Every position
    of a window but the last predicts the token after it; logits are compared in float32 and sums kept in float64.

    Args:
        model: a causal language model of transformers, on any device.
        windows: token ids. (windows, window_length) int64
        reference: the original, of the same architecture and vocabulary.
        batch_size: windows per forward pass.
        progress: told about every batch.

    Raises:
        CalibrationError: no windows, or windows of fewer than 2 tokens.
        CheckpointError: logits that are not finite.
        ShapeError: two models with different vocabularies.
        UnsupportedModelError: a reference without experts, or a model without the reference's routers.
    """
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise CalibrationError(
            f"evaluation windows: got shape {tuple(windows.shape)}, wanted at least 1 window of 2 tokens or more"
        )
    progress = progress or Silent()
    batches = windows.split(batch_size)
    progress.stage("evaluating", len(batches))
    model.eval()
    total = _Sums()
    with ExitStack() as recording:
        routers: dict[str, int] = {}
        routing: dict[str, Tensor] = {}
        reference_routing: dict[str, Tensor] = {}
        if reference is not None:
            reference.eval()
            routers = {layer.router_name: layer.layout.experts for layer in describe(reference).moe_layers if layer.router_name}
            routing = recording.enter_context(recorded_router_logits(model, routers))
            reference_routing = recording.enter_context(recorded_router_logits(reference, routers))
            total.similarity = torch.zeros(len(routers), dtype=torch.float64)
        for batch in batches:
            logits = _logits(model, batch)
            reference_logits = None if reference is None else _logits(reference, batch)
            total.add(logits, reference_logits, batch)
            for layer, name in enumerate(routers):
                similarity = routing_similarity(routing[name], reference_routing[name].to(routing[name].device))
                total.similarity[layer] += similarity.sum(dtype=torch.float64).cpu()
            progress.advance(f"{total.tokens:,} tokens")
    progress.finish()
    return total.evaluation(windows.numel(), compared=reference is not None)


def _logits(model: nn.Module, batch: Tensor) -> Tensor:
    """(windows, window_length - 1, vocabulary), of the positions that predict a token of the window."""
    device = next(model.parameters()).device
    return model(input_ids=batch.to(device), use_cache=False).logits[:, :-1]


class _Sums:
    """Float64 sums over the positions seen so far."""

    def __init__(self) -> None:
        self.window_losses: list[float] = []  # mean loss of each window
        self.tokens = 0
        self.kl = self.agreements = self.reference_loss = 0.0
        self.similarity = torch.zeros(0, dtype=torch.float64)

    def add(self, logits: Tensor, reference_logits: Tensor | None, batch: Tensor) -> None:
        if reference_logits is not None and reference_logits.shape[-1] != logits.shape[-1]:
            raise ShapeError(
                f"vocabulary: got {logits.shape[-1]} logits from the model and {reference_logits.shape[-1]} from the reference;"
                " wanted a model and the original it was made from"
            )
        windows, positions, vocabulary = logits.shape
        targets = batch[:, 1:].to(logits.device)
        losses = []
        flat, flat_targets = logits.reshape(-1, vocabulary), targets.flatten()
        flat_reference = None if reference_logits is None else reference_logits.to(logits.device).reshape(-1, vocabulary)
        for start in range(0, flat.shape[0], _POSITIONS):
            rows = slice(start, start + _POSITIONS)
            log_model = flat[rows].float().log_softmax(-1)  # (rows, vocabulary)
            losses.append(_losses(log_model, flat_targets[rows]))
            if flat_reference is not None:
                log_reference = flat_reference[rows].float().log_softmax(-1)
                self.reference_loss += _losses(log_reference, flat_targets[rows]).sum().item()
                probability = log_reference.exp()
                # A token the reference forbids (a logit of -inf) has 0 · (-inf) here, and means 0.
                divergence = torch.where(probability > 0, probability * (log_reference - log_model), 0.0)
                self.kl += divergence.sum(dtype=torch.float64).item()
                self.agreements += (log_model.argmax(-1) == log_reference.argmax(-1)).sum().item()
        self.window_losses += torch.cat(losses).view(windows, positions).mean(1).tolist()
        self.tokens += windows * positions

    def evaluation(self, seen_tokens: int, compared: bool) -> Evaluation:
        losses = torch.tensor(self.window_losses, dtype=torch.float64)
        loss = losses.mean().item()
        if not math.isfinite(loss):
            raise CheckpointError(f"evaluation: got a loss of {loss}, wanted a finite one; the model's weights are damaged")
        perplexity = math.exp(loss)
        error = None if len(losses) < 2 else perplexity * losses.std().item() / math.sqrt(len(losses))
        if not compared:
            return Evaluation(perplexity, error, self.tokens)
        return Evaluation(
            perplexity=perplexity,
            perplexity_error=error,
            tokens=self.tokens,
            kl=self.kl / self.tokens,
            top1_agreement=self.agreements / self.tokens,
            routing_similarity=(self.similarity / seen_tokens).tolist(),
            reference_perplexity=math.exp(self.reference_loss / self.tokens),
        )


def _losses(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each row. (rows,) float64"""
    return -log_probabilities.gather(1, targets.unsqueeze(1)).squeeze(1).double()
