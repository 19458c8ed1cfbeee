"""One forward and one backward pass over the calibration windows, one decoder layer at a time.

The forward pass keeps the hidden states at the layer boundaries. The backward pass goes from the last layer to the first:
it recomputes a layer from its stored input, sends the stored gradient of its output through it, takes the statistics of its
experts, and lets go of them. Memory is bounded by one layer: its float32 weights, its activations for one batch, its sums.

The loss is the cross-entropy of the next token, averaged over all predicted tokens of all windows, without auxiliary
losses; ``δ`` is its gradient. Everything is computed in float32 whatever the dtype of the weights: the gradients of a mean
over ten thousands of tokens are small numbers, and bfloat16 has three digits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moebius.calibrate.accumulate import ProjectionSums
from moebius.calibrate.layerwise import LayerRunner, calibrating, check_layerwise, computing_device, in_float32, removed
from moebius.calibrate.observe import Observation, observed
from moebius.calibrate.states import HiddenStates, LayerState, Place, hidden_states
from moebius.errors import CalibrationError
from moebius.progress import Progress, Silent
from moebius.types import PROJECTIONS, CalibrationNeeds, ExpertWeights, LayerStats, MoeLayer, MoeModel

#: Brings the weights of a decoder layer into memory for as long as the context lasts.
Resident = Callable[[int], AbstractContextManager[Any]]

_GRADIENT = "gradient"


#: From the float32 weights of a layer, the shared left factor ``A`` (out, rank) of the projections that have one.
LeftFactors = Callable[[ExpertWeights], dict[str, Tensor]]


def stream_statistics(
    moe: MoeModel,
    windows: Tensor,
    needs: CalibrationNeeds,
    *,
    left_factors: LeftFactors | None = None,
    batch_size: int = 8,
    skip: Collection[str] = (),
    work: Path | None = None,
    resident: Resident = lambda index: nullcontext(),
    progress: Progress | None = None,
) -> Iterator[LayerStats]:
    """The statistics of one MoE layer after the other: last to first with gradients, first to last without.

    Let go of one layer's statistics before asking for the next: nothing here holds on to them. While a layer's are handed
    out its weights are there, in their own dtype, and the forwards of the decoder are its own.

    Args:
        moe: the model; all of it is as before once the iterator is exhausted or closed.
        windows: (windows, window_length) int64 token ids.
        needs: what is wanted.
        left_factors: of the projections that have one; their ``S`` and ``γ`` are then those of ``Aᵀ δ``; ``G`` is
            always that of ``δ``.
        batch_size: windows per forward.
        skip: names of MoE layers that are passed through without taking statistics.
        work: folder in which the hidden states are kept; None keeps them in memory. They are 4 bytes · tokens · hidden for
            every decoder layer.
        resident: entered around all work on a decoder layer, with its index; for weights that are not in memory.
        progress: told about stages and layers.

    Raises:
        CalibrationError: the loss is not finite.
        OutputError: ``work`` is on a disk that is full.
    """
    progress = progress or Silent()
    wanted: dict[int, list[MoeLayer]] = {}
    for layer in moe.moe_layers:
        if layer.name not in skip:
            wanted.setdefault(layer.decoder_layer, []).append(layer)
    if not wanted:
        return
    # Layers that are skipped are observed all the same: their own forward sums in another order, and what it hands on would
    # make a run that was stopped differ from one that was not.
    observing: dict[int, list[MoeLayer]] = {}
    for layer in moe.moe_layers:
        observing.setdefault(layer.decoder_layer, []).append(layer)
    check_layerwise(moe, windows)
    first, depth = min(wanted), len(moe.decoder) if needs.gradients else max(wanted) + 1
    with ExitStack() as stack:
        stack.enter_context(calibrating(moe))
        states = stack.enter_context(hidden_states(work))
        batches = windows.to(computing_device(moe)).split(batch_size)
        passes = _Passes(moe, batches, needs, left_factors, states, LayerRunner(moe), observing)
        passes.embed()
        progress.stage("calibration: forward", depth)
        for index in range(depth):
            with resident(index):
                sums = passes.forward(index, [] if needs.gradients else wanted.get(index, []))
                progress.advance(f"{moe.decoder_name}.{index}")
                while sums:
                    yield sums.pop(0).result()
        if not needs.gradients:
            return
        passes.tail()
        progress.stage("calibration: backward", depth - first)
        for index in reversed(range(first, depth)):
            with resident(index):
                sums = passes.backward(index, wanted.get(index, []))
                progress.advance(f"{moe.decoder_name}.{index}")
                while sums:
                    yield sums.pop().result()


@dataclass(frozen=True)
class _Passes:
    """The steps of both passes, for all batches of token ids (batch, window_length)."""

    moe: MoeModel
    batches: Sequence[Tensor]
    needs: CalibrationNeeds
    left_factors: LeftFactors | None
    states: HiddenStates
    runner: LayerRunner
    observing: dict[int, list[MoeLayer]]

    @torch.no_grad()
    def embed(self) -> None:
        """The hidden states that enter the first decoder layer."""
        for number, ids in enumerate(self.batches):
            self.states.put("0", number, self.runner.embed(ids))

    @torch.no_grad()
    def forward(self, index: int, layers: list[MoeLayer]) -> list[_LayerSums]:
        """Run decoder layer ``index``; take statistics of what entered the projections of ``layers``."""
        # The backward pass comes back for the inputs of the layers.
        take = self.states.get if self.needs.gradients else self.states.pop
        with self._layer(index, layers) as sums:
            for number, ids in enumerate(self.batches):
                watched = [] if self.needs.gradients else self.observing.get(index, [])
                with observed(watched) as seen, _routers_watched(sums):
                    output = self.runner.layer(index, ids, take(str(index), number))
                self.states.put(str(index + 1), number, output)
                for layer, observation in seen:
                    if layer in layers:
                        sums[layers.index(layer)].add(observation)
            return sums

    @torch.enable_grad()
    def tail(self) -> None:
        """Final norm, head and loss: the gradient at the output of the last decoder layer."""
        predicted = sum(ids[:, 1:].numel() for ids in self.batches)
        for number, ids in enumerate(self.batches):
            gradients = []
            # One window at a time: logits are as wide as the vocabulary.
            outputs = self.states.pop(str(len(self.moe.decoder)), number).hidden
            for window, output in zip(ids.split(1), outputs.split(1), strict=True):
                hidden = output.requires_grad_()
                logits = self.runner.logits(window, hidden)[:, :-1].float()
                loss = nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten(), reduction="sum") / predicted
                if not torch.isfinite(loss):
                    raise CalibrationError(
                        f"calibration: the loss of a window is {loss.item()}, wanted a finite number; "
                        "are the weights intact, and does the tokenizer belong to the model?"
                    )
                gradients += torch.autograd.grad(loss, hidden)
            self.states.put(_GRADIENT, number, LayerState(torch.cat(gradients)))

    @torch.enable_grad()
    def backward(self, index: int, layers: list[MoeLayer]) -> list[_LayerSums]:
        """Send the gradient back through decoder layer ``index``; take the statistics of ``layers``."""
        with self._layer(index, layers) as sums:
            for number, ids in enumerate(self.batches):
                state = self.states.pop(str(index), number)
                for tensor in state.differentiable().values():
                    tensor.requires_grad_()
                with observed(self.observing.get(index, [])) as seen, _routers_watched(sums):
                    output = self.runner.layer(index, ids, state)
                watched = [observation.outputs[name] for _, observation in seen for name in PROJECTIONS]
                gradient, at_outputs = _gradients(state, output, self.states.pop(_GRADIENT, number), watched)
                self.states.put(_GRADIENT, number, gradient)
                for layer, observation in seen:
                    of_projection = {name: at_outputs.pop(0) for name in PROJECTIONS}
                    if layer in layers:
                        sums[layers.index(layer)].add(observation, of_projection)
            return sums

    @contextmanager
    def _layer(self, index: int, layers: list[MoeLayer]) -> Iterator[list[_LayerSums]]:
        """A decoder layer with its weights in float32, and empty sums for its MoE layers."""
        with in_float32(self.moe.decoder[index]):
            yield [_LayerSums(layer, self.needs, self.left_factors) for layer in layers]


def _gradients(
    state: LayerState, output: LayerState, at_output: LayerState, watched: Sequence[Tensor]
) -> tuple[LayerState, list[Tensor]]:
    """The gradient at everything that entered a layer, and at the tensors ``watched`` within it."""
    leaves, given = state.differentiable(), at_output.tensors()
    results = {place: tensor for place, tensor in output.differentiable().items() if place in given and tensor.requires_grad}
    found = torch.autograd.grad(
        list(results.values()), [*leaves.values(), *watched], [given[place] for place in results], allow_unused=True
    )
    at_leaves: dict[Place, Tensor] = {}
    for place, gradient in zip(leaves, found, strict=False):
        # What no later layer has used has no gradient; the hidden state always has one.
        if gradient is not None or not place:
            at_leaves[place] = leaves[place].new_zeros(leaves[place].shape) if gradient is None else gradient
    at_watched = [
        torch.zeros_like(tensor) if gradient is None else gradient
        for tensor, gradient in zip(watched, found[len(leaves) :], strict=True)
    ]
    return LayerState.of(at_leaves), at_watched


class _LayerSums:
    """The sums of both projections of a MoE layer, and of its router. To be made while its weights are in float32."""

    def __init__(self, layer: MoeLayer, needs: CalibrationNeeds, left_factors: LeftFactors | None) -> None:
        self.layer = layer
        layout, weights = layer.layout, layer.layout.weights(layer.name, layer.experts)
        left = left_factors(weights) if needs.gradients and left_factors is not None else {}
        self._projections = {}
        for name in PROJECTIONS:
            _, outputs, inputs = weights.projection(name).shape
            self._projections[name] = ProjectionSums(
                layout.experts,
                inputs,
                outputs,
                needs,
                left=left.get(name),
                output_fisher=needs.output_fisher and name == "down",
                device=weights.down.device,
            )
        self.router_moment: Tensor | None = None
        if needs.router_moment and layer.router is not None:
            router: Any = layer.router
            width = router.weight.shape[1]
            self.router_moment = torch.zeros(width, width, device=weights.down.device)

    def add(self, observation: Observation, gradients: dict[str, Tensor] | None = None) -> None:
        for name, sums in self._projections.items():
            gradient = None if gradients is None else gradients[name]
            sums.add(observation.assignment, observation.inputs[name].detach(), gradient, observation.routing)

    def result(self) -> LayerStats:
        return LayerStats(
            name=self.layer.name,
            gate_up=self._projections["gate_up"].result(),
            down=self._projections["down"].result(),
            router_moment=self.router_moment,
        )


@contextmanager
def _routers_watched(sums: Sequence[_LayerSums]) -> Iterator[None]:
    """Within the context, what enters a router is added to its moment."""
    with ExitStack() as stack:
        for total in sums:
            if total.router_moment is not None and total.layer.router is not None:
                stack.enter_context(removed(total.layer.router.register_forward_pre_hook(_adds_to(total.router_moment))))
        yield


def _adds_to(moment: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        rows = args[0].detach().reshape(-1, moment.shape[0]).float()
        moment.addmm_(rows.T, rows)

    return hook
