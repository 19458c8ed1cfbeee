"""The functions of ``import moebius``: the commands of the command line, under their names and with their defaults.

A model is a folder, the name of one on the hub, or None for the reference model that is part of the package. Nothing is
printed: who wants to see how far work is gives a :class:`moebius.progress.Progress`. Every error with a known cause is a
:class:`moebius.errors.MoebiusError`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeAlias

from transformers import PreTrainedModel, PreTrainedTokenizerBase

import moebius.hf.quantizer  # noqa: F401  registers packed checkpoints with transformers
from moebius.checks import require_device, require_free, require_temperature
from moebius.compare.presets import MATCHED, chosen_recipes
from moebius.compare.results import Comparison, ComparisonResult
from moebius.compare.run import compare_models
from moebius.errors import RecipeError
from moebius.evaluate.info import CheckpointInfo, checkpoint_info
from moebius.evaluate.plan import Plan, plan_model
from moebius.evaluate.run import EvaluationRequest, EvaluationResult, run_evaluation
from moebius.evaluate.size import ModelSize, packed_checkpoint_size
from moebius.generation.chat import Chat
from moebius.generation.complete import PROMPTS, Written, complete
from moebius.hf.loading import load_model, load_tokenizer
from moebius.pipeline import quantize_model
from moebius.progress import Progress
from moebius.recipe import DEFAULT_METHOD, CalibrationSettings, Recipe
from moebius.recipe_text import calibration_from, require_text
from moebius.source import display_name, path_or_hub_name

__all__ = ["chat", "compare", "evaluate", "generate", "info", "load", "load_tokenizer", "plan", "quantize"]

Source: TypeAlias = str | PathLike[str] | None
OptionValue: TypeAlias = bool | int | float | str
DType: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]
Bos: TypeAlias = Literal["auto", "on", "off"]


@dataclass(frozen=True)
class Quantized:
    """What :func:`quantize` wrote.

    Attributes:
        folder: the packed checkpoint.
        size: what it takes, in bits per expert weight and in bytes.
        layers: of each quantized unit its name and, where it was calibrated, its tokens per expert.
        seconds: by stage.
        peak_memory_bytes: most resident memory of this process while it ran.
    """

    folder: Path
    size: ModelSize
    layers: list[dict[str, object]]
    seconds: dict[str, float]
    peak_memory_bytes: int


def quantize(
    model: Source,
    out: str | PathLike[str],
    method: str = DEFAULT_METHOD,
    bits: float | None = None,
    calibration: str | PathLike[str] = CalibrationSettings.text,
    *,
    windows: int = CalibrationSettings.windows,
    window_length: int = CalibrationSettings.window_length,
    seed: int = CalibrationSettings.seed,
    bos: Bos = "auto",
    device: str = "cpu",
    progress: Progress | None = None,
    **options: OptionValue,
) -> Quantized:
    """Quantize the experts of a model into a checkpoint that transformers loads. A run that was stopped goes on where it was.

    Args:
        model: what to quantize, in 16 or 32 bit.
        out: the folder to create, which appears at the end, complete; may exist if it is empty.
        method: a name of ``moebius methods``.
        bits: per expert weight; None: the method's own, 1.0 for ``moebius``.
        calibration: ``"builtin"``, a ``.txt`` or ``.jsonl`` file, or the name of a data set such as ``"wikitext2"``.
        windows: how many windows of it the model looks at.
        window_length: tokens per window.
        seed: which windows are drawn.
        bos: whether windows begin with the begin-of-text token; ``"auto"``: where the tokenizer adds it.
        device: where each layer is run and quantized, as torch calls it.
        progress: told about stages and steps.
        options: of the method (``moebius methods NAME``), such as ``gain=True``, and of every method, such as ``rest="int8"``.

    Raises:
        RecipeError, UnknownNameError: bits, a method or an option that does not exist.
        ModelNotFoundError, UnsupportedModelError, CheckpointError: a model that is not there, has no experts, or is damaged.
        CalibrationError: a text that is missing or too short.
        OutputError: a folder that is not empty, a disk that is full, or work of other settings beside it.
    """
    recipe = Recipe.make(method, bits, **options)
    settings = calibration_from(_text(calibration), windows, window_length, seed, bos=bos)
    source, folder = path_or_hub_name(model), Path(out).expanduser()
    require_device(device)
    report = quantize_model(source, folder, recipe, settings, device=device, progress=progress)
    size = packed_checkpoint_size(folder)
    return Quantized(folder, size, report["layers"], report["seconds"], report["peak_memory_bytes"])


def load(model: Source = None, *, dtype: DType = "auto", device: str = "cpu") -> PreTrainedModel:
    """A causal language model in evaluation mode, packed or not; a packed one stays packed in memory.

    Its files are checked first, also by their hashes unless ``MOEBIUS_HASHES=0``.

    Args:
        model: what to load.
        dtype: of what is not packed; ``"auto"``: as the checkpoint has it.
        device: where it goes.

    Raises:
        ModelNotFoundError, CheckpointError: not there, or damaged.
        ResourceError: too little memory.
    """
    require_device(device)
    return load_model(path_or_hub_name(model), dtype, device)


def generate(
    model: Source | PreTrainedModel = None,
    prompt: str | None = None,
    tokens: int = 64,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: DType = "auto",
    device: str = "cpu",
    on_text: Callable[[str], object] | None = None,
) -> Written:
    """Continue a prompt, token by token.

    Args:
        model: what writes; a loaded one is used as it is.
        prompt: at least one token long; None: the head of a Python function, which suits the reference model.
        tokens: at most so many new tokens; fewer where the model ends the text.
        temperature: 0 takes the likeliest token every time; above, tokens are drawn.
        seed: of the draws.
        tokenizer: of the model; None: that of its checkpoint.
        dtype, device: as :func:`load`, of a model that is to be loaded.
        on_text: told every piece of the completion as soon as its tokens are text.

    Raises:
        RecipeError: an empty prompt, or a temperature that is no number.
        ModelNotFoundError, CheckpointError: as :func:`load`.
    """
    require_temperature(temperature)
    if prompt == "":
        raise RecipeError("prompt: got an empty text, wanted at least one character")
    loaded, words = _loaded(model, tokenizer, dtype, device)
    text = PROMPTS[0] if prompt is None else prompt
    return complete(loaded, words, text, tokens, temperature=temperature, seed=seed, on_text=on_text)


def chat(
    model: Source | PreTrainedModel = None,
    system: str | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: DType = "auto",
    device: str = "cpu",
) -> Chat:
    """A conversation: ``chat.ask("...")`` answers with all that was said before in mind.

    Args:
        model: what answers; a loaded one is used as it is.
        system: what it is told first.
        tokenizer, dtype, device: as :func:`generate`.

    Raises:
        ModelNotFoundError, CheckpointError: as :func:`load`.
    """
    loaded, words = _loaded(model, tokenizer, dtype, device)
    return Chat(loaded, words, system)


def evaluate(
    model: Source = None,
    reference: Source = None,
    *,
    protocol: Literal["windows", "gptq", "llama.cpp"] | None = None,
    text: str | PathLike[str] | None = None,
    windows: int | None = None,
    window_length: int | None = None,
    bos: Bos = "auto",
    seed: int = 0,
    save_reference: str | PathLike[str] | None = None,
    top_k: int | None = None,
    routing_from: Source = None,
    batch_size: int | None = None,
    dtype: DType = "float32",
    device: str = "cpu",
    progress: Progress | None = None,
) -> EvaluationResult:
    """Perplexity on held-out text and, against the original, KL divergence in nats, top-1 agreement and routing per layer.

    Args:
        model: what is measured.
        reference: its original, or the folder that ``save_reference`` wrote; None: perplexity alone.
        protocol: ``windows`` (the default) draws some by seed; ``gptq`` and ``llama.cpp`` are those of published figures.
        text: ``"builtin"`` (the default), a ``.txt`` or ``.jsonl`` file, or the name of a data set.
        windows, window_length: None: the protocol's own, 64 of 256 tokens for ``windows``.
        bos: whether windows begin with the begin-of-text token.
        seed: which windows are drawn.
        save_reference: store what the model says about the text in this folder.
        top_k: with ``save_reference``: store the likeliest tokens alone.
        routing_from: route tokens as this model does (MoBiE Table 1).
        batch_size: windows per forward pass; None: 2048 tokens.
        dtype, device: as :func:`load`.
        progress: told about every batch.

    Raises:
        RecipeError: settings that contradict each other or the stored reference.
        CalibrationError: a text that is missing or too short.
        ModelNotFoundError, CheckpointError, ShapeError: a model that is not there, damaged, or another than the reference.
    """
    if top_k is not None and save_reference is None:
        raise RecipeError("top_k: says what save_reference stores; give both, or neither")
    asked = None if text is None else _text(text)
    require_text(asked)
    require_device(device)
    request = EvaluationRequest(
        source=str(path_or_hub_name(model)),
        reference=None if reference is None else str(path_or_hub_name(reference)),
        routing_from=None if routing_from is None else str(path_or_hub_name(routing_from)),
        protocol=protocol,
        text=asked,
        windows=windows,
        window_length=window_length,
        seed=seed,
        bos=bos,
        dtype=dtype,
        device=device,
        batch_size=batch_size,
        save_reference=None if save_reference is None else Path(save_reference),
        top_k=top_k,
    )
    return run_evaluation(request, progress)


def compare(
    model: Source = None,
    recipes: Sequence[str] = (),
    *,
    out: str | PathLike[str],
    preset: str | None = None,
    calibration: str | PathLike[str] = CalibrationSettings.text,
    windows: int = CalibrationSettings.windows,
    window_length: int = CalibrationSettings.window_length,
    seed: int = CalibrationSettings.seed,
    text: str | PathLike[str] = "builtin",
    text_windows: int = 64,
    samples: int = 0,
    add: bool = False,
    device: str = "cpu",
    progress: Progress | None = None,
) -> ComparisonResult:
    """Quantize a model with several recipes and measure each on held-out windows. A comparison that was stopped goes on.

    Args:
        model: the original.
        recipes: each as ``METHOD@BITS KEY=VALUE ...``, such as ``"rtn@1 gain=true"``.
        out: the folder to create: packed checkpoints, results.json, comparison.md, comparison.png.
        preset: recipes that go together, such as ``"ablation"``; without it and without recipes, ``"demo"``.
        calibration, windows, window_length, seed: as :func:`quantize`, of recipes that do not say otherwise.
        text: held-out text, as :func:`evaluate`.
        text_windows: windows of it.
        samples: completions per model, at most 3.
        add: ``out`` holds a finished comparison, which gets the recipes that it does not have.
        device: where to compute.
        progress: told about stages and steps.

    Raises:
        RecipeError, UnknownNameError: a recipe that cannot be read, or is there twice; a preset that does not exist.
        OutputError: a folder that is not empty.
        MoebiusError: as :func:`quantize` and :func:`evaluate`.
    """
    settings = calibration_from(_text(calibration), windows, window_length, seed)
    candidates = chosen_recipes(recipes, preset, settings)
    held_out = calibration_from(_text(text), text_windows, window_length, seed, split="held-out")
    source, folder = str(path_or_hub_name(model)), Path(out).expanduser() if add else require_free(Path(out))
    require_device(device)
    matched = settings if preset in MATCHED else None
    comparison = Comparison(display_name(model), source, candidates, settings, held_out, PROMPTS[:samples], device, matched)
    return compare_models(comparison, folder, progress, add=add)


def plan(
    model: Source = None,
    method: str = DEFAULT_METHOD,
    bits: float | None = None,
    *,
    windows: int = CalibrationSettings.windows,
    window_length: int = CalibrationSettings.window_length,
    **options: OptionValue,
) -> Plan:
    """What a recipe would make of a model, and the memory that takes, without reading a weight.

    Args:
        model: also a ``config.json``.
        method, bits, options: as :func:`quantize`.
        windows, window_length: of the calibration.

    Raises:
        RecipeError, UnknownNameError, ModelNotFoundError, UnsupportedModelError: as :func:`quantize`.
    """
    recipe = Recipe.make(method, bits, **options)
    return plan_model(path_or_hub_name(model), recipe, CalibrationSettings(windows=windows, window_length=window_length))


def info(model: Source = None, *, verify: bool = False) -> CheckpointInfo:
    """What a checkpoint holds: bits of the experts, of the whole model and on disk, its recipe, and tokens per expert.

    Args:
        model: packed or not.
        verify: compare every tensor with the hash in the manifest.

    Raises:
        ModelNotFoundError, CheckpointError: not there, or damaged.
    """
    return checkpoint_info(path_or_hub_name(model), verified=verify)


def _text(text: str | PathLike[str]) -> str:
    return str(Path(text).expanduser()) if isinstance(text, PathLike) else text


def _loaded(
    model: Source | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, dtype: DType, device: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer, from their checkpoint where they are not given."""
    if isinstance(model, PreTrainedModel):
        return model, tokenizer or load_tokenizer(_checkpoint_of(model))
    source: Any = path_or_hub_name(model)
    words = tokenizer or load_tokenizer(source)  # first: it is missing more often than the model
    return load(source, dtype=dtype, device=device), words


def _checkpoint_of(model: PreTrainedModel) -> str:
    name = str(getattr(model, "name_or_path", "") or "")
    if not name:
        raise RecipeError("tokenizer: this model was not loaded from a checkpoint; give its tokenizer")
    return name
