"""What transformers raises about a packed checkpoint, in one line of a Moebius error.

A ``config.json`` that is no JSON, a field of another type, an index without shards: transformers and its libraries raise a
dozen classes for them, in many lines, and most before a quantizer is asked. So ``from_pretrained`` is wrapped where it begins.
Errors about everything that is not a folder packed by Moebius pass as they are.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

from moebius.errors import CheckpointError, MoebiusError, UnsupportedModelError, want_of_memory
from moebius.json_file import MANIFEST_NAME, read_config

#: Modules of transformers, and the class in each whose ``from_pretrained`` is wrapped.
ENTRANCES = {
    "transformers.modeling_utils": "PreTrainedModel",
    "transformers.models.auto.auto_factory": "_BaseAutoModelClass",
    "transformers.models.auto.configuration_auto": "AutoConfig",
    "transformers.models.auto.tokenization_auto": "AutoTokenizer",
}


def wrap_entrances() -> None:
    """Wrap the classes that are there by now. Repeats do nothing; a module in the middle of its import is left for later."""
    for module, name in ENTRANCES.items():
        kind = getattr(sys.modules.get(module), name, None)
        for each in (kind, *kind.__subclasses__()) if kind is not None else ():  # automatic classes have copies of their own
            own = each.__dict__.get("from_pretrained")
            if isinstance(own, classmethod) and not hasattr(own, "_of_moebius"):
                _wrap(each)


def _wrap(kind: Any) -> None:
    original = kind.__dict__["from_pretrained"].__func__

    @functools.wraps(original)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        wrap_entrances()  # where the start-up hook came in the middle of an import
        source: Any = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        if packed := _is_packed(source):
            read_config(Path(source) / "config.json")
        try:
            return original(cls, *args, **kwargs)
        except MoebiusError:
            raise
        except Exception as error:
            if not packed or want_of_memory(error):
                raise
            from moebius.models.load import why_not_loaded

            reason = " ".join(why_not_loaded(error).split())[:400]
            if "Unrecognized configuration class" in reason:  # nothing is wrong with the checkpoint
                raise UnsupportedModelError(f"{source}: {reason}") from error
            raise CheckpointError(f"{source}: transformers cannot load it: {reason}; fetch it again") from error

    wrapped: Any = classmethod(from_pretrained)
    wrapped._of_moebius = True
    kind.from_pretrained = wrapped


def _is_packed(source: Any) -> bool:
    try:
        return (Path(source) / MANIFEST_NAME).exists() or b'"moebius"' in (Path(source) / "config.json").read_bytes()
    except (TypeError, OSError, ValueError):
        return False
