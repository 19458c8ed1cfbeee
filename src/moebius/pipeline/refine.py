"""Distillation of what is continuous in a packed model: scales and bases, trained so that its logits become the original's.

The loss is the mean KL divergence of the next-token distributions over the calibration windows. Signs, plane widths, bits and
everything outside the experts stay as they are, so the checkpoint has the same size to the byte.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from moebius.calibrate.grouped import Assignment, grouped_linear
from moebius.calibrate.layerwise import LayerRunner, calibrating, computing_device, in_float32, replaced_forwards
from moebius.calibrate.observe import Product, observed_forward
from moebius.calibrate.stream import Resident
from moebius.errors import CalibrationError
from moebius.formats.projection import PackedProjection
from moebius.progress import Progress
from moebius.quantize.trainable import TrainableCodes, TrainableProjection, trainable
from moebius.types import PROJECTIONS, MoeLayer, MoeModel

_BATCH = 4  # windows per step
_WARM_UP = 10  # steps
_RATE = 1e-2  # change of a logarithm, or of an entry of a basis relative to its size, per step
_BETAS = (0.9, 0.99)

#: By name of the layer, both projections.
PackedLayers = Mapping[str, Mapping[str, PackedProjection]]


def refine(
    moe: MoeModel,
    layers: PackedLayers,
    windows: Tensor,
    *,
    steps: int,
    seed: int,
    progress: Progress,
    resident: Resident = lambda index: nullcontext(),
    rest: Resident = lambda index: nullcontext(),
) -> tuple[dict[str, dict[str, PackedProjection]], list[float]]:
    """Train the scales and bases of packed experts for some steps of Adam.

    In memory beside all of the model but its expert matrices, in float32: 4 bytes for every expert weight that has planes,
    three times that for what is trained, the last hidden states of the original for all windows, and the activations of all
    layers for four windows.

    Args:
        moe: the original; as before afterwards.
        layers: its experts, packed by a method that stores planes behind a shared basis.
        windows: (windows, window_length) token ids.
        steps: of four windows each.
        seed: of the order of the windows.
        progress: told about every step.
        resident: entered around the work on a decoder layer of the original, with its index.
        rest: entered for as long as the layers are trained, with the index of each; their expert matrices are not used then.

    Returns:
        The layers, packed again in as many bytes, and the loss before each step, in nats per token.

    Raises:
        CalibrationError: the loss is not finite.
    """
    student = {name: {p: trainable(packed[p]) for p in PROJECTIONS} for name, packed in layers.items()}
    windows = windows.to(computing_device(moe))
    with calibrating(moe), ExitStack() as stack:
        wanted = _last_states(moe, windows, resident)
        experts = nn.ModuleList(layer.experts for layer in moe.moe_layers)
        forwards = {layer.experts: _forward(layer, student[layer.name]) for layer in moe.moe_layers}
        for index in range(len(moe.decoder)):
            stack.enter_context(rest(index))
        with in_float32(moe.decoder, without=experts), replaced_forwards(forwards):
            losses = _train(moe, student, windows, wanted, steps, seed, progress)
    return {name: {p: trained.packed() for p, trained in pair.items()} for name, pair in student.items()}, losses


@torch.no_grad()
def _last_states(moe: MoeModel, windows: Tensor, resident: Resident) -> Tensor:
    """What the original's last decoder layer puts out, one layer in float32 at a time. (windows, length, hidden)"""
    runner, batches = LayerRunner(moe), windows.split(_BATCH)
    states = [runner.embed(ids) for ids in batches]
    for index, decoder_layer in enumerate(moe.decoder):
        with resident(index), in_float32(decoder_layer):
            states = [runner.layer(index, ids, state) for ids, state in zip(batches, states, strict=True)]
    return torch.cat([state.hidden for state in states])


@torch.enable_grad()
def _train(
    moe: MoeModel,
    student: Mapping[str, Mapping[str, TrainableProjection | TrainableCodes]],
    windows: Tensor,
    wanted: Tensor,
    steps: int,
    seed: int,
    progress: Progress,
) -> list[float]:
    """Adam with a short warm-up, then down along a cosine."""
    trained = [projection for pair in student.values() for projection in pair.values()]
    # Directions have unit length: their entries are of size 1/sqrt(length).
    groups = [{"params": [t.log_directions, t.log_entries], "scale": _RATE} for t in trained]
    bases = [t for t in trained if isinstance(t, TrainableProjection)]
    groups += [{"params": [t.directions], "scale": _RATE / math.sqrt(t.directions.shape[1])} for t in bases]
    optimizer = torch.optim.Adam(groups, betas=_BETAS)
    runner, generator = LayerRunner(moe), torch.Generator().manual_seed(seed)
    losses: list[float] = []
    waiting: list[int] = []
    progress.stage("refining", steps)
    for step in range(steps):
        if len(waiting) < min(_BATCH, len(windows)):
            waiting = torch.randperm(len(windows), generator=generator).tolist()
        picked, waiting = waiting[:_BATCH], waiting[_BATCH:]
        pace = min(1.0, (step + 1) / _WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = group["scale"] * pace
        optimizer.zero_grad()
        losses.append(_backward(moe, runner, windows[picked], wanted[picked]))
        if not math.isfinite(losses[-1]):
            raise CalibrationError(f"refine: got a divergence of {losses[-1]} at step {step + 1}, wanted a finite number")
        optimizer.step()
        progress.advance(f"{losses[-1]:.4f} nats")
    return losses


def _backward(moe: MoeModel, runner: LayerRunner, ids: Tensor, wanted: Tensor) -> float:
    """Gradients of the divergence on some windows, and the divergence."""
    between = runner.embed(ids)
    for index in range(len(moe.decoder)):
        between = runner.layer(index, ids, between)
    states = between.hidden
    # One window at a time: logits are as wide as the vocabulary.
    total, at_states = 0.0, []
    for window, state, original in zip(ids.split(1), states.detach().split(1), wanted.split(1), strict=True):
        state.requires_grad_()
        with torch.no_grad():
            reference = runner.logits(window, original).float().log_softmax(-1)
        divergence = (
            nn.functional.kl_div(
                runner.logits(window, state).float().log_softmax(-1), reference, reduction="sum", log_target=True
            )
            / ids.numel()
        )
        total += divergence.item()
        at_states += torch.autograd.grad(divergence, state)
    states.backward(torch.cat(at_states))
    return total


def _forward(layer: MoeLayer, projections: Mapping[str, TrainableProjection | TrainableCodes]) -> Any:
    """The forward of an experts module that computes with the trained projections in place of its matrices."""

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        products = {name: _product(projections[name]) for name in PROJECTIONS}
        return observed_forward(layer.experts, layer.layout, hidden_states, top_k_index, top_k_weights, products)[0]

    return forward


def _product(projection: TrainableProjection | TrainableCodes) -> Product:
    """Scales meet the rows, not the matrices: the gradient of a scale then needs no gradient of a matrix."""

    def product(rows: Tensor, assignment: Assignment) -> Tensor:
        # A product with zeros and ones and not a pick: the gradient of a pick adds up in an order that is left open.
        chosen = nn.functional.one_hot(assignment.expert_of_row, len(assignment.counts)).float()  # (rows, experts)
        directions, entries = (chosen @ scales for scales in projection.scales())
        basis = projection.basis()
        if basis is None:
            return grouped_linear(rows * directions, projection.levels, assignment) * entries
        if projection.before_factor:
            return grouped_linear((rows @ basis.mT) * directions, projection.levels, assignment) * entries
        return (grouped_linear(rows * entries, projection.levels, assignment) * directions) @ basis

    return product
