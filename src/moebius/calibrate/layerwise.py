"""Running one decoder layer of any transformers model, and keeping what lies between two of them.

No class of decoder is known here. A layer is run by calling the model itself with the forwards of its decoder layers
replaced: those before hand their input on, and the one that is meant takes the stored hidden state in place of what it is
given, together with the masks and rotary embeddings that the model has prepared for it, and then leaves the model's forward
by an exception. What a layer hands to another one by any other way than the hidden state is not carried over.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moebius.errors import OutputError, UnsupportedModelError
from moebius.types import MoeModel

_RECORDED = ("output_router_logits", "output_hidden_states", "output_attentions")


class LayerRunner:
    """Runs parts of a model one at a time. Use it inside :func:`calibrating`."""

    def __init__(self, moe: MoeModel) -> None:
        self._moe = moe
        # How many things each layer returns, 0 for a bare hidden state. A layer is only passed through after it was run.
        self._returned = [0] * len(moe.decoder)

    def embed(self, ids: Tensor) -> Tensor:
        """What the first decoder layer is given for token ids (batch, length)."""
        return self._leave_at(0, ids, lambda hidden, args, kwargs: hidden)

    def layer(self, index: int, ids: Tensor, hidden: Tensor) -> Tensor:
        """The output hidden state of decoder layer ``index`` for its input ``hidden`` and the masks that belong to ``ids``."""
        own_forward = self._moe.decoder[index].forward

        def run(_: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            output = own_forward(hidden, *args, **kwargs)
            if isinstance(output, tuple):
                self._returned[index] = len(output)
                return output[0]
            return output

        return self._leave_at(index, ids, run)

    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """The logits for ``hidden``, the output of the last decoder layer. (batch, length, vocabulary)"""
        last = len(self._moe.decoder) - 1
        forwards = {layer: self._pass_through(index) for index, layer in enumerate(self._moe.decoder)}
        forwards[self._moe.decoder[last]] = lambda *args, **kwargs: self._as_returned(last, hidden)
        with replaced_forwards(forwards):
            return self._moe.model(input_ids=ids, use_cache=False).logits

    def _leave_at(self, index: int, ids: Tensor, run: Any) -> Tensor:
        """Call the model up to decoder layer ``index``, and ``run(hidden, other args, kwargs)`` there."""

        def leave(*args: Any, **kwargs: Any) -> Any:
            hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
            raise _LeftEarly(run(hidden, args, kwargs))

        forwards = {layer: self._pass_through(i) for i, layer in enumerate(self._moe.decoder[:index])}
        try:
            with replaced_forwards({**forwards, self._moe.decoder[index]: leave}):
                self._moe.model(input_ids=ids, use_cache=False)
        except _LeftEarly as left:
            return left.hidden
        raise UnsupportedModelError(
            f"{self._moe.decoder_name}.{index}: the model does not run this layer, so it cannot be calibrated"
        )

    def _pass_through(self, index: int) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._as_returned(index, args[0] if args else kwargs["hidden_states"])

        return forward

    def _as_returned(self, index: int, hidden: Tensor) -> Any:
        count = self._returned[index]
        return (hidden, *[None] * (count - 1)) if count else hidden


class _LeftEarly(Exception):  # noqa: N818, it is no error
    """Carries a hidden state out of the middle of a model's forward."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


#: More hidden states than this are better off on disk: 4 GiB.
STATES_IN_MEMORY = 4 << 30


class HiddenStates:
    """Hidden states by boundary and batch, in memory or in files."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._tensors: dict[tuple[str, int], Tensor] = {}
        self._devices: dict[tuple[str, int], torch.device] = {}

    def put(self, boundary: str, batch: int, hidden: Tensor) -> None:
        """Keep a hidden state.

        Raises:
            OutputError: the disk is full.
        """
        if self._folder is None:
            self._tensors[boundary, batch] = hidden.detach()
            return
        self._devices[boundary, batch] = hidden.device
        try:
            np.save(self._file(boundary, batch), hidden.detach().cpu().numpy())
        except OSError as error:
            raise OutputError(
                f"{self._folder}: cannot write the hidden states of calibration ({error.strerror or error}); "
                "free some space, or calibrate on fewer windows"
            ) from error

    def get(self, boundary: str, batch: int) -> Tensor:
        """What was put there."""
        if self._folder is None:
            return self._tensors[boundary, batch]
        return torch.from_numpy(np.load(self._file(boundary, batch))).to(self._devices[boundary, batch])

    def pop(self, boundary: str, batch: int) -> Tensor:
        """What was put there, which is then forgotten."""
        hidden = self.get(boundary, batch)
        if self._folder is None:
            del self._tensors[boundary, batch]
        else:
            self._file(boundary, batch).unlink()
        return hidden

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


@contextmanager
def calibrating(moe: MoeModel) -> Iterator[None]:
    """Within the context: evaluation mode, frozen weights, nothing recorded, and float32 outside the decoder layers."""
    model = moe.model
    training = {module: module.training for module in model.modules()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    configs = {id(config): config for config in (model.config, model.config.get_text_config())}.values()
    recorded = [(config, name) for config in configs for name in _RECORDED if getattr(config, name, False)]
    try:
        model.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        for config, name in recorded:
            setattr(config, name, False)
        with in_float32(model, without=moe.decoder):
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for parameter in trained:
            parameter.requires_grad_(True)
        for config, name in recorded:
            setattr(config, name, True)


@contextmanager
def in_float32(root: nn.Module, without: nn.Module | None = None) -> Iterator[None]:
    """Within the context, floating-point weights and buffers of ``root`` are float32; then they are the tensors they were."""
    left_out = set() if without is None else set(without.modules())
    parameters: list[tuple[nn.Parameter, Tensor]] = []
    buffers: list[tuple[nn.Module, str, Tensor]] = []
    try:
        for module in root.modules():
            if module in left_out:
                continue
            for parameter in module.parameters(recurse=False):
                if _is_other_float(parameter):
                    parameters.append((parameter, parameter.data))
                    parameter.data = parameter.data.float()
            for name, buffer in module.named_buffers(recurse=False):
                if _is_other_float(buffer):
                    buffers.append((module, name, buffer))
                    setattr(module, name, buffer.float())
        yield
    finally:
        for parameter, data in parameters:
            parameter.data = data
        for module, name, buffer in buffers:
            setattr(module, name, buffer)


def _is_other_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype != torch.float32


@contextmanager
def replaced_forwards(forwards: dict[nn.Module, Any]) -> Iterator[None]:
    """Within the context, each module's ``forward`` is the one given."""
    own = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, forward in own.items():
            if forward is None:
                vars(module).pop("forward", None)
            else:
                module.forward = forward


@contextmanager
def removed(handle: Any) -> Iterator[None]:
    """Within the context, a hook is there; then it is removed."""
    try:
        yield
    finally:
        handle.remove()
