"""The small files that make a checkpoint whole: tokenizer, chat templates, generation config, licence, code of its own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from moebius.checkpoint.manifest import MANIFEST_NAME
from moebius.checkpoint.shards import INDEX_NAME

#: Where transformers keeps chat templates by name, beside ``chat_template.jinja``.
TEMPLATES_FOLDER = "additional_chat_templates"

# Weights in any format, what belongs to the weights, and the model card, which describes another model.
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt", ".tmp"}
_OF_THE_WEIGHTS = {"config.json", MANIFEST_NAME, INDEX_NAME, "README.md", "pytorch_model.bin.index.json"}


def companion_files(folder: Path) -> Iterator[Path]:
    """Paths of the files that travel with the weights, relative to the checkpoint, in the order of their names."""
    for path in sorted(folder.iterdir()):
        known = path.suffix in _WEIGHTS or path.name in _OF_THE_WEIGHTS or path.name.endswith(".safetensors.index.json")
        if path.is_file() and not known and path.name[0] != ".":
            yield path.relative_to(folder)
    for path in sorted((folder / TEMPLATES_FOLDER).glob("*.jinja")):
        yield path.relative_to(folder)


def copy_companions(folder: Path, target: Path, *, replace: bool = True) -> list[Path]:
    """Copy :func:`companion_files` to another checkpoint.

    Args:
        folder: from where.
        target: to where; must exist.
        replace: whether a file that is there already gives way.

    Returns:
        The relative paths of all of them, copied or there before.
    """
    names = list(companion_files(folder))
    for name in names:
        if replace or not (target / name).exists():
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, target / name)
    return names
