"""Running one decoder layer of any transformers model, and keeping what lies between two of them.

No class of decoder is known here. A layer is run by calling the model itself with the forwards of its decoder layers
replaced: those before hand their input on, and the one that is meant takes the stored hidden state in place of what it is
given, together with the masks and rotary embeddings that the model has prepared for it, and then leaves the model's forward
by an exception. What a layer hands to the next ones beside the hidden state goes with it: what it returns after it (the
state of a router, the picks of an indexer) and what it leaves in a mapping that all layers are given (shared keys and values).
Anything else that a model does between two layers is not carried over; :func:`check_layerwise` refuses such a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moebius.calibrate.states import LayerState, Place
from moebius.errors import MoebiusError, UnsupportedModelError, first_line
from moebius.types import MoeModel

_RECORDED = ("output_router_logits", "output_hidden_states", "output_attentions")


class LayerRunner:
    """Runs parts of a model one at a time. Use it inside :func:`calibrating` or :func:`frozen`."""

    def __init__(self, moe: MoeModel) -> None:
        self._moe = moe
        # How many things each layer returns, 0 for a bare hidden state. A layer is only passed through after it was run.
        self._returned = [0] * len(moe.decoder)

    def embed(self, ids: Tensor) -> LayerState:
        """What the first decoder layer is given for token ids (batch, length)."""
        return self._leave_at(0, ids, None, lambda hidden, args, kwargs: LayerState(hidden))

    def layer(self, index: int, ids: Tensor, state: LayerState) -> LayerState:
        """What decoder layer ``index`` makes of ``state``, with the masks that belong to ``ids``."""
        own_forward = self._moe.decoder[index].forward

        def run(_: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerState:
            mappings = {name: value for name, value in kwargs.items() if isinstance(value, MutableMapping)}
            _restore(mappings, state.carried)
            before = {name: dict(mapping) for name, mapping in mappings.items()}
            output = own_forward(state.hidden, *args, **kwargs)
            carried: dict[Place, Tensor] = {}
            for name, mapping in mappings.items():
                for key, value in mapping.items():
                    known = any(place[:2] == (name, key) for place in state.carried)
                    if known or value is not before[name].get(key):
                        carried.update(_leaves((name, key), value))
            if not isinstance(output, tuple):
                return LayerState(output, carried)
            self._returned[index] = len(output)
            for position, value in enumerate(output[1:], 1):
                carried.update(_leaves(("returned", position), value))
            return LayerState(output[0], carried)

        return self._leave_at(index, ids, state, run)

    def logits(self, ids: Tensor, state: LayerState | Tensor) -> Tensor:
        """The logits for ``state``, the output of the last decoder layer. (batch, length, vocabulary)"""
        state = state if isinstance(state, LayerState) else LayerState(state)
        last = len(self._moe.decoder) - 1
        forwards = {layer: self._pass_through(index, state) for index, layer in enumerate(self._moe.decoder)}
        forwards[self._moe.decoder[last]] = lambda *args, **kwargs: self._as_returned(last, state.hidden, state)
        with replaced_forwards(forwards):
            return self._moe.model(input_ids=ids, use_cache=False).logits

    def _leave_at(self, index: int, ids: Tensor, state: LayerState | None, run: Any) -> LayerState:
        """Call the model up to decoder layer ``index``, and ``run(hidden, other args, kwargs)`` there."""

        def leave(*args: Any, **kwargs: Any) -> Any:
            hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
            raise _LeftEarly(run(hidden, args, kwargs))

        forwards = {layer: self._pass_through(i, state) for i, layer in enumerate(self._moe.decoder[:index])}
        try:
            with replaced_forwards({**forwards, self._moe.decoder[index]: leave}):
                self._moe.model(input_ids=ids, use_cache=False)
        except _LeftEarly as left:
            return left.state
        raise UnsupportedModelError(
            f"{self._moe.decoder_name}.{index}: the model does not run this layer, so it cannot be calibrated"
        )

    def _pass_through(self, index: int, state: LayerState | None) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._as_returned(index, args[0] if args else kwargs["hidden_states"], state)

        return forward

    def _as_returned(self, index: int, hidden: Tensor, state: LayerState | None) -> Any:
        """As layer ``index`` returns it; what it returned beside the hidden state is that of the last layer that was run."""
        count = self._returned[index]
        if not count:
            return hidden
        carried = {} if state is None else state.carried
        return (hidden, *[_rebuilt(("returned", position), carried) for position in range(1, count)])


def _leaves(place: Place, value: Any) -> dict[Place, Tensor]:
    """The tensors of a value, which may be a sequence or mapping of them, by their places."""
    if isinstance(value, Tensor):
        return {place: value}
    parts: dict[Place, Tensor] = {}
    if isinstance(value, tuple | list):
        for position, part in enumerate(value):
            parts.update(_leaves((*place, position), part))
    return parts


def _rebuilt(place: Place, carried: Mapping[Place, Tensor]) -> Any:
    """What :func:`_leaves` took apart: a tensor, a tuple, or None if nothing was carried."""
    if place in carried:
        return carried[place]
    below = {other[len(place)] for other in carried if other[: len(place)] == place and len(other) > len(place)}
    return tuple(_rebuilt((*place, position), carried) for position in range(len(below))) if below else None


def _restore(mappings: Mapping[str, MutableMapping[Any, Any]], carried: Mapping[Place, Tensor]) -> None:
    for place in carried:
        if place[0] in mappings:
            mappings[str(place[0])][place[1]] = _rebuilt(place[:2], carried)


#: Tokens of the window that :func:`check_layerwise` runs: enough for every layer to hand something on.
_CHECKED_TOKENS = 64
_CHECKED_DIFFERENCE = 1e-3


@torch.no_grad()
def check_layerwise(moe: MoeModel, windows: Tensor) -> None:
    """Run the start of one window as a whole and layer by layer, and refuse a model that does not give the same.

    Both runs are in the dtype of the weights and in the same order of sums, so there is no rounding between them.

    Args:
        windows: (windows, window_length) token ids; the first 64 of the first are run.

    Raises:
        UnsupportedModelError: the logits differ, or a layer cannot be run alone.
    """
    ids = windows[:1, :_CHECKED_TOKENS].to(computing_device(moe))
    kind, place = type(moe.model).__name__, "its embeddings"
    with frozen(moe):
        whole = moe.model(input_ids=ids, use_cache=False).logits.float()
        runner = LayerRunner(moe)
        try:
            state = runner.embed(ids)
            for index in range(len(moe.decoder)):
                place = f"{moe.decoder_name}.{index}"
                state = runner.layer(index, ids, state)
            place = "what follows the last layer"
            got = runner.logits(ids, state).float()
        except MoebiusError:
            raise
        except Exception as error:  # the whole model ran: what fails now is whatever a layer does without its due
            raise UnsupportedModelError(_not_alone(kind, place, f"{type(error).__name__}: {first_line(error)}")) from error
    off = (got - whole).nan_to_num().norm(dim=-1) / whole.nan_to_num().norm(dim=-1).clamp(min=1e-9)
    if (worst := float(off.max())) > _CHECKED_DIFFERENCE:
        share = float((off > _CHECKED_DIFFERENCE).float().mean())
        found = f"the logits of {share:.0%} of the tokens differ from the whole model's, by up to {worst:.2g} of their size"
        raise UnsupportedModelError(_not_alone(kind, moe.decoder_name, found))


def _not_alone(kind: str, place: str, found: str) -> str:
    return (
        f"{kind}: {place} cannot be run layer by layer as calibration does ({found}): its layers hand on something that "
        "Moebius does not carry; use a method that needs no calibration, such as --method rtn"
    )


class _LeftEarly(Exception):  # noqa: N818, it is no error
    """Carries a state out of the middle of a model's forward."""

    def __init__(self, state: LayerState) -> None:
        super().__init__()
        self.state = state


@contextmanager
def calibrating(moe: MoeModel) -> Iterator[None]:
    """Within the context: evaluation mode, frozen weights, nothing recorded, and float32 outside the decoder layers."""
    with frozen(moe), in_float32(moe.model, without=moe.decoder):
        yield


@contextmanager
def frozen(moe: MoeModel) -> Iterator[None]:
    """Within the context: evaluation mode, frozen weights, nothing recorded."""
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
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for parameter in trained:
            parameter.requires_grad_(True)
        for config, name in recorded:
            setattr(config, name, True)


def computing_device(moe: MoeModel) -> torch.device:
    """Where the model computes; weights that are read when they are used are on the meta device meanwhile."""
    return next(tensor.device for tensor in [*moe.model.parameters(), *moe.model.buffers()] if not tensor.is_meta)


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
