"""Packed checkpoints: written layer by layer beside the place where they will be, resumable, and moved there when complete."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from moebius.checkpoint.companions import copy_companions
from moebius.checkpoint.guards import guard_sources
from moebius.checkpoint.manifest import MANIFEST_NAME, manifest_text
from moebius.checkpoint.reader import SourceCheckpoint
from moebius.checkpoint.shards import INDEX_NAME, MemoryTensor, StoredTensor, byte_count, read_shard, write_shard, write_text
from moebius.errors import CheckpointError, MoebiusError, OutputError
from moebius.formats import Packed, PackedProjection, from_tensors
from moebius.formats.projection import projection_from_tensors

#: Bytes of a shard of copied tensors; a single larger tensor gets a shard of its own.
REST_SHARD_BYTES = 2_000_000_000


class KeptTensors(Mapping[str, Tensor]):
    """The tensors of a file by name, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._path, self._names = path, tuple(read_shard(path))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        with safe_open(self._path, "pt") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class CheckpointWriter:
    """Writes a packed checkpoint to ``out``.

    Work goes to the folder ``.NAME.partial`` beside ``out``, made when the first shard is written. A shard there is complete
    once its record is; a second run with the same key finds the records and goes on after them.

    Args:
        out: the folder to create; may exist if it is empty.

    Raises:
        OutputError: ``out`` holds something, is a file, or lies where nothing can be written.
    """

    def __init__(self, out: Path) -> None:
        self.out = Path(out).expanduser().absolute()
        self.work = self.out.parent / f".{self.out.name}.partial"
        self._payload, self._records, self._kept = (self.work / part for part in ("checkpoint", "records", "kept"))
        self._key = ""
        if self.out.exists() and not self.out.is_dir():
            raise OutputError(f"{self.out}: is a file; give a folder that does not exist or is empty")
        if self.out.is_dir() and any(self.out.iterdir()):
            raise OutputError(f"{self.out}: is not empty; give another folder, or remove it first")
        ancestor = next(parent for parent in self.out.parents if parent.exists())
        if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
            raise OutputError(f"{self.out}: {ancestor} cannot be written to; give another folder")

    def begin(self, key: Mapping[str, Any]) -> None:
        """Go on with the work of an earlier run if its key was the same, else start over.

        Args:
            key: everything that the bytes depend on, ready for JSON: hash of the source, recipe, calibration.
        """
        self._key = json.dumps(key, sort_keys=True, indent=1) + "\n"
        run = self.work / "run.json"
        if self.work.exists() and not (run.is_file() and run.read_text(encoding="utf-8") == self._key):
            shutil.rmtree(self.work)
        for path in list(self._records.glob("*.json")):
            try:
                read_shard(self._payload / f"{path.stem}.safetensors")
            except CheckpointError:  # somebody cleaned up by hand, or the machine lost power
                path.unlink()

    def entries(self) -> dict[str, Any]:
        """What :meth:`write_layer` was told about each finished layer."""
        return {record["name"]: record["entry"] for record in self._read_records("packed")}

    def modules(self) -> dict[str, Any]:
        """Specs of everything packed so far, by module path, in the order of the layers."""
        return {path: spec for record in self._read_records("packed") for path, spec in record["modules"].items()}

    def write_layer(self, name: str, packed: Mapping[str, PackedProjection | Packed], entry: Any = None) -> None:
        """Write a layer's packed tensors as one shard.

        Args:
            name: of the layer, unique in the checkpoint, such as ``model.layers.0.mlp.experts``.
            packed: by module path, which leads the names of the tensors.
            entry: anything JSON can hold; :meth:`entries` gives it back, also after a resumption.

        Raises:
            OutputError: the disk is full or not writable. Finished layers stay.
        """
        sources = [MemoryTensor(f"{path}.{key}", t) for path, p in packed.items() for key, t in p.tensors().items()]
        specs = {path: p.spec() for path, p in packed.items()}
        sources += guard_sources(specs)
        self._write_recorded(f"packed-{name}", sources, {"name": name, "entry": entry, "modules": specs})

    def keep(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Remember tensors until the checkpoint is complete, also over a resumption.

        Raises:
            OutputError: the disk is full or not writable.
        """
        with self._writing():
            self._kept.mkdir(exist_ok=True)
            write_shard(self._kept / f"{name}.safetensors", [MemoryTensor(key, tensor) for key, tensor in tensors.items()])

    def kept(self, name: str) -> Mapping[str, Tensor] | None:
        """What :meth:`keep` was given under a name, each tensor read when it is asked for; None if nothing was."""
        path = self._kept / f"{name}.safetensors"
        return KeptTensors(path) if path.is_file() else None

    def keep_layer(self, name: str, packed: Mapping[str, PackedProjection | Packed], entry: Any = None) -> None:
        """Remember a layer that is packed but will be packed again, as :meth:`write_layer` would write it.

        Raises:
            OutputError: the disk is full or not writable.
        """
        self.keep(f"packed-{name}", {f"{path}.{key}": t for path, p in packed.items() for key, t in p.tensors().items()})
        record = {"name": name, "entry": entry, "modules": {path: p.spec() for path, p in packed.items()}}
        with self._writing():
            write_text(self._kept / f"packed-{name}.json", json.dumps(record) + "\n")

    def kept_layers(self) -> dict[str, tuple[dict[str, PackedProjection | Packed], Any]]:
        """Packed modules and entry of every layer that :meth:`keep_layer` was given."""
        layers = {}
        for path in sorted(self._kept.glob("packed-*.json"), key=_natural):
            record = json.loads(path.read_text(encoding="utf-8"))
            stored = KeptTensors(path.with_suffix(".safetensors"))
            packed: dict[str, PackedProjection | Packed] = {}
            for module, spec in record["modules"].items():
                own = {name.removeprefix(f"{module}."): t for name, t in stored.items() if name.startswith(f"{module}.")}
                packed[module] = projection_from_tensors(spec, own) if "factor" in spec else from_tensors(spec, own)
            layers[record["name"]] = packed, record["entry"]
        return layers

    def copy_rest(self, checkpoint: SourceCheckpoint, exclude: Collection[str]) -> None:
        """Copy all other tensors bit for bit under their own names, a few megabytes in memory at a time.

        Raises:
            OutputError: the disk is full or not writable.
        """
        for number, tensors in enumerate(_rest_shards(checkpoint, exclude)):
            self._write_recorded(f"rest-{number:05}", tensors, {})

    def finish(self, checkpoint: SourceCheckpoint, quantization_config: dict[str, Any], extra_files: Mapping[str, str]) -> None:
        """Write index, manifest and config, copy the tokenizer and the other small files, and move everything to ``out``.

        Args:
            checkpoint: the source, whose ``config.json`` is extended.
            quantization_config: goes into ``config.json``.
            extra_files: name to content.

        Raises:
            OutputError: the disk is full or not writable, or ``out`` was filled by something else meanwhile.
        """
        entries = {name: e for record in self._read_records("") for name, e in record["tensors"].items()}
        total = sum(byte_count(e["dtype"], e["shape"]) for e in entries.values())
        index = {"metadata": {"total_size": total}, "weight_map": {n: e["file"] for n, e in sorted(entries.items())}}
        config = checkpoint.packed_config(quantization_config)
        with self._writing():
            copy_companions(checkpoint.folder, self._payload)
            write_text(self._payload / INDEX_NAME, json.dumps(index, indent=1) + "\n")
            write_text(self._payload / MANIFEST_NAME, manifest_text(entries))
            write_text(self._payload / "config.json", json.dumps(config, indent=1) + "\n")
            for name, text in extra_files.items():
                write_text(self._payload / name, text)
            try:
                self._payload.rename(self.out)  # replaces an empty folder, refuses any other
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    raise OutputError(f"{self.out}: was filled by something else meanwhile; empty it and run again") from None
                raise
        shutil.rmtree(self.work)

    def _write_recorded(self, stem: str, sources: list[Any], record: dict[str, Any]) -> None:
        path = self._records / f"{stem}.json"
        if path.is_file():
            return
        with self._writing():
            entries = write_shard(self._payload / f"{stem}.safetensors", sources)
            write_text(path, json.dumps({**record, "tensors": entries}) + "\n")

    def _read_records(self, prefix: str) -> list[dict[str, Any]]:
        paths = sorted(self._records.glob(f"{prefix}*.json"), key=_natural)
        return [json.loads(path.read_text(encoding="utf-8")) for path in paths]

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """The work folder, and file system errors turned into ones that say what to do."""
        assert self._key, "begin() comes first"
        try:
            if not self.work.exists():
                self._payload.mkdir(parents=True)
                self._records.mkdir()
                write_text(self.work / "run.json", self._key)
            yield
        except MoebiusError:
            raise
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OutputError(
                    f"{self.out}: the disk is full; finished layers are kept in {self.work}, "
                    "make room and run the same command again to resume"
                ) from None
            raise OutputError(f"{self.out}: cannot be written ({error.strerror or error}); give another folder") from None


def _rest_shards(checkpoint: SourceCheckpoint, exclude: Collection[str]) -> Iterator[list[StoredTensor]]:
    """The tensors to copy, in shards of bounded size, in the order of their names."""
    shard: list[StoredTensor] = []
    size = 0
    for name, tensor in checkpoint.tensors.items():
        if name in exclude:
            continue
        length = tensor.end - tensor.begin
        if shard and size + length > REST_SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += length
    if shard:
        yield shard


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """Sorts ``layers.2`` before ``layers.10``."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in path.stem.split(".")]
