"""Recovery block by block: one decoder layer at a time is trained to put out, on what the quantized layers before it hand on,
what the original puts out on its own.

That is block-wise reconstruction (BRECQ, Li et al., 2021) with the inputs of the quantized model. Memory is that of one decoder
layer, its optimizer, and the hidden states of both models at one boundary. Everything outside the experts stays as it is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from moebius.calibrate.grouped import Assignment, grouped_linear
from moebius.calibrate.layerwise import LayerRunner, calibrating, computing_device, in_float32, replaced_forwards
from moebius.calibrate.observe import Product, observed_forward
from moebius.calibrate.states import HiddenStates, hidden_states
from moebius.calibrate.stream import Resident
from moebius.errors import CalibrationError
from moebius.pipeline.student import Forward, Order, Pair, Student, Training, product_dtype
from moebius.progress import Progress
from moebius.types import PROJECTIONS, MoeLayer, MoeModel

_BATCH = 4  # windows per step
_HELD_OUT = 8  # one window of so many says when to stop
_CHECKS = 4  # looks at those per layer

#: What is known of a layer that is packed but not recovered: its projections, and the metric of errors of its output or None.
Packed = tuple[Pair, Tensor | None]


@dataclass(frozen=True)
class Recovered:
    """A MoE layer after its training.

    Attributes:
        name: of the layer.
        packed: in as many bytes as before.
        errors: of the output of its decoder layer on windows that were not trained on, relative to the output and as the loss
            weighs it: before, and with what was kept.
    """

    name: str
    packed: Pair
    errors: tuple[float, float]


@dataclass(frozen=True)
class Budget:
    """When a layer is trained enough: after so many steps, or seconds if they are over before."""

    steps: int
    seconds: float = math.inf


def recover(
    moe: MoeModel,
    windows: Tensor,
    packed: Callable[[str], Packed],
    *,
    finished: Mapping[str, Pair],
    budget: Budget,
    signs: bool,
    seed: int,
    work: Path | None,
    progress: Progress,
    resident: Resident = lambda index: nullcontext(),
) -> Iterator[Recovered]:
    """Train the MoE layers that are not finished, first to last.

    Args:
        moe: the original; as before once the iterator is exhausted or closed.
        windows: (windows, window_length) token ids. An eighth of them are not trained on and say when to stop.
        packed: of a layer by name.
        finished: layers of an earlier run that was stopped.
        budget: of each layer.
        signs: whether signs are trained, or only scales and bases.
        seed: of the order of the windows.
        work: folder in which hidden states are kept; None keeps them in memory.
        progress: told about every layer.
        resident: entered around the work on a decoder layer of the original, with its index.

    Raises:
        CalibrationError: the error of a layer is not finite.
    """
    by_decoder: dict[int, list[MoeLayer]] = {}
    for layer in moe.moe_layers:
        by_decoder.setdefault(layer.decoder_layer, []).append(layer)
    batches = windows.to(computing_device(moe)).split(_BATCH)
    progress.stage("recovery", max(by_decoder) + 1)
    with calibrating(moe), hidden_states(work) as states:
        walk = _Walk(moe, batches, states)
        walk.embed()
        for index in range(max(by_decoder) + 1):
            layers = by_decoder.get(index, [])
            with resident(index), in_float32(moe.decoder[index]):
                walk.original(index)
                pairs = {layer.name: finished[layer.name] for layer in layers if layer.name in finished}
                if len(pairs) < len(layers):
                    errors = _train_block(walk, index, layers, packed, pairs, budget, signs, seed)
                    for layer in layers:
                        yield Recovered(layer.name, pairs[layer.name], errors)
                walk.quantized(index, layers, pairs)
            progress.advance(f"{moe.decoder_name}.{index}")


@dataclass
class _Walk:
    """Both models, one decoder layer at a time: what lies before it, and what the original makes of that."""

    moe: MoeModel
    batches: Sequence[Tensor]
    states: HiddenStates
    runner: LayerRunner = field(init=False)
    parted: bool = False

    def __post_init__(self) -> None:
        self.runner = LayerRunner(self.moe)

    @torch.no_grad()
    def embed(self) -> None:
        for number, ids in enumerate(self.batches):
            self.states.put("original", number, self.runner.embed(ids))

    @torch.no_grad()
    def original(self, index: int) -> None:
        """What the original puts out takes the place of what went in; that stays where the quantized model has no own yet."""
        for number, ids in enumerate(self.batches):
            state = self.states.pop("original", number)
            if not self.parted:
                self.states.put("quantized", number, state)
            self.states.put("original", number, self.runner.layer(index, ids, state))

    @torch.no_grad()
    def quantized(self, index: int, layers: Sequence[MoeLayer], pairs: Mapping[str, Pair]) -> None:
        """What the quantized model puts out takes the place of what went in."""
        if not layers and not self.parted:  # both are still the same
            return
        self.parted = True
        with replaced_forwards({layer.experts: unpacked_forward(layer, pairs[layer.name]) for layer in layers}):
            for number, ids in enumerate(self.batches):
                state = self.states.pop("quantized", number)
                self.states.put("quantized", number, self.runner.layer(index, ids, state))


@torch.enable_grad()
def _train_block(
    walk: _Walk,
    index: int,
    layers: Sequence[MoeLayer],
    packed: Callable[[str], Packed],
    pairs: dict[str, Pair],
    budget: Budget,
    signs: bool,
    seed: int,
) -> tuple[float, float]:
    """Train the experts of a decoder layer, and put what they became into ``pairs``; the errors before and after."""
    begin = time.perf_counter()
    device = computing_device(walk.moe)
    dtype = product_dtype(device)
    known = {layer.name: packed(layer.name) for layer in layers}
    students = []
    for layer in layers:
        weights = layer.layout.weights(layer.name, layer.experts) if signs else None
        students.append(Student(layer, known[layer.name][0], weights=weights, dtype=dtype))
    root = _root(next((metric for _, metric in known.values() if metric is not None), None), device)
    held_out = max(1, len(walk.batches) // _HELD_OUT) if len(walk.batches) > 1 else 0
    trained = len(walk.batches) - held_out
    block = _Block(walk, index, root, {s.layer.experts: s.forward for s in students})
    watched = list(range(trained, len(walk.batches))) or [0]
    before = best = block.mean_error(watched)
    if not math.isfinite(before):
        raise CalibrationError(f"{layers[0].name}: the error of the packed layer is {before}, wanted a finite number")
    kept: list[Tensor] | None = None
    training, order = Training(students), Order(trained, 1, seed)
    for step in range(budget.steps):
        share = max(step / budget.steps, (time.perf_counter() - begin) / budget.seconds)
        if share >= 1:
            break
        training.begin()
        error = block.error(order.pick()[0]) / before
        error.backward()
        training.step(step, share)
        if (step + 1) % max(1, budget.steps // _CHECKS) == 0 or step + 1 == budget.steps:
            now = block.mean_error(watched)
            if now < best:
                best, kept = now, [p.detach().clone() for s in students for p in s.parameters()]
    for student in students:
        pairs[student.layer.name] = known[student.layer.name][0]
    if kept is not None:
        for parameter, value in zip((p for s in students for p in s.parameters()), kept, strict=True):
            parameter.data = value
        pairs.update({student.layer.name: student.packed() for student in students})
    return before, best


@dataclass
class _Block:
    """A decoder layer with other experts, on what the quantized layers before it put out."""

    walk: _Walk
    index: int
    root: Tensor | None
    forwards: Mapping[nn.Module, Forward]

    def error(self, number: int) -> Tensor:
        """Mean over the tokens of a batch of the squared error, relative to the size of the original's output."""
        state = self.walk.states.get("quantized", number)
        wanted = self.walk.states.get("original", number).hidden
        with replaced_forwards(dict(self.forwards)):
            got = self.walk.runner.layer(self.index, self.walk.batches[number], state).hidden
        error = got - wanted
        if self.root is not None and len(self.root) == error.shape[-1]:  # experts of some models put out something narrower
            error = error @ self.root
        # The norm before the next layer divides by the size of the state: what is felt of an error is relative to it.
        return (error.square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-12)).mean()

    @torch.no_grad()
    def mean_error(self, numbers: Sequence[int]) -> float:
        return sum(float(self.error(number)) for number in numbers) / len(numbers)


def _root(metric: Tensor | None, device: torch.device) -> Tensor | None:
    """The symmetric root of a metric."""
    if metric is None:
        return None
    values, vectors = torch.linalg.eigh(metric.double())
    return ((vectors * values.clamp_min(0).sqrt()) @ vectors.mT).float().to(device)


def unpacked_forward(layer: MoeLayer, pair: Pair) -> Forward:
    """The forward of an experts module with the matrices that are stored, in float32."""
    products: dict[str, Product] = {}
    for name in PROJECTIONS:
        products[name] = partial(_times, pair[name].unpack())

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return observed_forward(layer.experts, layer.layout, hidden_states, top_k_index, top_k_weights, products)[0]

    return forward


def _times(matrices: Tensor, rows: Tensor, assignment: Assignment) -> Tensor:
    return grouped_linear(rows, matrices, assignment)
