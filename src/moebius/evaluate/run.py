"""An evaluation from the names of models: text, models and reference, one protocol."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from moebius.errors import RecipeError
from moebius.evaluate.evaluation import Evaluation, evaluate_model
from moebius.evaluate.protocol import EvaluationText, evaluation_text
from moebius.evaluate.reference import Reference, StoredReference, is_stored_reference, save_reference
from moebius.hf.loading import load_model, load_tokenizer
from moebius.models.limits import check_tokens, positions_of, tell_of_positions
from moebius.progress import Progress

# Logits of so many tokens are held at once: 1.2 GB in float32 at a vocabulary of 150,000.
_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class EvaluationRequest:
    """What to measure. None leaves a choice to the protocol, or to the stored reference.

    Attributes:
        source: the model, a folder or a hub name.
        reference: the original, or the folder of a stored reference.
        routing_from: the model that decides where tokens go.
        protocol: ``windows``, ``gptq`` or ``llama.cpp``.
        text: as :attr:`moebius.recipe.CalibrationSettings.text`.
        windows: how many.
        window_length: tokens per window.
        seed: which windows are drawn.
        bos: whether windows begin with the begin-of-text token: ``auto``, ``on``, ``off``.
        dtype: a key of :data:`moebius.hf.loading.DTYPES`.
        device: where to compute.
        batch_size: windows per forward pass.
        save_reference: folder for what the model says about the text.
        top_k: tokens that are stored per position; None: all.
    """

    source: str
    reference: str | None = None
    routing_from: str | None = None
    protocol: str | None = None
    text: str | None = None
    windows: int | None = None
    window_length: int | None = None
    seed: int = 0
    bos: str = "auto"
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
            "bos": self.bos,
        }


@dataclass(frozen=True)
class EvaluationResult(Evaluation):
    """What was measured, and how.

    Attributes:
        settings: what the windows depend on, and the names of the other models.
        description: of the text, in words.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    description: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        figures = {name: value for name, value in super().to_dict().items() if name not in ("settings", "description")}
        return {**self.settings, "description": self.description, **figures}


def run_evaluation(request: EvaluationRequest, progress: Progress | None = None) -> EvaluationResult:
    """Load what is asked for, and measure.

    Raises:
        MoebiusError: no such model, a damaged checkpoint, a text that is too short, settings that contradict the reference.
    """
    stored = _stored(request)
    settings = request.settings() if stored is None else stored.settings
    model = load_model(request.source, request.dtype, request.device)
    text = _text(request, model) if stored is None else stored.text
    batch_size = request.batch_size or max(1, _BATCH_TOKENS // text.windows.shape[1])
    if stored is not None:
        batch_size = stored.batch_size
    if request.save_reference is not None:
        wanted = {"model": Path(request.source).name, **settings}
        save_reference(
            model,
            text,
            request.save_reference,
            settings=wanted,
            top_k=request.top_k,
            batch_size=batch_size,
            progress=progress,
        )
    reference: PreTrainedModel | Reference | None = stored
    if reference is None and request.reference is not None:
        reference = load_model(request.reference, request.dtype, request.device)
    router = None if request.routing_from is None else load_model(request.routing_from, request.dtype, request.device)
    result = evaluate_model(model, text, reference=reference, routing_from=router, batch_size=batch_size, progress=progress)
    asked = {**settings, "reference": request.reference, "routing_from": request.routing_from}
    return EvaluationResult(**vars(result), settings=asked, description=text.description)


def _stored(request: EvaluationRequest) -> StoredReference | None:
    """The stored reference that is meant, which brings its own text."""
    if request.reference is None or not is_stored_reference(request.reference):
        return None
    stored = StoredReference(Path(request.reference).expanduser())
    for name in ("protocol", "text", "windows", "window_length"):
        asked, own = getattr(request, name), stored.settings.get(name)
        if asked is not None and asked != own:
            raise RecipeError(
                f"--{name.replace('_', '-')} {asked}: the stored reference {stored.folder} has {own}; leave it out"
            )
    return stored


def _text(request: EvaluationRequest, model: PreTrainedModel) -> EvaluationText:
    settings = request.settings()
    positions = positions_of(model.config)
    text = evaluation_text(**settings, tokenizer=load_tokenizer(request.source), positions=positions)
    check_tokens(model, text.windows)
    tell_of_positions(model.config, text.windows.shape[1])
    return text
