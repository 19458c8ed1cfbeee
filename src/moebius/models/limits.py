"""Which tokens a model knows, and how long a text it was made for."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

from torch import Tensor

from moebius.errors import CheckpointError

_log = logging.getLogger("moebius")


def positions_of(config: Any) -> int | None:
    """How many positions a model has; None where its config does not say."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def tell_of_positions(config: Any, length: int) -> None:
    """Say once that a text of so many tokens is longer than what the model has positions for."""
    positions = positions_of(config)
    if positions is not None and length > positions:
        _tell(length, positions)


@cache
def _tell(length: int, positions: int) -> None:
    _log.warning(
        "%d tokens are longer than the model's %d positions: what it makes of those beyond is not what it was trained for; "
        "ask for shorter texts",
        length,
        positions,
    )


def check_tokens(model: Any, ids: Tensor) -> None:
    """Refuse tokens that the model has no embeddings for, before they are looked up.

    Args:
        model: of transformers; the meta device is enough.
        ids: token ids, of any shape.

    Raises:
        CheckpointError: a tokenizer that belongs to another model.
    """
    rows = len(model.get_input_embeddings().weight)
    if ids.numel() and int(ids.max()) >= rows:
        raise CheckpointError(
            f"the tokenizer gives token {int(ids.max())}, but the model has {rows} embeddings (0 to {rows - 1}); "
            "is it the tokenizer of this model?"
        )
