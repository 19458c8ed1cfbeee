"""The folder of an unfinished run: locked, bound to what the run was asked for, and made of parts that prove themselves whole.

Every part is a safetensors file and a record beside it, written last. A record holds the hashes of its file, the digest of the
run's key and a digest of itself, so that damage to any file costs that part alone and parts of two runs are never mixed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from moebius.checkpoint.shards import TensorSource, header_digest, read_shard, sync_folder, write_shard, write_text
from moebius.errors import CheckpointError, OutputError

_SHOWN = 4  # settings that differ, in a message


class WorkFolder:
    """The work of one run, which nobody else touches meanwhile.

    Args:
        path: of the folder, made by :meth:`open`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.payload, self._records, self._kept = (path / part for part in ("checkpoint", "records", "kept"))
        #: For what is of no use to a later run.
        self.scratch = path / "scratch"
        self._lock: IO[bytes] | None = None
        self._run = ""

    def open(self, key: Mapping[str, Any]) -> None:
        """Take the folder, and keep of it what an earlier run with the same key finished.

        Args:
            key: everything that the bytes depend on, ready for JSON.

        Raises:
            OutputError: another run holds it, or it holds the work of a run with another key; says what differs.
        """
        self._run = _digest(key)
        self._lock = _locked(self.path)
        try:
            self._refuse_another_run(key)
            for folder in (self.payload, self._records, self._kept):
                folder.mkdir(exist_ok=True)
            self._clean()
            write_text(self.path / "run.json", json.dumps({"digest": self._run, "key": key}, indent=1) + "\n")
        except BaseException:
            self._release()
            raise

    def close(self) -> None:
        """Let go of the folder; one in which nothing was finished goes away."""
        if self._lock is None:
            return
        shutil.rmtree(self.scratch, ignore_errors=True)
        if not any(self._records.glob("*.json")) and not any(self._kept.glob("*.json")):
            shutil.rmtree(self.path, ignore_errors=True)
        self._release()

    def remove(self) -> None:
        """All of it, because the run is complete; last what tells that there was one."""
        for path in sorted(self.path.iterdir(), key=lambda path: path.name == "run.json"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.path.rmdir()
        self._release()

    def remove_published(self) -> None:
        """Remove what a run left that was killed after its checkpoint had got its place: a folder without a checkpoint."""
        if (self.path / "run.json").is_file() and not self.payload.exists():
            self._lock = _locked(self.path)
            self.remove()

    def write(self, stem: str, sources: Sequence[TensorSource], record: Mapping[str, Any]) -> None:
        """A part of the checkpoint; one that is there already is not written again."""
        _write_part(self._records, self.payload, stem, sources, {**record, "run": self._run})

    def keep(self, stem: str, sources: Sequence[TensorSource], record: Mapping[str, Any]) -> None:
        """A part that is remembered until the checkpoint is complete, and not part of it."""
        _write_part(self._kept, self._kept, stem, sources, {**record, "run": self._run})

    def parts(self, prefix: str = "") -> list[dict[str, Any]]:
        """Records of the parts of the checkpoint, in the order of their layers."""
        return [
            json.loads(path.read_text(encoding="utf-8")) for path in sorted(self._records.glob(f"{prefix}*.json"), key=_natural)
        ]

    def kept(self, stem: str) -> Path | None:
        """The file of what was kept under a name; None if nothing was."""
        return self._kept / f"{stem}.safetensors" if (self._kept / f"{stem}.json").is_file() else None

    def kept_parts(self, prefix: str) -> Iterator[tuple[dict[str, Any], Path]]:
        """Record and file of what was kept under names that begin so, in the order of the layers."""
        for path in sorted(self._kept.glob(f"{prefix}*.json"), key=_natural):
            yield json.loads(path.read_text(encoding="utf-8")), path.with_suffix(".safetensors")

    def _refuse_another_run(self, key: Mapping[str, Any]) -> None:
        try:
            there = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
            before, digest = dict(there["key"]), there["digest"]
        except (OSError, ValueError, KeyError, TypeError):
            return  # none, or damaged: the parts say themselves which run they belong to
        if digest == _digest(before) != self._run:
            raise OutputError(
                f"{self.path}: holds the unfinished work of a run with other settings ({_difference(before, dict(key))}); "
                "give the same ones to finish it, remove that folder to start over, or choose another output"
            )

    def _clean(self) -> None:
        """Forget parts that are damaged or of another run, and whatever a run that was killed left in between."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        for records, files in ((self._records, self.payload), (self._kept, self._kept)):
            whole = {path.stem for path in records.glob("*.json") if self._is_whole(path, files)}
            for path in {*records.iterdir(), *files.iterdir()}:
                if path.suffix not in (".json", ".safetensors") or path.stem not in whole or path.is_dir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _is_whole(self, path: Path, files: Path) -> bool:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            digest = record.pop("digest")
            if digest != _digest(record) or record["run"] != self._run:
                return False
            file = files / f"{path.stem}.safetensors"
            tensors = read_shard(file)
            wanted = {name: entry["sha256"] for name, entry in record["tensors"].items()}
            return header_digest(file) == record["header"] and {n: t.sha256() for n, t in tensors.items()} == wanted
        except (OSError, ValueError, KeyError, TypeError, AttributeError, CheckpointError):
            return False

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _write_part(records: Path, files: Path, stem: str, sources: Sequence[TensorSource], record: dict[str, Any]) -> None:
    path = records / f"{stem}.json"
    if path.is_file():
        return
    file = files / f"{stem}.safetensors"
    record |= {"tensors": write_shard(file, sources), "header": header_digest(file)}
    record = json.loads(json.dumps(record))  # as it will be read: tuples are lists, keys are strings
    write_text(path, json.dumps({**record, "digest": _digest(record)}) + "\n")


def _locked(folder: Path) -> IO[bytes]:
    """The lock of a folder, which is made. The system lets go of it when the process ends, however it ends."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent)
        file = (folder / "lock").open("ab")
        try:
            _take(file)
        except OSError:
            file.close()
            raise OutputError(
                f"{folder}: another run is at work there; wait for it, or choose another output with --out"
            ) from None
        try:  # a run that finished meanwhile took the folder with it
            if (folder / "lock").stat().st_ino == os.fstat(file.fileno()).st_ino:
                return file
        except FileNotFoundError:
            pass
        file.close()


def _take(file: IO[bytes]) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Which settings two keys differ in."""
    old, new = _flat(before), _flat(now)
    names = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    told = [f"{name} was {_shown(old.get(name))}, is {_shown(new.get(name))}" for name in names[:_SHOWN]]
    return "; ".join(told) + (f"; and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _flat(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{path}{name}.") if isinstance(value, Mapping) else {f"{path}{name}": value}
    return flat


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 24 else text[:12] + "…" + text[-1]


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """Sorts ``layers.2`` before ``layers.10``."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in path.stem.split(".")]
