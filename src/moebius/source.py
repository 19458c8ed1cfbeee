"""What a user means by the name of a model: a path here, or a name on the hub."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from moebius.errors import ModelNotFoundError
from moebius.reference_model import reference_path


def path_or_hub_name(source: str | PathLike[str] | None) -> Path | str:
    """The path that is meant, a home directory written as ``~`` found; a name for the hub as it is; None: the reference model.

    Raises:
        ModelNotFoundError: it can only be a path, and nothing is there.
    """
    if source is None:
        return reference_path()
    path, text = Path(source).expanduser(), str(source)
    if path.exists():
        return path
    if not isinstance(source, str) or path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1:
        raise ModelNotFoundError(
            f"{source}: no such file or folder; give the folder of a checkpoint, or a hub name such as owner/model"
        )
    return text


def display_name(source: str | PathLike[str] | None) -> str:
    """What reports call a model: no path of this machine; None is the reference model."""
    return "reference model" if source is None else Path(source).name
