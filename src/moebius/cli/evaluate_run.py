"""The work behind ``moebius evaluate``: text, models and reference, one protocol."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from moebius.cli.loading import load_model, load_tokenizer
from moebius.errors import RecipeError
from moebius.evaluate.evaluation import Evaluation, evaluate_model
from moebius.evaluate.protocol import EvaluationText, evaluation_text
from moebius.evaluate.reference import Reference, StoredReference, is_stored_reference, save_reference
from moebius.progress import Progress

# Logits of so many tokens are held at once: 1.2 GB in float32 at a vocabulary of 150,000.
_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Question:
    """What to measure. None leaves a choice to the protocol, or to the stored reference."""

    source: str
    reference: str | None = None
    routing_from: str | None = None
    protocol: str | None = None
    text: str | None = None
    windows: int | None = None
    window_length: int | None = None
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    batch_size: int | None = None
    save_reference: Path | None = None
    top_k: int | None = None

    def settings(self) -> dict[str, Any]:
        """What the windows depend on, ready for JSON."""
        return {
            "protocol": self.protocol or "windows",
            "text": self.text or "builtin",
            "windows": self.windows,
            "window_length": self.window_length,
            "seed": self.seed,
        }


@dataclass(frozen=True)
class Answer:
    """What was measured, and how."""

    settings: dict[str, Any]
    description: str
    evaluation: Evaluation

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**self.settings, "description": self.description, **self.evaluation.to_dict()}


def run_evaluation(question: Question, progress: Progress) -> Answer:
    """Load what is asked for, and measure.

    Raises:
        MoebiusError: no such model, a damaged checkpoint, a text that is too short, settings that contradict the reference.
    """
    stored = _stored(question)
    settings = question.settings() if stored is None else stored.settings
    model = load_model(question.source, question.dtype, question.device)
    text = _text(question, model) if stored is None else stored.text
    batch_size = question.batch_size or max(1, _BATCH_TOKENS // text.windows.shape[1])
    if stored is not None:
        batch_size = stored.batch_size
    if question.save_reference is not None:
        wanted = {"model": Path(question.source).name, **settings}
        save_reference(
            model,
            text,
            question.save_reference,
            settings=wanted,
            top_k=question.top_k,
            batch_size=batch_size,
            progress=progress,
        )
    reference: PreTrainedModel | Reference | None = stored
    if reference is None and question.reference is not None:
        reference = load_model(question.reference, question.dtype, question.device)
    router = None if question.routing_from is None else load_model(question.routing_from, question.dtype, question.device)
    result = evaluate_model(model, text, reference=reference, routing_from=router, batch_size=batch_size, progress=progress)
    return Answer(
        {**settings, "reference": question.reference, "routing_from": question.routing_from}, text.description, result
    )


def _stored(question: Question) -> StoredReference | None:
    """The stored reference that is meant, which brings its own text."""
    if question.reference is None or not is_stored_reference(question.reference):
        return None
    stored = StoredReference(Path(question.reference).expanduser())
    for name in ("protocol", "text", "windows", "window_length"):
        asked, own = getattr(question, name), stored.settings.get(name)
        if asked is not None and asked != own:
            raise RecipeError(
                f"--{name.replace('_', '-')} {asked}: the stored reference {stored.folder} has {own}; leave it out"
            )
    return stored


def _text(question: Question, model: PreTrainedModel) -> EvaluationText:
    settings = question.settings()
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return evaluation_text(**settings, tokenizer=load_tokenizer(question.source), positions=positions)
