"""A checkpoint opened for a run: its model as a skeleton, and the weights that come when they are used."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moebius.checkpoint.reader import SourceCheckpoint
from moebius.checkpoint.streamed import StreamedWeights
from moebius.models.load import describe, skeleton
from moebius.types import MoeModel


@dataclass(frozen=True)
class StreamedModel:
    """A model that is never in memory as a whole.

    Attributes:
        checkpoint: its files.
        moe: the model and its parts.
        weights: what brings decoder layers and single parameters into memory.
    """

    checkpoint: SourceCheckpoint
    moe: MoeModel
    weights: StreamedWeights


def open_model(checkpoint: SourceCheckpoint, device: str | torch.device = "cpu") -> StreamedModel:
    """The model of a checkpoint in the dtype that its weights are stored in; only what is small is read.

    Args:
        checkpoint: the source.
        device: where weights come to, and so where the model computes.

    Raises:
        UnsupportedModelError: a dense model, or experts that Moebius does not know.
        CheckpointError: tensors that are missing or of another shape than the config says.
    """
    moe = skeleton(checkpoint.folder, checkpoint.dtype)
    weights = StreamedWeights(checkpoint, moe, device)
    return StreamedModel(checkpoint, describe(moe.model), weights)  # again: now it is known what is tied
