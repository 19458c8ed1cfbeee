"""Make or find the checkpoints, and measure each in a process of its own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import psutil
import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from moebius.bench.measure import Conditions, blank_model, machine, measure
from moebius.bench.request import BenchRequest
from moebius.checkpoint.manifest import is_packed
from moebius.errors import CheckpointError, OutputError, RecipeError, ResourceError
from moebius.evaluate.plan import checkpoint_size, plan_model
from moebius.evaluate.random_checkpoint import write_random_checkpoint
from moebius.evaluate.roofline import step_bytes
from moebius.evaluate.shapes import shape_config, with_layers
from moebius.evaluate.size import ModelSize, packed_checkpoint_size
from moebius.evaluate.speed import Seconds
from moebius.hf.loading import checkpoint_folder
from moebius.pipeline import quantize_model
from moebius.process import in_process
from moebius.progress import Progress
from moebius.recipe import CalibrationSettings, Recipe
from moebius.source import display_name, path_or_hub_name

#: What a process needs besides the weights: activations, cache, buffers of libraries.
_SPARE_BYTES = 500_000_000
_SPARE_SHARE = 0.1


def run_bench(request: BenchRequest, conditions: Conditions, progress: Progress) -> dict[str, Any]:
    """Measure what is asked for; everything that came of it, ready for JSON. Checkpoints are made in the temporary folder.

    Raises:
        MoebiusError: no such model or shape, too little memory or disk.
    """
    config = None if request.shape is None else shape_config(request.shape)
    source = path_or_hub_name(request.packed)
    original = None if request.original is None else str(path_or_hub_name(request.original))
    with TemporaryDirectory(prefix="moebius-bench-") as work:
        measured = Bench(conditions, progress)
        if config is not None:
            bench_shape(measured, config, request.recipe, Path(work), request.original_layers)
        elif request.packed is None:
            bench_quantized(measured, str(source), request.recipe, Path(work))
        else:
            bench_checkpoints(measured, str(source), original)
    made = {} if request.packed is not None else {"recipe": request.recipe.to_dict()}
    name = request.shape or display_name(request.packed)
    return {"name": name, "random_weights": request.shape is not None, **made, **measured.results()}


class Bench:
    """Measures packed models and originals, and collects what is reported.

    Attributes:
        rows: a dictionary per model and loop, ready for JSON.
        missing: in words, what was not measured and why.
    """

    def __init__(self, conditions: Conditions, progress: Progress) -> None:
        self.conditions, self.progress = conditions, progress
        self.rows: list[dict[str, Any]] = []
        self.missing: list[str] = []
        self.machine = in_process(machine, conditions, progress=progress)

    def packed(self, folder: Path) -> None:
        """Measure a packed checkpoint, through ``moebius generate``'s loop and through transformers'."""
        for loop in ("moebius", "transformers"):
            self._measure("packed", folder, loop)

    def original(self, folder: Path) -> None:
        """Measure the original through transformers, if there is room for it; else say how much is wanting."""
        try:
            self._measure("original", folder, "transformers")
        except ResourceError as error:
            self.missing.append(str(error))

    def scaled_original(self, few: Path, fewer: Path, config: PretrainedConfig, size: ModelSize) -> None:
        """Measure an original with two numbers of its layers, and draw the line through them to all of its layers.

        Args:
            few, fewer: the checkpoints.
            config: of the whole model.
            size: of the whole model.
        """
        rows = []
        for folder in (few, fewer):
            require_memory("original", checkpoint_size(folder).bits // 8, self.conditions.device)
            rows.append(in_process(measure, "original", str(folder), "transformers", self.conditions, progress=self.progress))
        layers = [AutoConfig.from_pretrained(folder).num_hidden_layers for folder in (few, fewer)]
        unknown = dict.fromkeys(("load_seconds", "ready_seconds", "loaded_bytes", "resident_bytes", "peak_bytes"))
        rates = scaled_seconds(rows, layers, config.num_hidden_layers).to_dict(self.conditions.settings)
        self._add({**rows[0], **unknown, **rates, "scaled_from_layers": layers}, size, blank_model(config))

    def _measure(self, label: str, folder: Path, loop: str) -> None:
        size = packed_checkpoint_size(folder) if is_packed(folder) else checkpoint_size(folder)
        require_memory(label, size.bits // 8, self.conditions.device)
        row = in_process(measure, label, str(folder), loop, self.conditions, progress=self.progress)
        self._add({**row, "scaled_from_layers": None}, size, blank_model(AutoConfig.from_pretrained(folder)))

    def _add(self, row: dict[str, Any], size: ModelSize, blank: PreTrainedModel) -> None:
        files, resident = size.file_bytes or size.bits // 8, row["resident_bytes"]
        sizes = {"bits_per_expert_weight": size.bits_per_expert_weight, "file_bytes": files}
        ratio = None if resident is None else resident / files
        self.rows.append({**row, **sizes, "resident_to_files": ratio, "roofline": self._roofline(row, size, blank)})

    def _roofline(self, row: dict[str, Any], size: ModelSize, blank: PreTrainedModel) -> dict[str, float] | None:
        read = step_bytes(size, blank, self.conditions.settings.batch)
        if read is None:
            return None
        most = self.conditions.settings.batch * self.machine["read_bytes_per_second"] / read.total
        share = row["decode"]["tokens_per_second"] / most
        return {**vars(read), "bytes_per_step": read.total, "tokens_per_second": most, "share_reached": share}

    def results(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "settings": {**self.conditions.settings.to_dict(), "dtype": self.conditions.dtype},
            "machine": self.machine,
            "rows": self.rows,
            "speedups": _speedups(self.rows),
            "missing": self.missing,
        }


def bench_checkpoints(bench: Bench, packed: str, original: str | None) -> None:
    """Measure a packed checkpoint and, if one is named, its original.

    Raises:
        CheckpointError: ``packed`` is not, or ``original`` is.
    """
    folders = [checkpoint_folder(packed), *([checkpoint_folder(original)] if original is not None else [])]
    if not is_packed(folders[0]):
        raise CheckpointError(f"{packed}: got a checkpoint that Moebius did not pack; pack it first: moebius quantize {packed}")
    if original is not None and is_packed(folders[1]):
        raise CheckpointError(f"--original {original}: got a packed checkpoint, wanted the one that it was made from")
    bench.packed(folders[0])
    if original is None:
        bench.missing.append("the original: name it with --original")
    else:
        bench.original(folders[1])


def bench_quantized(bench: Bench, source: str, recipe: Recipe, work: Path) -> None:
    """Quantize a checkpoint, then measure both."""
    quantize_model(source, work / "packed", recipe, CalibrationSettings(), progress=bench.progress)
    bench.packed(work / "packed")
    bench.original(Path(source))


def bench_shape(bench: Bench, config: PretrainedConfig, recipe: Recipe, work: Path, original_layers: int | None = None) -> None:
    """Measure a model of random packed weights, then one of random weights in the config's dtype.

    Args:
        bench: takes the figures.
        config: of the model.
        recipe: how it is packed.
        work: a folder for checkpoints.
        original_layers: layers of the original; it is measured with half of them as well, and scaled up. None: all.

    Raises:
        ResourceError: too little memory or disk for the packed model.
    """
    planned = plan_model(config, recipe, CalibrationSettings())
    require_memory("packed", planned.after.bits // 8, bench.conditions.device)
    with _random_checkpoint(config, planned.after, recipe, work, bench.progress) as folder:
        bench.packed(folder)
    try:
        if original_layers is not None:
            _bench_fewer_layers(bench, config, planned.before, work, original_layers)
            return
        require_memory("original", planned.before.bits // 8, bench.conditions.device)
        with _random_checkpoint(config, planned.before, None, work, bench.progress) as folder:
            bench.original(folder)
    except ResourceError as error:
        bench.missing.append(f"{error}; --original-layers measures fewer layers and scales up")


def _bench_fewer_layers(bench: Bench, config: PretrainedConfig, size: ModelSize, work: Path, layers: int) -> None:
    if not 2 <= layers <= config.num_hidden_layers:
        raise RecipeError(f"--original-layers {layers}: wanted 2 to {config.num_hidden_layers}, which the model has")
    few, fewer = with_layers(config, layers), with_layers(config, layers // 2)
    sizes = [plan_model(c, Recipe.make("rtn"), CalibrationSettings()).before for c in (few, fewer)]
    with (
        _random_checkpoint(few, sizes[0], None, work, bench.progress) as first,
        _random_checkpoint(fewer, sizes[1], None, work, bench.progress) as second,
    ):
        bench.scaled_original(first, second, config, size)


def scaled_seconds(rows: Sequence[Mapping[str, Any]], layers: Sequence[int], wanted: int) -> Seconds:
    """What as many layers as wanted would take, by the line through what two other numbers of them took.

    Args:
        rows: of two models that differ in their layers alone, as :func:`measure` returns them.
        layers: how many each has.
        wanted: layers.
    """

    def line(figure: str) -> tuple[float, ...]:
        # Sorted, so that the median is that of the medians and the best that of the best.
        few, fewer = (sorted(row[figure]["seconds"]) for row in rows)
        return tuple(a + (wanted - layers[0]) * (a - b) / (layers[0] - layers[1]) for a, b in zip(few, fewer, strict=True))

    return Seconds(line("prompt"), line("decode"))


@contextmanager
def _random_checkpoint(
    config: PretrainedConfig, size: ModelSize, recipe: Recipe | None, work: Path, progress: Progress
) -> Iterator[Path]:
    """A folder with random weights, gone afterwards: there need not be room for two."""
    free = shutil.disk_usage(work).free
    if size.bits // 8 > free:
        what = "original" if recipe is None else "packed"
        raise ResourceError(
            f"{what}: its files take {size.bits / 8e9:.1f} GB, {work} has {free / 1e9:.1f} GB free; set TMPDIR to a larger disk"
        )
    folder = Path(mkdtemp(dir=work))
    try:
        write_random_checkpoint(config, folder, recipe, progress=progress)
        yield folder
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror or error}); set TMPDIR to another disk") from None
    finally:
        shutil.rmtree(folder)


def require_memory(label: str, weights: int, device: str) -> None:
    """Refuse a model that does not fit.

    Args:
        label: of the model.
        weights: bytes of them.
        device: where they go.

    Raises:
        ResourceError: says how much it takes and how much there is.
    """
    free = torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else psutil.virtual_memory().available
    wanted = int(weights * (1 + _SPARE_SHARE)) + _SPARE_BYTES
    if wanted > free:
        raise ResourceError(f"{label}: takes about {wanted / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free")


def _speedups(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each way to run the packed model over the original: tokens per second, memory, and time until it runs."""
    original = next((row for row in rows if row["model"] == "original"), None)
    if original is None:
        return {}
    smaller = {"ready": "ready_seconds", "memory": "resident_bytes"}
    faster = [name for name in ("decode", "prompt", "request") if original[name] is not None]
    return {
        f"packed, {row['loop']}": {
            **{name: row[name]["tokens_per_second"] / original[name]["tokens_per_second"] for name in faster},
            **{name: original[field] / row[field] for name, field in smaller.items() if original[field] and row[field]},
        }
        for row in rows
        if row["model"] == "packed"
    }
