"""``save_pretrained`` of a packed model: a whole checkpoint, and nothing of what was in the folder before."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moebius.checkpoint.companions import copy_companions
from moebius.checkpoint.manifest import MANIFEST_NAME, REPORT_NAME, write_manifest
from moebius.checkpoint.shards import INDEX_NAME, SINGLE_NAME
from moebius.errors import CheckpointError, OutputError
from moebius.json_file import read_object
from moebius.private_transformers import quantizer_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def save_packed(model: PreTrainedModel, save_directory: str | Path, **options: Any) -> None:
    """``save_pretrained`` of a packed model: transformers' own, the manifest, and the tokenizer that the model came with.

    Everything is written to a hidden folder inside ``save_directory`` and moved into place at the end: a model can be saved
    over the files it was loaded from, and what was not written again of an older checkpoint there is removed. Tensors keep the
    names they have in the model; transformers loads those as well as the original ones.

    Args:
        model: loaded by ``from_pretrained``.
        save_directory: folder, made if it is not there.
        options: of transformers' ``save_pretrained``; ``push_to_hub`` uploads what is then in the checkpoint, all of it.

    Raises:
        OutputError: the folder is a file, or a variant is asked for, which packed checkpoints do not have.
    """
    folder = Path(save_directory)
    if options.pop("variant", None) is not None:
        raise OutputError(f"{folder}: packed checkpoints have no variants; leave out variant=")
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is a file; give a folder")
    push, main = options.pop("push_to_hub", False), options.get("is_main_process", True)
    hub: dict[str, Any] = {name: options.pop(name, None) for name in ("repo_id", "commit_message", "create_pr")}
    options = {**options, "save_original_format": False}
    if not main:
        type(model).save_pretrained(model, folder, **options)
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as work:
        type(model).save_pretrained(model, work, **options)
        write_manifest(Path(work))
        source = getattr(quantizer_of(model), "source_folder", None)
        if source is not None and source.is_dir():
            copy_companions(source, Path(work), replace=False)
        stale = _weights_of(folder)
        written = _move(Path(work), folder)
    for name in stale - written:
        (folder / name).unlink(missing_ok=True)
    if push:
        _upload(model, folder, written, options.get("token"), hub)


def _weights_of(folder: Path) -> set[str]:
    """Names of the files that belong to the weights in a folder: of this package, and of transformers."""
    names = {SINGLE_NAME, INDEX_NAME, MANIFEST_NAME, REPORT_NAME}
    names |= {path.name for path in folder.iterdir() if _SHARD.fullmatch(path.name)}
    for file, key in ((INDEX_NAME, "weight_map"), (MANIFEST_NAME, "tensors")):
        try:
            entries = read_object(folder / file).get(key)
        except CheckpointError:
            continue
        values = entries.values() if isinstance(entries, dict) else ()
        named = [value.get("file") if isinstance(value, dict) else value for value in values]
        # What a damaged index names outside the folder, or besides weights, is not ours to remove.
        names |= {n for n in named if isinstance(n, str) and n.endswith(".safetensors") and n == Path(n).name}
    return {name for name in names if (folder / name).is_file()}


def _move(work: Path, folder: Path) -> set[str]:
    """Move everything into place, the config last; returns the relative paths."""
    files = [path.relative_to(work) for path in work.rglob("*") if path.is_file()]
    for name in sorted(files, key=lambda name: (name.name == "config.json", name.name == MANIFEST_NAME, name)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(work / name, folder / name)
    return {str(name) for name in files}


def _upload(model: PreTrainedModel, folder: Path, written: set[str], token: Any, hub: dict[str, Any]) -> None:
    """Upload the checkpoint, and not what else the folder holds."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(hub["repo_id"] or folder.absolute().name, exist_ok=True).repo_id
    api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=sorted(written),
        commit_message=hub["commit_message"] or "Upload model",
        create_pr=bool(hub["create_pr"]),
    )
