"""What runs in a process of its own: one model, loaded and timed, and what the machine can do."""

from __future__ import annotations

import logging
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from moebius.evaluate.roofline import read_bandwidth
from moebius.evaluate.speed import SpeedSettings, measure_speed, warm_up
from moebius.hf.loading import load_model, quiet_transformers
from moebius.memory import PeakMemory
from moebius.progress import Progress


@dataclass(frozen=True)
class Conditions:
    """Where and how to measure.

    Attributes:
        settings: what is timed.
        device: as torch calls it.
        dtype: a key of :data:`moebius.hf.loading.DTYPES`.
        threads: of PyTorch; None: as many as it takes by itself.
    """

    settings: SpeedSettings
    device: str
    dtype: str
    threads: int | None


def machine(conditions: Conditions, progress: Progress) -> dict[str, Any]:
    """What computes, and how fast it reads memory."""
    _prepare(conditions)
    progress.stage("bandwidth of memory", 1)
    bandwidth = read_bandwidth(conditions.device)
    progress.advance(f"{bandwidth / 1e9:.1f} GB/s")
    cuda = conditions.device.startswith("cuda")
    return {
        "device": conditions.device,
        "name": torch.cuda.get_device_name(conditions.device) if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "read_bytes_per_second": bandwidth,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def measure(label: str, folder: str, loop: str, conditions: Conditions, progress: Progress) -> dict[str, Any]:
    """Time to load, memory, and tokens per second."""
    kernels = _prepare(conditions)
    settings, device = conditions.settings, conditions.device
    blank_model(AutoConfig.from_pretrained(folder))  # what it imports is no memory of the model
    before, peak = _resident(device), PeakMemory()
    progress.stage(f"{label}: loading", 1)
    began = time.perf_counter()
    model = load_model(folder, conditions.dtype, device)
    load_seconds, loaded = time.perf_counter() - began, _resident(device)
    progress.advance(f"{load_seconds:.1f} s")
    warm_up(model, settings, loop)
    ready_seconds, resident = time.perf_counter() - began, _resident(device)
    seconds = measure_speed(model, settings, loop, progress, f"{label}, {loop}")
    most = torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else peak.bytes()
    return {
        "model": label,
        "loop": loop,
        "dtype": str(model.dtype).removeprefix("torch."),
        "kernels": kernels,
        "load_seconds": load_seconds,
        "ready_seconds": ready_seconds,
        "loaded_bytes": loaded - before,
        "resident_bytes": resident - before,
        "peak_bytes": most - before,
        **seconds.to_dict(settings),
    }


def _prepare(conditions: Conditions) -> list[str]:
    """Threads, silence, and what the kernels will say of themselves."""
    quiet_transformers()
    if conditions.threads is not None:
        torch.set_num_threads(conditions.threads)
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    log = logging.getLogger("moebius.kernels")
    log.setLevel(logging.INFO)
    log.addHandler(Listener())
    # Threads and the library of products have buffers of their own.
    torch.ones(256, 256, dtype=torch.bfloat16) @ torch.ones(256, 256, dtype=torch.bfloat16)
    return said


def blank_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a config on the meta device, unpacked."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def _resident(device: str) -> int:
    """Bytes of this process, or those that torch has allocated on a GPU."""
    if device.startswith("cuda"):
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
