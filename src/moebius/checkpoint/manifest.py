"""The manifest of a packed checkpoint: every tensor's file, shape, dtype and hash, so that damage is found before use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from moebius.checkpoint.described import check_contents, check_described
from moebius.checkpoint.guards import check_all_listed
from moebius.checkpoint.routing import check_routing
from moebius.checkpoint.shards import StoredTensor, is_guard, read_folder, write_text
from moebius.errors import CheckpointError
from moebius.json_file import MANIFEST_NAME as MANIFEST_NAME
from moebius.json_file import field, read_config, read_object

#: How a packed checkpoint was made; nothing needs it.
REPORT_NAME = "moebius_report.json"
FORMAT_VERSION = 1


def manifest_text(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """The manifest of these tensors (name to file, shape, dtype, sha256), ready to be written.

    Guards are not listed: they hold nothing, and a checkpoint is read as well without them.
    """
    listed = {name: entry for name, entry in sorted(entries.items()) if not is_guard(name, entry["shape"], entry["dtype"])}
    return json.dumps({"format_version": FORMAT_VERSION, "tensors": listed}, indent=1) + "\n"


def write_manifest(folder: Path) -> None:
    """Describe a checkpoint that something else wrote, such as ``save_pretrained``. Reads and hashes every tensor."""
    entries = {
        name: {"file": t.file.name, "shape": list(t.shape), "dtype": t.dtype, "sha256": t.sha256()}
        for name, t in read_folder(folder).items()
    }
    write_text(folder / MANIFEST_NAME, manifest_text(entries))


def quantization_of(config: Mapping[str, Any], where: object) -> dict[str, Any] | None:
    """What a ``config.json`` says about how Moebius packed the checkpoint; None if something else did, or nothing.

    Raises:
        CheckpointError: a version that is not read here, or something other than a description per module.
    """
    quantization = config.get("quantization_config")
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") != "moebius":
        return None
    check_version(quantization.get("format_version"), str(where))
    check_modules(quantization.get("modules"), where)
    for name in ("recipe", "calibration"):
        field(quantization, name, dict, where, {})
    return dict(quantization)


def check_modules(modules: Any, where: object) -> None:
    """Refuse ``modules`` that is not an object of objects, or empty.

    Raises:
        CheckpointError: says what it is.
    """
    if not isinstance(modules, dict) or not modules:
        raise CheckpointError(f"{where}: quantization_config names no packed `modules`; fetch config.json again")
    for module, spec in modules.items():
        parts = [spec] if not isinstance(spec, dict) or "format" in spec else list(spec.values())
        if not all(isinstance(part, dict) for part in parts) or not module:
            raise CheckpointError(f"{where}: modules[{module!r}] is {str(spec)[:60]!r}, wanted the description of a format")


def read_packed_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """``config.json`` of a packed checkpoint, and what it says about Moebius.

    Raises:
        CheckpointError: a checkpoint that Moebius did not pack, or a config that cannot be read.
    """
    path = folder / "config.json"
    config = read_config(path)
    quantization = quantization_of(config, path)
    if quantization is None:
        raise CheckpointError(f"{folder}: got a checkpoint that Moebius did not pack; wanted one with quant_method 'moebius'")
    return config, quantization


def is_packed(folder: Path) -> bool:
    """Whether a local folder is a checkpoint that Moebius packed."""
    path = folder / "config.json"
    return path.is_file() and quantization_of(read_config(path), path) is not None


def verify(folder: Path, *, hashes: bool = False) -> int:
    """Check a packed checkpoint against its manifest and against the formats that its config names.

    Args:
        folder: the checkpoint.
        hashes: also read every tensor, compare its sha256, and check what its values say; without, only the headers of the
            files are read.

    Returns:
        How many tensors there are, guards (see :mod:`moebius.checkpoint.guards`) not counted.

    Raises:
        CheckpointError: naming the tensor or file that is missing, extra, truncated, or of another shape, dtype or content, or
            the packed tensors that the config leaves out.
    """
    folder = Path(folder)
    config, quantization = read_packed_config(folder)
    modules = quantization["modules"]
    stored = read_folder(folder, config, guards=True)
    verify_modules(stored, folder / MANIFEST_NAME, modules, hashes=hashes)
    check_all_listed(stored, modules)
    check_routing(config, modules, folder / "config.json")
    if hashes:
        check_contents(stored, modules)
    return sum(not tensor.is_guard for tensor in stored.values())


def verify_modules(
    got: Mapping[str, StoredTensor], manifest: Path, modules: Mapping[str, Any], *, hashes: bool = False
) -> None:
    """:func:`verify` for files whose headers have been read already, and a manifest that may lie elsewhere (a hub's cache).

    Args:
        got: what the files hold that are loaded.
        manifest: the file.
        modules: of the ``quantization_config``.
        hashes: also compare every tensor's sha256.

    Raises:
        CheckpointError: as :func:`verify`.
    """
    wanted = _read(manifest)
    folder = manifest.parent
    got = {name: tensor for name, tensor in got.items() if not tensor.is_guard}
    for name in sorted(wanted.keys() - got.keys()):
        raise CheckpointError(f"{name}: missing from {folder}, though the manifest lists it; fetch the checkpoint again")
    for name in sorted(got.keys() - wanted.keys()):
        raise CheckpointError(f"{name}: in {got[name].file}, but not in the manifest; fetch the checkpoint again")
    for name, tensor in got.items():
        _compare(name, tensor, wanted[name])
    check_described(got, modules)
    if hashes:
        check_hashes(got, {name: str(entry.get("sha256")) for name, entry in wanted.items()})


def check_hashes(tensors: Mapping[str, StoredTensor], wanted: Mapping[str, str]) -> None:
    """Read every tensor and compare its sha256, on as many threads as torch uses.

    Raises:
        CheckpointError: names the first tensor, in the order of the names, whose bytes are others.
    """
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        hashes = pool.map(lambda name: tensors[name].sha256(), names := sorted(tensors))
        for name, found in zip(names, hashes, strict=True):
            if found != wanted[name]:
                file = tensors[name].file
                raise CheckpointError(f"{name}: the bytes in {file} are not those that were written; fetch it again")


def check_version(version: Any, where: str) -> None:
    """Refuse a format version that this Moebius does not read.

    Raises:
        CheckpointError: says which versions it reads.
    """
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise CheckpointError(f"{where}: got format_version {version!r}, wanted {FORMAT_VERSION}; install a newer Moebius")


def _read(path: Path) -> dict[str, dict[str, Any]]:
    content = read_object(path)
    check_version(content.get("format_version"), str(path))
    tensors: dict[str, dict[str, Any]] = field(content, "tensors", dict, path)
    for name, entry in tensors.items():
        if not isinstance(entry, dict) or not {"file", "shape", "dtype", "sha256"} <= entry.keys():
            raise CheckpointError(f"{path}: says {str(entry)[:60]!r} of {name}, wanted file, shape, dtype and sha256")
    return tensors


def _compare(name: str, got: StoredTensor, wanted: Mapping[str, Any]) -> None:
    if got.file.name != wanted["file"]:
        raise CheckpointError(f"{name}: found in {got.file.name}, wanted in {wanted['file']} as the manifest says")
    if list(got.shape) != wanted["shape"] or got.dtype != wanted["dtype"]:
        raise CheckpointError(
            f"{name}: got {list(got.shape)} {got.dtype}, wanted {wanted['shape']} {wanted['dtype']} as the manifest says"
        )
