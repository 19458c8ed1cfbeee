"""Tells transformers about Moebius without importing it: registration waits until transformers has its own quantizers."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_TABLES = "transformers.quantizers.auto"
#: Where ``from_pretrained`` begins, see :data:`moebius.hf.one_line.ENTRANCES`.
_ENTRANCES = (
    "transformers.models.auto.configuration_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.auto.auto_factory",
    "transformers.modeling_utils",
)


def register() -> None:
    """Make transformers load packed checkpoints: now if it is imported already, else as soon as it is. Repeats do nothing."""
    _register()
    if not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


def _register() -> None:
    """With what transformers has imported by now; a module in the middle of its import waits for its end."""
    if all(hasattr(sys.modules.get(_TABLES), name) for name in ("register_quantizer", "register_quantization_config")):
        import moebius.hf.quantizer  # noqa: F401  registers itself; nothing is taken from it, it may be in the middle of its import
    if any(name in sys.modules for name in _ENTRANCES):
        from moebius.hf.one_line import wrap_entrances

        wrap_entrances()


class _WhenImported(MetaPathFinder):
    """Finds some modules the usual way, each once, and registers when one has been executed."""

    def __init__(self) -> None:
        self.waiting = {name for name in (_TABLES, *_ENTRANCES) if name not in sys.modules}

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in self.waiting:
            return None
        self.waiting.remove(name)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                try:
                    _register()
                except Exception as error:  # a program that uses transformers for something else must not fail
                    warnings.warn(f"moebius: packed checkpoints will not load ({error})", RuntimeWarning, stacklevel=2)

            loader.exec_module = execute_and_register
        return spec
