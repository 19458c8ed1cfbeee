"""Where the packed modules of a checkpoint are in the class that it is loaded with.

``config.json`` names them as they are in the causal language model. The same weights load into its base model
(``AutoModel``), a classifier, or a class with towers beside the text model, where paths begin otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from moebius.errors import CheckpointError


def paths_in(model: nn.Module, modules: Mapping[str, Any]) -> dict[str, str]:
    """Path in ``config.json`` to path in this model, of every packed module that the model has.

    Left out are heads that a model without a head does not have.

    Args:
        model: before or after its modules were packed.
        modules: of the ``quantization_config``.

    Raises:
        CheckpointError: a module that the model should have.
    """
    names = {name for name, _ in model.named_modules()}
    found = {}
    for path, spec in modules.items():
        owner, _, parameter = path.rpartition(".") if "factor" in spec else (path, "", "")
        here = _in_model(owner, names, getattr(model, "base_model_prefix", ""))
        if here is not None:
            found[path] = f"{here}.{parameter}" if parameter else here
        elif not _is_head(model, path):
            raise CheckpointError(f"{path}: config.json says that it is packed, but this model has no such module")
    return found


def renamed_beginnings(paths: Mapping[str, str]) -> dict[str, str]:
    """What the beginnings of stored names become in this model, for those that differ: ``{"model.": "model.language_model."}``.

    Beginnings reach to the end of what differs, so that ``layers.0`` and all after it stays as it is.
    """
    found = {}
    for stored, here in paths.items():
        if stored != here:
            a, b = stored.split("."), here.split(".")
            while a and b and a[-1] == b[-1]:
                a.pop()
                b.pop()
            found["".join(f"{part}." for part in a)] = "".join(f"{part}." for part in b)
    return found


def _in_model(owner: str, names: set[str], prefix: str) -> str | None:
    candidates = [owner, owner.removeprefix(f"{prefix}."), f"{prefix}.{owner}"] if prefix else [owner]
    for candidate in candidates:
        if candidate in names:
            return candidate
    parts = owner.split(".")
    for start in range(1, len(parts)):
        tail = ".".join(parts[start:])
        if not re.search(r"\.\d+\.", f".{tail}"):  # without the number of its layer it could be any
            return None
        if len(matches := [name for name in names if name.endswith(f".{tail}")]) == 1:
            return matches[0]
    return None


def _is_head(model: nn.Module, path: str) -> bool:
    """Whether a path lies outside the base model, and this model is a base model or has another head in its place."""
    prefix = getattr(model, "base_model_prefix", "")
    return bool(prefix) and not path.startswith(f"{prefix}.") and "." not in path
