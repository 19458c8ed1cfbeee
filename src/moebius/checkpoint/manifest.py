"""The manifest of a packed checkpoint: every tensor's file, shape, dtype and hash, so that damage is found before use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moebius.checkpoint.routing import check_routing
from moebius.checkpoint.shards import DTYPE_NAMES, StoredTensor, read_folder, write_text
from moebius.errors import CheckpointError
from moebius.formats.base import empty_like_spec, from_tensors
from moebius.formats.projection import empty_projection, projection_from_tensors

MANIFEST_NAME = "moebius_manifest.json"
FORMAT_VERSION = 1


def manifest_text(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """The manifest of these tensors (name to file, shape, dtype, sha256), ready to be written."""
    return json.dumps({"format_version": FORMAT_VERSION, "tensors": dict(sorted(entries.items()))}, indent=1) + "\n"


def write_manifest(folder: Path) -> None:
    """Describe a checkpoint that something else wrote, such as ``save_pretrained``. Reads and hashes every tensor."""
    entries = {
        name: {"file": t.file.name, "shape": list(t.shape), "dtype": t.dtype, "sha256": t.sha256()}
        for name, t in read_folder(folder).items()
    }
    write_text(folder / MANIFEST_NAME, manifest_text(entries))


def verify(folder: Path, *, hashes: bool = False) -> int:
    """Check a packed checkpoint against its manifest and against the formats that its config names.

    Args:
        folder: the checkpoint.
        hashes: also read every tensor, compare its sha256, and check what its values say; without, only the headers of the
            files are read.

    Returns:
        How many tensors there are.

    Raises:
        CheckpointError: naming the tensor or file that is missing, extra, truncated, or of another shape, dtype or content.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        quantization = config.get("quantization_config") or {}
    except (OSError, ValueError, AttributeError):
        raise CheckpointError(f"{folder / 'config.json'}: missing or not a JSON object; fetch the checkpoint again") from None
    if quantization.get("quant_method") != "moebius":
        raise CheckpointError(f"{folder}: got a checkpoint that Moebius did not pack; wanted one with quant_method 'moebius'")
    check_version(quantization.get("format_version"), str(folder / "config.json"))
    modules = quantization.get("modules") or {}
    tensors = verify_modules(folder, folder / MANIFEST_NAME, modules, hashes=hashes)
    check_routing(config, modules, folder / "config.json")
    if hashes:
        check_contents(read_folder(folder), modules)
    return tensors


def verify_modules(folder: Path, manifest: Path, modules: Mapping[str, Any], *, hashes: bool = False) -> int:
    """:func:`verify` for a config that has been read already, and a manifest that may lie elsewhere (a hub's cache)."""
    wanted = _read(manifest)
    got = read_folder(folder)
    for name in sorted(wanted.keys() - got.keys()):
        raise CheckpointError(f"{name}: missing from {folder}, though the manifest lists it; fetch the checkpoint again")
    for name in sorted(got.keys() - wanted.keys()):
        raise CheckpointError(f"{name}: in {got[name].file}, but not in the manifest; fetch the checkpoint again")
    for name, tensor in got.items():
        _compare(name, tensor, wanted[name])
    for module, spec in modules.items():
        for name, (shape, dtype) in expected_tensors(module, spec).items():
            if name not in got:
                raise CheckpointError(f"{name}: missing from {folder}, though config.json says that {module} is packed")
            if (tensor := got[name]).shape != shape or tensor.dtype != dtype:
                raise CheckpointError(f"{name}: got {tensor.shape} {tensor.dtype}, wanted {shape} {dtype} as config.json says")
    if hashes:
        for name, tensor in got.items():
            if tensor.sha256() != wanted[name]["sha256"]:
                raise CheckpointError(f"{name}: the bytes in {tensor.file} are not those that were written; fetch it again")
    return len(got)


def check_contents(stored: Mapping[str, StoredTensor], modules: Mapping[str, Any]) -> None:
    """Read what was packed, a module at a time, and refuse values that no load would accept: see :meth:`Packed.check`.

    Args:
        stored: every tensor of the checkpoint; shapes and dtypes have been checked.
        modules: of the ``quantization_config``.

    Raises:
        CheckpointError: names the tensor.
    """
    for module, spec in modules.items():
        own = {name.removeprefix(f"{module}."): stored[name].load() for name in expected_tensors(module, spec)}
        (projection_from_tensors(spec, own) if "factor" in spec else from_tensors(spec, own)).check(module)


def expected_tensors(module: str, spec: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Names, shapes and safetensors dtypes of the tensors that stand for a packed module.

    Args:
        module: its path, such as ``model.layers.0.mlp.experts.gate_up_proj``.
        spec: of a :class:`PackedProjection` or a :class:`Packed`.

    Raises:
        CheckpointError: a spec that no format of this version describes.
    """
    try:
        packed = empty_projection(dict(spec)) if "factor" in spec else empty_like_spec(dict(spec))
    except Exception as error:  # whatever a damaged spec does to the constructor of a format
        raise CheckpointError(f"{module}: config.json describes it in a way this version does not know: {error}") from error
    return {f"{module}.{name}": (tuple(t.shape), DTYPE_NAMES[t.dtype]) for name, t in packed.tensors().items()}


def check_version(version: Any, where: str) -> None:
    """Refuse a format version that this Moebius does not read.

    Raises:
        CheckpointError: says which versions it reads.
    """
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{where}: got format_version {version!r}, wanted {FORMAT_VERSION}; install a newer Moebius")


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        check_version(content["format_version"], str(path))
        return content["tensors"]
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; without it the checkpoint cannot be checked, fetch it again") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path}: cannot be read; fetch it again") from None


def _compare(name: str, got: StoredTensor, wanted: Mapping[str, Any]) -> None:
    if got.file.name != wanted["file"]:
        raise CheckpointError(f"{name}: found in {got.file.name}, wanted in {wanted['file']} as the manifest says")
    if list(got.shape) != wanted["shape"] or got.dtype != wanted["dtype"]:
        raise CheckpointError(
            f"{name}: got {list(got.shape)} {got.dtype}, wanted {wanted['shape']} {wanted['dtype']} as the manifest says"
        )
