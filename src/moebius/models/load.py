"""Models with their experts, routers, shared experts and dense layers named."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from moebius.errors import CheckpointError, CoverageError, ModelNotFoundError, UnsupportedModelError, first_line
from moebius.json_file import read_config
from moebius.models import parts
from moebius.models.layout import layout_of
from moebius.private_transformers import loading_report
from moebius.source import path_or_hub_name
from moebius.types import MoeLayer, MoeModel


def load_moe_model(source: str | Path, dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu") -> MoeModel:
    """Load a checkpoint in evaluation mode and find its experts. A dense model is refused before its weights are read.

    Args:
        source: folder of a transformers checkpoint, or its name on the hub.
        dtype: of the weights; ``"auto"`` keeps the checkpoint's.
        device: where the weights go.

    Raises:
        ModelNotFoundError: no such folder, or nothing by that name on the hub.
        CheckpointError: the folder is there, but its config or weights cannot be read.
        UnsupportedModelError: a dense model, or experts that transformers does not keep as fused 3-D parameters.
    """
    config = _read_config(source)
    skeleton(config)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(str(path_or_hub_name(source)), dtype=dtype, output_loading_info=True)
    except Exception as error:  # transformers, safetensors and the hub raise a dozen classes for a broken checkpoint
        raise CheckpointError(f"{source}: cannot read its weights: {why_not_loaded(error)}") from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        # transformers only warns, and fills them with random numbers.
        raise CheckpointError(f"{source}: {len(missing)} tensors are missing, such as {missing[0]}; fetch the checkpoint again")
    return describe(model.eval().to(device))


def why_not_loaded(error: Exception) -> str:
    """What kept transformers from loading a checkpoint, in one line.

    Of some errors it says that the reason was logged above.
    """
    return loading_report(error) or f"{type(error).__name__}: {first_line(error)}"


def skeleton(source: PretrainedConfig | str | Path, dtype: torch.dtype | None = None) -> MoeModel:
    """The model of a config on the meta device, in evaluation mode: every name and shape, no memory.

    Args:
        source: a config, a checkpoint folder, a ``config.json``, or a name on the hub.
        dtype: of the weights; None: that of the config.

    Raises:
        ModelNotFoundError: no such file or name.
        CheckpointError: a config that cannot be read.
        UnsupportedModelError: as :func:`describe`, or a model type that transformers does not know as a causal language model.
    """
    config = source if isinstance(source, PretrainedConfig) else _read_config(source)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(
            f"{config.model_type}: not a causal language model of transformers; models that classify, see or hear "
            "are not packed yet, give the checkpoint of the language model alone"
        )
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, **({"dtype": dtype} if dtype else {}))
    except Exception as error:  # whatever odd numbers in a config do to the constructor of a model
        raise UnsupportedModelError(f"{config.model_type}: not a causal language model: {first_line(error)}") from error
    return describe(model.eval())


def describe(model: PreTrainedModel) -> MoeModel:
    """Find the experts of a model, their routers, its shared experts and dense MLPs, by structure alone.

    Experts outside the decoder with most experts (a second tower, a prediction head) are not listed;
    :func:`check_coverage` names them.

    Raises:
        UnsupportedModelError: a dense model, or experts that transformers does not keep as fused 3-D parameters.
    """
    fused = [(name, module, layout) for name, module in model.named_modules() if (layout := layout_of(module))]
    if not fused:
        raise UnsupportedModelError(_why_no_experts(model))
    decoder_name = _decoder_name(model, [name for name, _, _ in fused])
    decoder = model.get_submodule(decoder_name)
    assert isinstance(decoder, nn.ModuleList)
    layers = []
    for name, module, layout in fused:
        if name.startswith(decoder_name + "."):
            found = parts.router_name(model, name, layout)
            router = model.get_submodule(found) if found else None
            index = int(name.removeprefix(decoder_name + ".").split(".")[0])
            layers.append(MoeLayer(name, module, layout, found, router, index))
    layers.sort(key=lambda layer: layer.decoder_layer)  # stable: two in one layer stay in the order of the modules
    with_experts = {layer.decoder_layer for layer in layers}
    shared, dense = [], []
    for index, layer in enumerate(decoder):
        for name, linear in parts.linears(layer):
            path, last = f"{decoder_name}.{index}.{name}", name.split(".")[-1]
            # The gate of a shared expert has one output: nothing worth packing.
            if index in with_experts and "shared" in name and linear.out_features > 1:
                shared.append(path)
            if index not in with_experts and last in parts.MLP_LINEARS:
                dense.append(path)
    linears = parts.linears_outside(model, decoder_name, layers)
    return MoeModel(model, tuple(layers), decoder, decoder_name, tuple(shared), tuple(dense), linears)


def check_coverage(moe: MoeModel, quantized: Collection[str]) -> None:
    """The coverage gate: every expert matrix of the model has been quantized, whatever it is called.

    Looked at are the matrices of fused experts anywhere in the model, and any other parameter of three or more dimensions
    that leads with the number of experts inside a MoE block or under a name with ``expert`` in it.

    Args:
        moe: the model as it was before quantization.
        quantized: paths of the parameters that were quantized, such as ``model.layers.0.mlp.experts.gate_up_proj``.

    Raises:
        CoverageError: names the parameters that were left out.
    """
    missed = [name for name in _expert_parameters(moe.model) if name not in quantized]
    if missed:
        shown = ", ".join(missed[:4]) + (f" and {len(missed) - 4} more" if len(missed) > 4 else "")
        raise CoverageError(
            f"{len(missed)} expert parameters were not quantized: {shown}; "
            "the output would be larger than it says, so nothing was written"
        )


def _expert_parameters(model: nn.Module) -> Iterator[str]:
    """Paths of all parameters that look like expert matrices."""
    block_experts: dict[str, set[int]] = {}
    counts = set()
    for name, module in model.named_modules():
        if layout := layout_of(module):
            block_experts.setdefault(name.rpartition(".")[0], set()).add(layout.experts)
            counts.add(layout.experts)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 3:
            continue
        owner = name.rpartition(".")[0]
        if isinstance(model.get_submodule(owner), nn.Conv1d | nn.Conv2d | nn.Conv3d):
            continue  # a filter bank, whose leading dimension is channels
        in_block = any(name.startswith(block + ".") and parameter.shape[0] in n for block, n in block_experts.items())
        if in_block or ("expert" in name and (not counts or parameter.shape[0] in counts)):
            yield name


def _why_no_experts(model: PreTrainedModel) -> str:
    kind = type(model).__name__
    if getattr(model.config, "quantization_config", None) is not None:
        return f"{kind}: this checkpoint is already quantized; give the original"
    if others := list(_expert_parameters(model)):
        shape = tuple(model.get_parameter(others[0]).shape)
        return f"{kind}: {others[0]} {shape} looks like experts, but its class lacks transformers' flags for fused experts"
    return f"{kind} is a dense model: it has no routed experts, and experts are what Moebius quantizes"


def _decoder_name(model: nn.Module, experts: list[str]) -> str:
    """Path of the outermost ModuleList that holds most of the experts."""
    holders: dict[str, int] = {}
    for name in experts:
        parts = name.split(".")
        paths = [".".join(parts[:depth]) for depth in range(1, len(parts))]
        holder = next((path for path in paths if isinstance(model.get_submodule(path), nn.ModuleList)), None)
        if holder is not None:
            holders[holder] = holders.get(holder, 0) + 1
    if not holders:
        raise UnsupportedModelError(f"{experts[0]}: these experts are not part of a list of decoder layers")
    return max(holders, key=lambda path: holders[path])


def _read_config(source: str | Path) -> Any:
    path = path_or_hub_name(source)
    if isinstance(path, Path):
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            raise ModelNotFoundError(f"{source}: no config.json in this folder; is it a transformers checkpoint?")
        content = read_config(file)
        if not content.get("model_type"):
            raise CheckpointError(f"{file}: no model_type in it; is it the config of a transformers checkpoint?")
    try:
        return AutoConfig.from_pretrained(str(path))
    except OSError as error:
        raise ModelNotFoundError(
            f"{source}: neither a folder here nor a model that can be fetched from the hub ({first_line(error)})"
        ) from error
    except Exception as error:  # an unknown model_type is a ValueError, a field of the wrong type one of huggingface_hub's own
        raise UnsupportedModelError(f"{source}: transformers cannot read its config: {first_line(error)}") from error
