"""The run: calibrate, quantize and write layer by layer, then copy everything else through."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from moebius.calibrate.self_sampling import balanced_windows
from moebius.calibrate.tokens import begins_with, calibration_windows, windows_digest
from moebius.checkpoint.manifest import FORMAT_VERSION, REPORT_NAME
from moebius.checkpoint.names import expert_tensor_names, tied_copies
from moebius.checkpoint.reader import SourceCheckpoint
from moebius.checkpoint.writer import CheckpointWriter
from moebius.errors import CheckpointError, first_line
from moebius.memory import PeakMemory
from moebius.models.limits import check_tokens, tell_of_positions
from moebius.models.load import check_coverage
from moebius.pipeline.job import Job
from moebius.pipeline.source import open_model
from moebius.progress import Progress, Silent
from moebius.recipe import CalibrationSettings, Recipe
from moebius.types import MoeModel

#: Layers that a line names; the report has all.
_NAMED = 8

_log = logging.getLogger("moebius")


def quantize_model(
    source: str | Path,
    out: Path,
    recipe: Recipe,
    calibration: CalibrationSettings,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Quantize the experts of a checkpoint and write a packed checkpoint that transformers loads.

    Layers are finished one after the other in a work folder beside ``out``; a run that was stopped, in whatever way, goes on
    where it was when the same command is given again, and writes the bytes of a run that was not. ``out`` appears at the very
    end, complete. The files depend on the source, the recipe and the calibration, and on how the machine rounds: its
    instructions, the number of threads, the device, the version of PyTorch. Work of a run with other settings is refused.

    Args:
        source: local folder or hub name of a transformers checkpoint.
        out: folder to create; may exist if it is empty.
        recipe: what to do.
        calibration: which tokens to look at, for methods that need any.
        device: where each layer is run and quantized.
        progress: told about stages and steps.

    Returns:
        The report that is also written to ``out`` (layers with their tokens per expert, bits and experts that shrank towards
        their layer), with ``seconds`` by stage and ``peak_memory_bytes`` added, which are not written.

    Raises:
        MoebiusError: one of its subclasses for every cause that is known, before ``out`` exists.
    """
    progress = progress or Silent()
    clock, memory = _Clock(), PeakMemory()
    with CheckpointWriter(out) as writer:
        checkpoint = SourceCheckpoint.open(source)
        job = Job(open_model(checkpoint, device), recipe)
        moe = job.moe
        windows = _checked_early(job, calibration, writer)
        copied = set(checkpoint.names()) - expert_tensor_names(checkpoint, moe.model, job.packed_paths())
        checkpoint.check_finite(checkpoint.names(), progress, infinite=copied)
        if job.needs.self_sampled:
            windows = _self_sampled(moe, checkpoint.folder, calibration, progress)
            calibration = dataclasses.replace(calibration, text="self-sampled", split="train")
        settings: dict[str, Any] = {"recipe": recipe.to_dict()}
        if windows is not None:
            settings["calibration"] = {**calibration.to_dict(), "digest": windows_digest(windows)}
        key = {"source": checkpoint.fingerprint(), "format_version": FORMAT_VERSION, "machine": _machine(device), **settings}
        writer.begin(key)
        clock.lap("load")
        refined = _pack(job, windows, calibration.seed, writer, progress, clock)
        modules = writer.modules()
        check_coverage(moe, modules)
        writer.copy_rest(checkpoint, expert_tensor_names(checkpoint, moe.model, modules) | tied_copies(checkpoint, moe.model))
        entries = writer.entries()
        report = {
            "format_version": FORMAT_VERSION,
            **settings,
            "layers": [entries[name] for name in job.unit_names()],
            **refined,
            **({"dequantized_from": kinds} if (kinds := checkpoint.dequantized_from()) else {}),
        }
        config = {"quant_method": "moebius", "format_version": FORMAT_VERSION, **settings, "modules": modules}
        writer.finish(checkpoint, config, {REPORT_NAME: json.dumps(report, indent=1) + "\n"})
    clock.lap("write")
    progress.finish()
    _tell_of_zeros(report["layers"])
    return {**report, "seconds": clock.laps, "peak_memory_bytes": memory.bytes()}


def _pack(
    job: Job, windows: Tensor | None, seed: int, writer: CheckpointWriter, progress: Progress, clock: _Clock
) -> dict[str, Any]:
    """Survey, quantize and refine, as the recipe has it; what refinement adds to the report."""
    if job.method.survey is not None and windows is not None:
        job.survey(windows, writer, progress)
        clock.lap("survey")
    if windows is None or not (job.recovers or job.refines):
        for name, packed, entry in job.packed_layers(windows, writer.entries(), writer.work.scratch, progress):
            writer.write_layer(name, packed, entry)
        clock.lap("calibrate and quantize")
        return {}
    for name, packed, entry in job.packed_layers(windows, writer.kept_layers(), writer.work.scratch, progress):
        writer.keep_layer(name, packed, entry)
    clock.lap("calibrate and quantize")
    found: dict[str, Any] = {}
    stage = "packed"
    if job.recovers:
        found["recover"], stage = job.recover(windows, seed, writer, progress), "recovered"
        clock.lap("recover")
    if job.refines:
        found["refine"] = job.refine(windows, seed, writer, progress, stage)
        clock.lap("refine")
    else:
        job.write_kept(writer, stage)
    return found


def check_recipe(source: str | Path, recipe: Recipe, calibration: CalibrationSettings, device: str = "cpu") -> None:
    """Refuse what :func:`quantize_model` would refuse of this model and recipe, from headers, config and tokenizer alone.

    Raises:
        MoebiusError: a model, recipe, budget, tokenizer or text that no run can use.
    """
    checkpoint = SourceCheckpoint.open(source)
    job = Job(open_model(checkpoint, device), recipe)
    job.planned_total()
    _drawn(checkpoint.folder, calibration, job)


def _drawn(folder: Path, calibration: CalibrationSettings, job: Job) -> Tensor | None:
    """The calibration windows, if there are to be any and the model does not write them."""
    if job.needs.self_sampled:
        begins_with(_tokenizer(folder), calibration.bos)
        return None
    return _windows(folder, calibration, job.moe) if job.needs.anything or job.method.survey is not None else None


def _checked_early(job: Job, calibration: CalibrationSettings, writer: CheckpointWriter) -> Tensor | None:
    """What can be known before the weights are read, cheapest first; the calibration windows, if there are to be any.

    Raises:
        MoebiusError: a model, tokenizer, text, budget or disk that the run would fail on later.
    """
    moe, checkpoint = job.moe, job.source.checkpoint
    replaced = expert_tensor_names(checkpoint, moe.model, job.expert_parameters())
    bits = job.planned_total()
    windows = _drawn(checkpoint.folder, calibration, job)
    if windows is not None:
        tell_of_positions(moe.model.config, windows.shape[1])
    rest = sum(tensor.end - tensor.begin for name, tensor in checkpoint.tensors.items() if name not in replaced)
    writer.require_room(rest + bits // 8)
    return windows


def _machine(device: str) -> dict[str, Any]:
    """What of the machine the bytes depend on: sums of products are rounded in an order that is its own."""
    threads, instructions = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    versions = {"moebius": version("moebius"), "torch": torch.__version__}
    return {**versions, "device": device, "threads": threads, "instructions": instructions}


def _tell_of_zeros(entries: list[dict[str, Any]]) -> None:
    """Name the layers that the budget gave nothing, in one line."""
    named = [f"{entry['name']} ({' and '.join(entry['zero'])})" for entry in entries if entry.get("zero")]
    if named:
        some = ", ".join(named[:_NAMED]) + (f" and {len(named) - _NAMED} more" if len(named) > _NAMED else "")
        _log.warning("the budget gave nothing to %s: these experts put out zeros; more --bits would change that", some)


def _windows(folder: Path, calibration: CalibrationSettings, moe: MoeModel) -> Tensor:
    windows = calibration_windows(calibration, _tokenizer(folder))
    check_tokens(moe.model, windows)
    return windows


def _self_sampled(moe: MoeModel, folder: Path, calibration: CalibrationSettings, progress: Progress) -> Tensor:
    """As many windows as the calibration asks for, written by the model."""
    if calibration.text != CalibrationSettings.text:
        _log.warning("calibration text %s: not read, the model writes its own; self_sampling=false reads it", calibration.text)
    head = begins_with(_tokenizer(folder), calibration.bos)
    return balanced_windows(
        moe, calibration.windows, calibration.window_length, head=head, seed=calibration.seed, progress=progress
    )


def _tokenizer(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers and tokenizers raise whatever a damaged or newer file does to them
        raise CheckpointError(
            f"{folder}: has no tokenizer that transformers can load ({type(error).__name__}: {first_line(error)}); "
            "calibration needs one"
        ) from error


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._last = round(now - self._last, 2), now
