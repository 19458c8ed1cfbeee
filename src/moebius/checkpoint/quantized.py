"""Checkpoints that are quantized already, recognized by what their config says and by what their tensors are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moebius.checkpoint.shards import SCALES, StoredTensor
from moebius.errors import UnsupportedModelError

WHAT_TO_DO = (
    "give the original in 16 or 32 bit, or dequantize it first: load it with transformers and"
    " quantization_config=FineGrainedFP8Config(dequantize=True) or Mxfp4Config(dequantize=True), then save_pretrained"
)

#: Tensors that exist in quantized checkpoints only: MXFP4, GPTQ and AWQ, compressed-tensors, bitsandbytes.
_CODES = ("_blocks", ".qweight", ".qzeros", ".weight_packed", ".quant_map", ".absmax")
_WIDE = {"F16", "BF16", "F32", "F64"}
_SAMPLES = 3
# float8_e4m3fn ends at 448, and scales are made so that the largest weight of a block meets it; weights are far below 1.
_CODES_FROM = 64.0


def refuse_quantized_config(config: Mapping[str, Any], where: object) -> None:
    """Refuse a config that names a quantization, its own or that of a part such as ``text_config``.

    Raises:
        UnsupportedModelError: names the method, and says what to do.
    """
    for path, quantization in _quantizations(config):
        method = quantization.get("quant_method") or "an unknown method"
        inside = f" in {path}" if path else ""
        raise UnsupportedModelError(f"{where}: is quantized already ({method}{inside}); {WHAT_TO_DO}")


def _quantizations(config: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name in ("quantization_config", "compression_config"):
        if found := config.get(name):
            yield path, found if isinstance(found, Mapping) else {}
    for name, part in config.items():
        if isinstance(part, Mapping) and name not in ("quantization_config", "compression_config"):
            yield from _quantizations(part, f"{path}.{name}" if path else name)


def refuse_codes(tensors: Mapping[str, StoredTensor], where: object) -> None:
    """Refuse tensors that are codes of a quantization, whether the config says so or lost it.

    Scales that nothing needs any more, beside weights that are as wide as they say, are let through.

    Raises:
        UnsupportedModelError: names the tensor, and says what to do.
    """
    for name, tensor in tensors.items():
        narrow = tensor.dtype not in _WIDE and len(tensor.shape) > 1
        if tensor.dtype.startswith(("F8", "F4", "F6")) or (narrow and (name.endswith(_CODES) or _is_weight(name))):
            raise UnsupportedModelError(f"{where}: {name} is stored as {tensor.dtype}, codes without a config; {WHAT_TO_DO}")
    pairs = [(base, name) for name in tensors for end in SCALES if (base := name.removesuffix(end)) != name]
    scaled = [weight for base, _ in pairs for weight in (base, f"{base}.weight") if weight in tensors]
    for name in sorted(set(scaled))[:_SAMPLES]:
        weight = tensors[name]
        if weight.dtype in _WIDE and weight.end > weight.begin and float(weight.load().abs().max()) > _CODES_FROM:
            raise UnsupportedModelError(f"{where}: {name} holds float8 codes as {weight.dtype}, scales apart; {WHAT_TO_DO}")


def _is_weight(name: str) -> bool:
    return name.endswith(".weight") or ".experts." in name
