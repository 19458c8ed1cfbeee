"""Perplexity of a model, and how far it is from the original it was made from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moebius.errors import CalibrationError, CheckpointError, ShapeError
from moebius.evaluate.protocol import EvaluationText
from moebius.evaluate.reference import LiveReference, Reference, ReferenceBatch, scored_logits
from moebius.evaluate.routing import recorded_router_logits, routed_by, routing_similarity
from moebius.progress import Progress, Silent

# Positions compared at once: a float32 copy of their logits is 150 MB at a vocabulary of 150,000.
_POSITIONS = 256


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate_model` measured. The fields after ``tokens`` need a reference, and are None or empty without one.

    Attributes:
        perplexity: exponential of the mean next-token cross-entropy.
        perplexity_error: standard error of ``perplexity``, windows or tokens taken as independent as the protocol has it;
            None for a single one.
        tokens: scored tokens.
        kl: mean over those positions of KL(reference || model), in nats.
        kl_error: standard error of ``kl``, tokens taken as independent.
        kl_99, kl_999: what 99 and 99.9 percent of the positions stay below, in nats.
        top1_agreement: share of positions where both models hold the same token for the likeliest.
        top1_error: standard error of that.
        routing_similarity: of each MoE layer, the mean cosine between both models' routing distributions (MoBiE Eq. 55).
        reference_perplexity: perplexity of the reference on the same tokens.
    """

    perplexity: float
    perplexity_error: float | None
    tokens: int
    kl: float | None = None
    kl_error: float | None = None
    kl_99: float | None = None
    kl_999: float | None = None
    top1_agreement: float | None = None
    top1_error: float | None = None
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
    text: EvaluationText | Tensor,
    *,
    reference: PreTrainedModel | Reference | None = None,
    routing_from: PreTrainedModel | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Evaluation:
    """Perplexity on windows of tokens and, against a reference, KL, top-1 agreement and routing similarity per layer.

    Every batch goes through all models before the next one is touched: the logits of one batch are all that is held. Logits
    are compared in float32 and sums kept in float64.

    Args:
        model: a causal language model of transformers, on any device.
        text: what is shown and scored; bare token ids (windows, window_length) int64 are scored from the second token on.
        reference: the original, of the same architecture and vocabulary: in memory, or what was stored of it.
        routing_from: a model of the same architecture that decides where tokens go, each of its routers in the place of
            ``model``'s own: what is left of the divergence is the experts' own error, without *expert shift* (MoBiE Table 1).
        batch_size: windows per forward pass.
        progress: told about every batch.

    Raises:
        CalibrationError: no windows, or windows of fewer than 2 tokens.
        CheckpointError: logits that are not finite.
        ShapeError: two models with different vocabularies.
        UnsupportedModelError: a reference without experts, or a model without the reference's routers.
    """
    if isinstance(text, Tensor):
        text = EvaluationText("windows", "given windows", text)
    _check(text)
    progress = progress or Silent()
    batches = text.windows.split(batch_size)
    progress.stage("evaluating", len(batches))
    model.eval()
    if isinstance(reference, nn.Module):
        reference = LiveReference(reference)
    total = _Sums(text, {} if reference is None else reference.routers)
    with ExitStack() as stack:
        routing = stack.enter_context(recorded_router_logits(model, total.routers))
        decide = stack.enter_context(routed_by(model, routing_from)) if routing_from is not None else None
        original = iter(()) if reference is None else reference.batches(text, batch_size)
        for ids in batches:
            of_reference = next(original, None)
            if decide is not None:
                decide(ids)
            logits = scored_logits(model, ids, text.first_target)
            total.add(logits, of_reference, ids)
            if of_reference is not None:
                total.add_routing(routing, of_reference.routing)
            progress.advance(f"{total.tokens:,} tokens")
    progress.finish()
    return total.evaluation()


def _check(text: EvaluationText) -> None:
    windows = text.windows
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise CalibrationError(
            f"evaluation windows: got shape {tuple(windows.shape)}, wanted at least 1 window of 2 tokens or more"
        )


class _Sums:
    """What was seen so far: a figure per position, and float64 sums per router."""

    def __init__(self, text: EvaluationText, routers: Mapping[str, int]) -> None:
        self.text, self.routers = text, routers
        self.losses: list[Tensor] = []  # (windows, targets) float64 of each batch
        self.reference_losses: list[Tensor] = []
        self.divergences: list[Tensor] = []  # (positions,) float32
        self.agreements = self.tokens = 0
        self.similarity = torch.zeros(len(routers), dtype=torch.float64)

    def add(self, logits: Tensor, reference: ReferenceBatch | None, ids: Tensor) -> None:
        """The figures of a batch.

        Args:
            logits: (windows, targets, vocabulary)
            ids: (windows, window_length)
        """
        windows, positions, vocabulary = logits.shape
        if reference is not None and reference.distribution.vocabulary != vocabulary:
            raise ShapeError(
                f"vocabulary: got {vocabulary} logits from the model, {reference.distribution.vocabulary} from the reference; "
                "wanted a model and the original it was made from"
            )
        flat, targets = logits.flatten(0, 1), ids[:, self.text.first_target :].flatten()
        losses = []
        for start in range(0, len(flat), _POSITIONS):
            rows = slice(start, start + _POSITIONS)
            log_model = flat[rows].float().log_softmax(-1).cpu()  # (rows, vocabulary)
            losses.append(-log_model.gather(1, targets[rows].unsqueeze(1)).squeeze(1).double())
            if reference is not None:
                self._compare(log_model, reference, rows)
        self.losses.append(torch.cat(losses).view(windows, positions))
        self.tokens += windows * positions

    def _compare(self, log_model: Tensor, reference: ReferenceBatch, rows: slice) -> None:
        distribution = reference.distribution.rows(rows).to(log_model.device)
        self.divergences.append(distribution.divergence(log_model))
        self.agreements += int((log_model.argmax(-1) == distribution.likeliest()).sum())
        self.reference_losses.append(reference.losses[rows].double().cpu())

    def add_routing(self, routing: Mapping[str, Tensor], of_reference: Mapping[str, Tensor]) -> None:
        """The similarity of each router's choices to the reference's. (tokens, experts) each"""
        for layer, name in enumerate(self.routers):
            similarity = routing_similarity(routing[name], of_reference[name].to(routing[name].device))
            self.similarity[layer] += similarity.sum(dtype=torch.float64).cpu()

    def evaluation(self) -> Evaluation:
        losses = torch.cat(self.losses)
        loss = losses.mean().item()
        if not math.isfinite(loss):
            raise CheckpointError(f"evaluation: got a loss of {loss}, wanted a finite one; the model's weights are damaged")
        error = _standard_error(losses.mean(1) if self.text.independent == "windows" else losses.flatten())
        perplexity = math.exp(loss)
        figures: dict[str, Any] = {}
        if self.divergences:
            divergences, share = torch.cat(self.divergences).double(), self.agreements / self.tokens
            figures = {
                "kl": divergences.mean().item(),
                "kl_error": _standard_error(divergences),
                "kl_99": _percentile(divergences, 0.99),
                "kl_999": _percentile(divergences, 0.999),
                "top1_agreement": share,
                "top1_error": math.sqrt(share * (1 - share) / (self.tokens - 1)) if self.tokens > 1 else None,
                "routing_similarity": (self.similarity / self.text.windows.numel()).tolist(),
                "reference_perplexity": math.exp(torch.cat(self.reference_losses).mean().item()),
            }
        return Evaluation(perplexity, None if error is None else perplexity * error, self.tokens, **figures)


def _standard_error(values: Tensor) -> float | None:
    """Of the mean of independent values; None for a single one."""
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None


def _percentile(values: Tensor, share: float) -> float:
    """Linear between neighbours, as llama.cpp has it (``torch.quantile`` refuses more than 16 million)."""
    ordered = values.sort().values
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return (ordered[below] + (place - below) * (ordered[above] - ordered[below])).item()
