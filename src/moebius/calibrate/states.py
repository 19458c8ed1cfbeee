"""What lies between decoder layers: hidden states and what is handed on beside them, in memory or in files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moebius.errors import OutputError
from moebius.types import MoeModel

#: Where a carried tensor belongs: ``("returned", 1)``, or the name of a mapping and the keys that lead to it there.
Place = tuple[str | int, ...]


@dataclass(frozen=True)
class LayerState:
    """What lies between two decoder layers.

    Attributes:
        hidden: the hidden state. (batch, length, hidden), or what the model makes of it
        carried: what layers hand on beside it, by its place.
    """

    hidden: Tensor
    carried: Mapping[Place, Tensor] = field(default_factory=dict)

    @property
    def shape(self) -> torch.Size:
        """Of the hidden state."""
        return self.hidden.shape

    def tensors(self) -> dict[Place, Tensor]:
        """All of it, the hidden state under the empty place."""
        return {(): self.hidden, **self.carried}

    @classmethod
    def of(cls, tensors: Mapping[Place, Tensor]) -> LayerState:
        """The state of :meth:`tensors`."""
        return cls(tensors[()], {place: tensor for place, tensor in tensors.items() if place})

    def detached(self) -> LayerState:
        """The same numbers, without a graph."""
        return LayerState.of({place: tensor.detach() for place, tensor in self.tensors().items()})

    def differentiable(self) -> dict[Place, Tensor]:
        """The tensors that a gradient can be asked for; the hidden state comes first."""
        return {place: tensor for place, tensor in self.tensors().items() if tensor.is_floating_point()}


#: More hidden states than this are better off on disk: 4 GiB.
STATES_IN_MEMORY = 4 << 30


class HiddenStates:
    """What lies between layers, by boundary and batch, in memory or in files."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._states: dict[tuple[str, int], LayerState] = {}
        self._places: dict[tuple[str, int], list[tuple[Place, torch.device]]] = {}

    def put(self, boundary: str, batch: int, state: LayerState) -> None:
        """Keep a state.

        Raises:
            OutputError: the disk is full.
        """
        state = state.detached()
        if self._folder is None:
            self._states[boundary, batch] = state
            return
        tensors = state.tensors()
        self._places[boundary, batch] = [(place, tensor.device) for place, tensor in tensors.items()]
        try:
            with self._file(boundary, batch).open("wb") as file:
                for tensor in tensors.values():
                    np.save(file, tensor.cpu().numpy())
        except OSError as error:
            raise OutputError(
                f"{self._folder}: cannot write the hidden states of calibration ({error.strerror or error}); "
                "free some space, or calibrate on fewer windows"
            ) from error

    def get(self, boundary: str, batch: int) -> LayerState:
        """What was put there."""
        if self._folder is None:
            return self._states[boundary, batch]
        with self._file(boundary, batch).open("rb") as file:
            found = self._places[boundary, batch]
            return LayerState.of({place: torch.from_numpy(np.load(file)).to(device) for place, device in found})

    def pop(self, boundary: str, batch: int) -> LayerState:
        """What was put there, which is then forgotten."""
        state = self.get(boundary, batch)
        if self._folder is None:
            del self._states[boundary, batch]
        else:
            self._file(boundary, batch).unlink()
        return state

    def _file(self, boundary: str, batch: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{boundary}-{batch}.npy"


def states_bytes(moe: MoeModel, tokens: int, *, gradients: bool) -> int:
    """Bytes of the hidden states that the passes keep at once: of every boundary between layers, or of one layer's two."""
    boundaries = len(moe.decoder) + 1 if gradients else 2
    return 4 * boundaries * tokens * moe.model.config.get_text_config().hidden_size


@contextmanager
def hidden_states(work: Path | None) -> Iterator[HiddenStates]:
    """A :class:`HiddenStates` in a folder of its own below ``work``, removed at the end; in memory if ``work`` is None."""
    if work is None:
        yield HiddenStates(None)
        return
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="hidden-states-", dir=work) as folder:
        yield HiddenStates(Path(folder))
