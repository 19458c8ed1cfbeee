"""Moebius: Mixture-of-Experts language models at one bit.

After ``import moebius``, ``AutoModelForCausalLM.from_pretrained`` loads packed checkpoints. Neither torch nor transformers is
imported for that; the names below come with what they need when they are first used.
"""

from __future__ import annotations

from typing import Any

from moebius.hf.register import register
from moebius.table import Table

__all__ = ["CalibrationSettings", "Recipe", "dequantize", "quantize_model", "reference_path", "verify"]

_NAMES = Table(
    "name in moebius",
    {
        "CalibrationSettings": "moebius.recipe:CalibrationSettings",
        "Recipe": "moebius.recipe:Recipe",
        "dequantize": "moebius.hf.dequantize:dequantize",
        "quantize_model": "moebius.pipeline:quantize_model",
        "reference_path": "moebius.reference_model:reference_path",
        "verify": "moebius.checkpoint.manifest:verify",
    },
)

register()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'moebius' has no attribute {name!r}")
    return _NAMES[name]
