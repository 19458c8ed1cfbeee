"""Checkpoints that are quantized in a way that is not read, recognized by what their tensors are, or by a config alone."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from moebius.checkpoint.dequantized import DequantizedTensor, SourceTensor
from moebius.checkpoint.shards import SCALES
from moebius.errors import UnsupportedModelError

WHAT_TO_DO = (
    "give the original in 16 or 32 bit, or dequantize it first: load it with transformers and"
    " quantization_config=FineGrainedFP8Config(dequantize=True) or Mxfp4Config(dequantize=True), then save_pretrained"
)

#: Tensors that exist in quantized checkpoints only: MXFP4, GPTQ and AWQ, compressed-tensors, bitsandbytes.
_CODES = ("_blocks", ".qweight", ".qzeros", ".weight_packed", ".quant_map", ".absmax")
_FIELDS = ("quantization_config", "compression_config")
_WIDE = {"F16", "BF16", "F32", "F64"}
_SAMPLES = 3
# float8_e4m3fn ends at 448, and scales are made so that the largest weight of a block meets it; weights are far below 1.
_CODES_FROM = 64.0


#: Methods whose tensors :mod:`moebius.checkpoint.dequantized` knows.
READ = {"fp8", "mxfp4", "compressed-tensors"}


def quantizations(config: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """Where a config names a quantization, at its top (``""``) or in a part such as ``text_config``, and which."""
    for name, part in config.items():
        if name in _FIELDS:
            if part:
                method = part.get("quant_method") if isinstance(part, Mapping) else None
                yield path, str(method or "an unknown method")
        elif isinstance(part, Mapping):
            yield from quantizations(part, f"{path}.{name}" if path else name)


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the same model in 16 bit."""
    return {
        name: without_quantization(part) if isinstance(part, Mapping) else part
        for name, part in config.items()
        if name not in _FIELDS
    }


def refuse_quantized_config(config: Mapping[str, Any], where: object, but: Collection[str] = ()) -> None:
    """Refuse a config that names a quantization, where there are no tensors to tell.

    Args:
        config: of the model.
        where: for the message.
        but: methods that are not refused.

    Raises:
        UnsupportedModelError: names the method, and says what to do.
    """
    for path, method in quantizations(config):
        if method not in but:
            inside = f" in {path}" if path else ""
            raise UnsupportedModelError(f"{where}: is quantized already ({method}{inside}); {WHAT_TO_DO}")


def refuse_codes(tensors: Mapping[str, SourceTensor], where: object) -> None:
    """Refuse tensors that are codes of a quantization, whether the config says so or lost it.

    Scales that nothing needs any more, beside weights that are as wide as they say, are let through.

    Raises:
        UnsupportedModelError: names the tensor, and says what to do.
    """
    stored = {name: tensor for name, tensor in tensors.items() if not isinstance(tensor, DequantizedTensor)}
    for name, tensor in stored.items():
        narrow = tensor.dtype not in _WIDE and len(tensor.shape) > 1
        if tensor.dtype.startswith(("F8", "F4", "F6")) or (narrow and (name.endswith(_CODES) or _is_weight(name))):
            raise UnsupportedModelError(
                f"{where}: {name} is stored as {tensor.dtype}, codes of a kind that is not read; {WHAT_TO_DO}"
            )
    pairs = [(base, name) for name in tensors for end in SCALES if (base := name.removesuffix(end)) != name]
    scaled = [weight for base, _ in pairs for weight in (base, f"{base}.weight") if weight in stored]
    for name in sorted(set(scaled))[:_SAMPLES]:
        weight = stored[name]
        if weight.dtype in _WIDE and weight.end > weight.begin and float(weight.load().abs().max()) > _CODES_FROM:
            raise UnsupportedModelError(f"{where}: {name} holds float8 codes as {weight.dtype}, scales apart; {WHAT_TO_DO}")


def _is_weight(name: str) -> bool:
    return name.endswith(".weight") or ".experts." in name
