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

from moebius import unfinished
from moebius.checkpoint.companions import copy_companions
from moebius.checkpoint.dequantized import SourceTensor
from moebius.checkpoint.guards import guard_sources
from moebius.checkpoint.manifest import MANIFEST_NAME, manifest_text
from moebius.checkpoint.reader import SourceCheckpoint
from moebius.checkpoint.shards import INDEX_NAME, MemoryTensor, byte_count, read_shard, sync_folder, write_text
from moebius.checkpoint.work_folder import WorkFolder
from moebius.errors import MoebiusError, OutputError
from moebius.formats import Packed, PackedProjection
from moebius.formats.projection import module_from_tensors

#: Bytes of a shard of copied tensors; a single larger tensor gets a shard of its own.
REST_SHARD_BYTES = 2_000_000_000

CONFIG_NAME = "config.json"
_MOVING = "moving.json"


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


#: Packed modules of a layer by their paths, and its entry.
KeptLayer = tuple[dict[str, PackedProjection | Packed], Any]


class _KeptLayers(Mapping[str, KeptLayer]):
    """Layers by name, read from their records and files."""

    def __init__(self, parts: Mapping[str, tuple[dict[str, Any], Path]]) -> None:
        self._parts = parts

    def __getitem__(self, name: str) -> KeptLayer:
        record, path = self._parts[name]
        stored = KeptTensors(path)
        packed: dict[str, PackedProjection | Packed] = {}
        for module, spec in record["modules"].items():
            own = {key.removeprefix(f"{module}."): stored[key] for key in stored if key.startswith(f"{module}.")}
            packed[module] = module_from_tensors(spec, own)
        return packed, record["entry"]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


class CheckpointWriter:
    """Writes a packed checkpoint to ``out``; a context that lets go of its work folder.

    Work goes to the folder ``.NAME.partial`` beside ``out`` (inside of it where ``out`` is a mount point or the current folder,
    which cannot give way to another), taken by :meth:`begin`. A second run with the same key goes on after what is there.

    Args:
        out: the folder to create; may exist if it is empty, and be a link to one that is.

    Raises:
        OutputError: ``out`` holds something, is a file, or lies where nothing can be written.
    """

    def __init__(self, out: Path) -> None:
        self.out = Path(out).expanduser().resolve()
        self._stays = self.out.is_dir() and (self.out.is_mount() or self.out.samefile(Path.cwd()))
        self.work = WorkFolder(unfinished.inside(self.out) if self._stays else unfinished.beside(self.out))
        if self.out.exists() and not self.out.is_dir():
            raise OutputError(f"{self.out}: is a file; give a folder that does not exist or is empty")
        if self.out.is_dir() and not self._is_free():
            self.work.remove_published()
            raise OutputError(f"{self.out}: is not empty; give another folder, or remove it first")
        ancestor = next(parent for parent in (self.work.path, *self.work.path.parents) if parent.exists())
        if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
            raise OutputError(f"{self.out}: {ancestor} cannot be written to; give another folder")

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.work.close()

    def begin(self, key: Mapping[str, Any]) -> None:
        """Take the work folder, and go on with what an earlier run of the same key finished.

        Args:
            key: everything that the bytes depend on, ready for JSON: hash of the source, recipe, calibration, machine.

        Raises:
            OutputError: another run is at work there, or left unfinished work with another key; or nothing can be written.
        """
        with self._writing():
            self.work.open(json.loads(json.dumps(key)))
            self._move_back()

    def require_room(self, wanted: int) -> None:
        """Refuse a disk on which that many bytes will not fit, finished work counted in.

        Raises:
            OutputError: says how many there are and how many are wanted.
        """
        ancestor = next(parent for parent in (self.work.path, *self.work.path.parents) if parent.exists())
        there = sum(path.stat().st_size for path in self.work.path.rglob("*") if path.is_file())
        free = shutil.disk_usage(ancestor).free + there
        if free < wanted:
            raise OutputError(
                f"{self.out}: the disk has {free / 1e9:.2f} GB for it, wanted about {wanted / 1e9:.2f} GB; make room, or "
                "choose an output on another disk"
            )

    def entries(self) -> dict[str, Any]:
        """What :meth:`write_layer` was told about each finished layer."""
        return {record["name"]: record["entry"] for record in self.work.parts("packed")}

    def modules(self) -> dict[str, Any]:
        """Specs of everything packed so far, by module path, in the order of the layers."""
        return {path: spec for record in self.work.parts("packed") for path, spec in record["modules"].items()}

    def write_layer(self, name: str, packed: Mapping[str, PackedProjection | Packed], entry: Any = None) -> None:
        """Write a layer's packed tensors as one shard.

        Args:
            name: of the layer, unique in the checkpoint, such as ``model.layers.0.mlp.experts``.
            packed: by module path, which leads the names of the tensors.
            entry: anything JSON can hold; :meth:`entries` gives it back, also after a resumption.

        Raises:
            OutputError: the disk is full or not writable. Finished layers stay.
            CheckpointError: tensors that could not be loaded again, such as scales beyond 16 bit.
        """
        for module, content in packed.items():
            content.check(module, "no load would accept it, so it was not written; are the source's weights sound?")
        guards = guard_sources({path: p.spec() for path, p in packed.items()})
        with self._writing():
            self.work.write(f"packed-{name}", [*_sources(packed), *guards], _record(name, packed, entry))

    def keep(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Remember tensors until the checkpoint is complete, also over a resumption.

        Raises:
            OutputError: the disk is full or not writable.
        """
        with self._writing():
            self.work.keep(name, [MemoryTensor(key, tensor) for key, tensor in tensors.items()], {})

    def kept(self, name: str) -> Mapping[str, Tensor] | None:
        """What :meth:`keep` was given under a name, each tensor read when it is asked for; None if nothing was."""
        path = self.work.kept(name)
        return None if path is None else KeptTensors(path)

    def keep_layer(
        self, name: str, packed: Mapping[str, PackedProjection | Packed], entry: Any = None, *, stage: str = "packed"
    ) -> None:
        """Remember a layer that is packed but will be packed again, as :meth:`write_layer` would write it.

        Args:
            name, packed, entry: as of :meth:`write_layer`.
            stage: what was done to it; each is remembered on its own.

        Raises:
            OutputError: the disk is full or not writable.
        """
        with self._writing():
            self.work.keep(f"{stage}-{name}", _sources(packed), _record(name, packed, entry))

    def kept_layers(self, stage: str = "packed") -> Mapping[str, KeptLayer]:
        """Packed modules and entry of every layer that :meth:`keep_layer` was given, each read when it is asked for."""
        return _KeptLayers({record["name"]: (record, path) for record, path in self.work.kept_parts(f"{stage}-")})

    def copy_rest(self, checkpoint: SourceCheckpoint, exclude: Collection[str]) -> None:
        """Copy all other tensors bit for bit under their own names, a few megabytes in memory at a time.

        Raises:
            OutputError: the disk is full or not writable.
        """
        for number, tensors in enumerate(_rest_shards(checkpoint, exclude)):
            with self._writing():
                self.work.write(f"rest-{number:05}", tensors, {})

    def finish(self, checkpoint: SourceCheckpoint, quantization_config: dict[str, Any], extra_files: Mapping[str, str]) -> None:
        """Write index, manifest and config, copy the tokenizer and the other small files, and move everything to ``out``.

        Args:
            checkpoint: the source, whose ``config.json`` is extended.
            quantization_config: goes into ``config.json``.
            extra_files: name to content.

        Raises:
            OutputError: the disk is full or not writable, or ``out`` was filled by something else meanwhile.
        """
        payload = self.work.payload
        entries = {name: e for record in self.work.parts() for name, e in record["tensors"].items()}
        total = sum(byte_count(e["dtype"], e["shape"]) for e in entries.values())
        index = {"metadata": {"total_size": total}, "weight_map": {n: e["file"] for n, e in sorted(entries.items())}}
        config = checkpoint.packed_config(quantization_config)
        with self._writing():
            copy_companions(checkpoint.folder, payload)
            write_text(payload / INDEX_NAME, json.dumps(index, indent=1) + "\n")
            write_text(payload / MANIFEST_NAME, manifest_text(entries))
            for name, text in extra_files.items():
                write_text(payload / name, text)
            write_text(payload / CONFIG_NAME, json.dumps(config, indent=1) + "\n")
            checkpoint.check_unchanged()
            self._publish()
        self.work.remove()

    def _publish(self) -> None:
        """Give the finished files their place."""
        if self._stays:
            self._move_in()
            return
        try:
            self.work.payload.rename(self.out)  # replaces an empty folder, refuses any other
            sync_folder(self.out.parent)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise OutputError(f"{self.out}: was filled by something else meanwhile; empty it and run again") from None
            raise

    def _move_in(self) -> None:
        """Move the files into a folder that is there, the config last: without it, it is no checkpoint."""
        if not self._is_free():
            raise OutputError(f"{self.out}: was filled by something else meanwhile; empty it and run again")
        names = sorted((path.name for path in self.work.payload.iterdir()), key=lambda name: name == CONFIG_NAME)
        write_text(self.work.path / _MOVING, json.dumps(names) + "\n")
        for name in names:
            (self.work.payload / name).rename(self.out / name)
        sync_folder(self.out)

    def _move_back(self) -> None:
        """Undo a :meth:`_move_in` that was killed: its files are made again from what it was about to be."""
        for name in self._moving():
            path = self.out / name
            if path.exists():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        (self.work.path / _MOVING).unlink(missing_ok=True)

    def _moving(self) -> list[str]:
        try:
            return [str(name) for name in json.loads((self.work.path / _MOVING).read_text(encoding="utf-8"))]
        except (OSError, ValueError):
            return []

    def _is_free(self) -> bool:
        """Whether nobody else's files are in ``out``."""
        own = {self.work.path.name, *self._moving()} if self._stays else set()
        return all(path.name in own for path in self.out.iterdir())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """File system errors turned into ones that say what to do."""
        try:
            yield
        except MoebiusError:
            raise
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OutputError(
                    f"{self.out}: the disk is full; finished layers are kept in {self.work.path}, "
                    "make room and run the same command again to resume"
                ) from None
            raise OutputError(f"{self.out}: cannot be written ({error.strerror or error}); give another folder") from None


def _sources(packed: Mapping[str, PackedProjection | Packed]) -> list[MemoryTensor]:
    return [MemoryTensor(f"{path}.{key}", t) for path, p in packed.items() for key, t in p.tensors().items()]


def _record(name: str, packed: Mapping[str, PackedProjection | Packed], entry: Any) -> dict[str, Any]:
    return {"name": name, "entry": entry, "modules": {path: p.spec() for path, p in packed.items()}}


def _rest_shards(checkpoint: SourceCheckpoint, exclude: Collection[str]) -> Iterator[list[SourceTensor]]:
    """The tensors to copy, in shards of bounded size, in the order of their names."""
    shard: list[SourceTensor] = []
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
