"""The original that a model is compared with: loaded beside it, or what it said, stored once.

Stored, the original and the packed model are never in memory together, and ten packed models cost one run of the original.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from moebius.errors import CheckpointError, OutputError
from moebius.evaluate.distance import Distribution, LikeliestTokens, WholeDistribution
from moebius.evaluate.protocol import EvaluationText
from moebius.evaluate.routing import recorded_router_logits
from moebius.models.load import describe
from moebius.progress import Progress, Silent
from moebius.types import MoeLayer

REFERENCE_NAME = "moebius_reference.json"
_VERSION = 1


def _choices(layer: MoeLayer) -> int:
    """Logits per token of a router: it may have one for a choice beside the experts."""
    weight = getattr(layer.router, "weight", None)
    return len(weight) if isinstance(weight, Tensor) else layer.layout.experts


@dataclass(frozen=True)
class ReferenceBatch:
    """What the original said about a batch of windows.

    Attributes:
        distribution: of the next token at every scored position. (windows · targets)
        losses: cross-entropy of the token that came. (windows · targets,) float32
        routing: router path to its logits for all tokens. (tokens, experts)
    """

    distribution: Distribution
    losses: Tensor
    routing: Mapping[str, Tensor]


class LiveReference:
    """An original in memory.

    Args:
        model: the original, of the same architecture and vocabulary as what is compared with it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()
        self.routers = {layer.router_name: _choices(layer) for layer in describe(model).moe_layers if layer.router_name}

    def batches(self, text: EvaluationText, batch_size: int) -> Iterator[ReferenceBatch]:
        """What the original says about each batch of windows, when it is asked for."""
        with recorded_router_logits(self.model, self.routers) as routing:
            for ids in text.windows.split(batch_size):
                logits = scored_logits(self.model, ids, text.first_target)
                log_probabilities = logits.flatten(0, 1).float().log_softmax(-1)
                targets = ids[:, text.first_target :].to(logits.device).flatten()
                losses = -log_probabilities.gather(1, targets.unsqueeze(1)).squeeze(1)
                yield ReferenceBatch(WholeDistribution(log_probabilities), losses, dict(routing))


def scored_logits(model: nn.Module, ids: Tensor, first_target: int) -> Tensor:
    """Logits of the positions that predict a token that is scored. (windows, targets, vocabulary)

    Args:
        ids: (windows, window_length) int64
        first_target: position of the first token that is scored.
    """
    device = next(model.parameters()).device
    return model(input_ids=ids.to(device), use_cache=False).logits[:, first_target - 1 : -1]


@torch.inference_mode()
def save_reference(
    model: PreTrainedModel,
    text: EvaluationText,
    folder: Path,
    *,
    settings: Mapping[str, Any],
    top_k: int | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> None:
    """Store what a model says about a text, for models to be compared with it later.

    Args:
        folder: to create; appears when all is written.
        settings: what was asked for (model, text, protocol), ready for JSON.
        top_k: store so many of the likeliest tokens and the mass of the others; None: all, in float16 (two bytes for every
            token of the vocabulary and scored position).

    Raises:
        OutputError: the folder exists, or cannot be written.
    """
    progress = progress or Silent()
    if folder.exists():
        raise OutputError(f"{folder}: exists; remove it or choose another name for the reference")
    reference = LiveReference(model)
    progress.stage("storing the reference", -(-len(text.windows) // batch_size))
    with _written(folder) as work:
        for number, batch in enumerate(reference.batches(text, batch_size)):
            tensors = {"losses": batch.losses, **{f"routing.{n}": r.half() for n, r in batch.routing.items()}}
            tensors |= _stored(batch.distribution, top_k)
            save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, work / _batch_name(number))
            progress.advance(f"{min((number + 1) * batch_size, len(text.windows))} windows")
        vocabulary = batch.distribution.vocabulary
        save_file({"windows": text.windows.contiguous()}, work / "windows.safetensors")
        about = {"version": _VERSION, "settings": dict(settings), "vocabulary": vocabulary, "routers": reference.routers}
        about |= {"protocol": text.protocol, "description": text.description, "first_target": text.first_target}
        about |= {"independent": text.independent, "batch_size": batch_size, "top_k": top_k}
        (work / REFERENCE_NAME).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


@contextmanager
def _written(folder: Path) -> Iterator[Path]:
    """A folder beside ``folder`` that becomes it if all went well, and is removed if not."""
    work = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        yield work
        work.rename(folder)
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot be written ({error.strerror or error}); give another folder, or make room"
        ) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _batch_name(number: int) -> str:
    return f"batch-{number:05}.safetensors"


def _stored(distribution: Distribution, top_k: int | None) -> dict[str, Tensor]:
    assert isinstance(distribution, WholeDistribution)
    if top_k is None:
        return {"log_probabilities": distribution.log_probabilities.half()}
    likeliest = LikeliestTokens.of(distribution.log_probabilities, min(top_k, distribution.vocabulary))
    found = {"log_probabilities": likeliest.log_probabilities, "log_tail": likeliest.log_tail}
    return {**found, "tokens": likeliest.tokens.to(torch.int32)}


class StoredReference:
    """What :func:`save_reference` stored.

    Raises:
        CheckpointError: the folder holds something else, or is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.about: dict[str, Any] = json.loads((folder / REFERENCE_NAME).read_text(encoding="utf-8"))
            self.settings: dict[str, Any] = self.about["settings"]
            self.routers: dict[str, int] = self.about["routers"]
            if self.about["version"] != _VERSION:
                raise CheckpointError(f"{folder}: stored reference of version {self.about['version']}, wanted {_VERSION}")
            windows = self._read("windows.safetensors")["windows"]
            names = ("protocol", "description", "first_target", "independent")
            about = {name: self.about[name] for name in names}
            self.text = EvaluationText(windows=windows, **about)
            self.batch_size: int = self.about["batch_size"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder / REFERENCE_NAME}: not a stored reference ({error}); store it again") from error

    def batches(self, text: EvaluationText, batch_size: int) -> Iterator[ReferenceBatch]:
        """What the original said about each batch of windows, read when it is asked for."""
        assert text is self.text and batch_size == self.batch_size, "a stored reference brings its own windows"
        for number in range(math.ceil(len(text.windows) / batch_size)):
            tensors = self._read(_batch_name(number))
            routing = {n.removeprefix("routing."): t for n, t in tensors.items() if n.startswith("routing.")}
            yield ReferenceBatch(self._distribution(tensors), tensors["losses"], routing)

    def _distribution(self, tensors: Mapping[str, Tensor]) -> Distribution:
        if self.about["top_k"] is None:
            # float16 leaves sums of probabilities a thousandth off one.
            return WholeDistribution(tensors["log_probabilities"].float().log_softmax(-1))
        tokens, values, tail = tensors["tokens"].long(), tensors["log_probabilities"], tensors["log_tail"]
        return LikeliestTokens(tokens, values, tail, self.about["vocabulary"])

    def _read(self, name: str) -> dict[str, Tensor]:
        try:
            with safe_open(self.folder / name, "pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  safe_open is no mapping
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.folder / name}: damaged or missing ({error}); store the reference again") from error


def is_stored_reference(source: str | Path) -> bool:
    """Whether a folder was written by :func:`save_reference`."""
    return (Path(source).expanduser() / REFERENCE_NAME).is_file()


Reference = LiveReference | StoredReference
