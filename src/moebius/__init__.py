"""Moebius: Mixture-of-Experts language models at one bit.

    import moebius

    moebius.quantize("owner/model", "model-1bit")
    print(moebius.generate("model-1bit", "The router of a mixture of experts").text)

The functions are those of the command line, with its defaults: :mod:`moebius.api`. ``import moebius`` is light: neither torch
nor transformers is imported, and the names below come with what they need when they are first used. From then on
``AutoModelForCausalLM.from_pretrained`` loads packed checkpoints.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from moebius.hf.register import register
from moebius.table import Table

if TYPE_CHECKING:  # what a type checker sees: the functions themselves
    from moebius.api import chat, compare, evaluate, generate, info, load, load_tokenizer, plan, quantize
    from moebius.checkpoint.manifest import verify
    from moebius.errors import MoebiusError
    from moebius.hf.dequantize import dequantize
    from moebius.pipeline import quantize_model
    from moebius.recipe import CalibrationSettings, Recipe
    from moebius.reference_model import reference_path

    __version__: str

__all__ = [
    "CalibrationSettings",
    "MoebiusError",
    "Recipe",
    "__version__",
    "chat",
    "compare",
    "dequantize",
    "evaluate",
    "generate",
    "info",
    "load",
    "load_tokenizer",
    "plan",
    "quantize",
    "quantize_model",
    "reference_path",
    "verify",
]

_NAMES = Table(
    "name in moebius",
    {
        "CalibrationSettings": "moebius.recipe:CalibrationSettings",
        "MoebiusError": "moebius.errors:MoebiusError",
        "Recipe": "moebius.recipe:Recipe",
        "dequantize": "moebius.hf.dequantize:dequantize",
        "quantize_model": "moebius.pipeline:quantize_model",
        "reference_path": "moebius.reference_model:reference_path",
        "verify": "moebius.checkpoint.manifest:verify",
        **{name: f"moebius.api:{name}" for name in ("chat", "generate", "info", "load", "load_tokenizer", "plan")},
    },
)
#: Functions that share their name with a package, which is called in their place.
_PACKAGES = ("compare", "evaluate", "quantize")

register()

if not TYPE_CHECKING:  # to a type checker, a name that is not above does not exist

    def __getattr__(name: str) -> object:
        if name == "__version__":
            from importlib.metadata import version  # slow to import

            return version("moebius")
        if name in _PACKAGES:
            return import_module(f"moebius.{name}")
        if name not in __all__:
            raise AttributeError(f"module 'moebius' has no attribute {name!r}")
        return _NAMES[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
