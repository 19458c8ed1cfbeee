"""Distillation of what is continuous in a packed model: scales and bases, trained so that its logits become the original's.

The loss is the mean KL divergence of the next-token distributions over the calibration windows. Signs, plane widths, bits and
everything outside the experts stay as they are, so the checkpoint has the same size to the byte.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext

import torch
from torch import Tensor, nn

from moebius.calibrate.layerwise import LayerRunner, calibrating, computing_device, in_float32, replaced_forwards
from moebius.calibrate.stream import Resident
from moebius.errors import CalibrationError
from moebius.formats.projection import PackedProjection
from moebius.pipeline.student import Order, Student, Training, product_dtype
from moebius.progress import Progress
from moebius.types import MoeModel

_BATCH = 4  # windows per step

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
    device = computing_device(moe)
    windows = windows.to(device)
    students = [Student(layer, layers[layer.name], dtype=product_dtype(device)) for layer in moe.moe_layers]
    with calibrating(moe), ExitStack() as stack:
        wanted = _last_states(moe, windows, resident)
        experts = nn.ModuleList(layer.experts for layer in moe.moe_layers)
        forwards = {student.layer.experts: student.forward for student in students}
        for index in range(len(moe.decoder)):
            stack.enter_context(rest(index))
        with in_float32(moe.decoder, without=experts), replaced_forwards(forwards):
            losses = _train(moe, students, windows, wanted, steps, seed, progress)
    return {student.layer.name: student.packed() for student in students}, losses


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
    students: Sequence[Student],
    windows: Tensor,
    wanted: Tensor,
    steps: int,
    seed: int,
    progress: Progress,
) -> list[float]:
    """The loss before each step."""
    training, order = Training(students), Order(len(windows), _BATCH, seed)
    runner = LayerRunner(moe)
    losses: list[float] = []
    progress.stage("refining", steps)
    low = students[0].dtype
    for step in range(steps):
        picked = order.pick()
        training.begin()
        with torch.autocast(windows.device.type, low, enabled=low != torch.float32):
            losses.append(_backward(moe, runner, windows[picked], wanted[picked]))
        if not math.isfinite(losses[-1]):
            raise CalibrationError(f"refine: got a divergence of {losses[-1]} at step {step + 1}, wanted a finite number")
        training.step(step, step / steps)
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
