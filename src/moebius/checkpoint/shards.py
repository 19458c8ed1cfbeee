"""safetensors files byte by byte: headers that are checked before anything is read, tensors streamed from file to file.

A file is eight bytes with the length of the header, the header (JSON: name to dtype, shape and byte range), and the bytes
of the tensors without gaps.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from moebius.errors import CheckpointError

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_CACHE_LINE = 64
#: What safetensors calls the dtypes.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_CHUNK = 1 << 24


class TensorSource(Protocol):
    """A tensor that can be written: where its bytes come from does not matter."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def chunks(self) -> Iterator[Any]:
        """The bytes, in pieces."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        dtype: as safetensors calls it, such as ``"BF16"``.
        begin, end: byte range in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    def chunks(self) -> Iterator[bytes]:
        """The bytes, at most 16 MiB at a time."""
        with self.file.open("rb") as file:
            file.seek(self.begin)
            left = self.end - self.begin
            while left:
                chunk = file.read(min(left, _CHUNK))
                if not chunk:
                    raise CheckpointError(f"{self.file}: ended inside {self.name}; was it changed while it was read?")
                left -= len(chunk)
                yield chunk

    def load(self) -> Tensor:
        """The tensor, read into memory of its own."""
        values = torch.empty(self.shape, dtype=DTYPES[self.dtype])
        if values.numel():
            with self.file.open("rb") as file:
                file.seek(self.begin)
                file.readinto(values.view(-1).view(torch.uint8).numpy().data)
        return values

    def sha256(self) -> str:
        """Hash of the bytes."""
        digest = hashlib.sha256()
        for chunk in self.chunks():
            digest.update(chunk)
        return digest.hexdigest()


@dataclass(frozen=True)
class MemoryTensor:
    """A tensor in memory, ready to be written."""

    name: str
    tensor: Tensor

    @property
    def dtype(self) -> str:
        return DTYPE_NAMES[self.tensor.dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def chunks(self) -> Iterator[memoryview]:
        """All bytes at once."""
        yield self.tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def byte_count(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor."""
    return DTYPES[dtype].itemsize * math.prod(shape)


def read_shard(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, from its header alone.

    Raises:
        CheckpointError: a file that is missing, truncated, longer than its header says, or whose header cannot be read.
    """
    try:
        with path.open("rb") as file:
            return _read_header(path, file)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); fetch the checkpoint again") from None


def _read_header(path: Path, file: BinaryIO) -> dict[str, StoredTensor]:
    size = os.fstat(file.fileno()).st_size
    start = 8 + int.from_bytes(file.read(8), "little")
    if size < 8 or start > size:
        raise CheckpointError(
            f"{path}: got {size} bytes, wanted a header of {start - 8}; truncated or no safetensors file, fetch it again"
        )
    tensors = {}
    try:
        header = json.loads(file.read(start - 8))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                tensors[name] = StoredTensor(name, entry["dtype"], tuple(entry["shape"]), path, start + begin, start + end)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path}: its header cannot be read; the file is damaged, fetch it again") from None
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise CheckpointError(f"{path}: {name} has dtype {tensor.dtype}; wanted one of {', '.join(DTYPES)}")
        if tensor.end - tensor.begin != byte_count(tensor.dtype, tensor.shape):
            raise CheckpointError(f"{path}: {name} takes {tensor.end - tensor.begin} bytes, its shape {tensor.shape} does not")
    wanted = max((tensor.end for tensor in tensors.values()), default=start)
    if size != wanted:
        what = "the file is truncated" if size < wanted else "something was appended to it"
        raise CheckpointError(f"{path}: got {size} bytes, wanted {wanted} as its header says; {what}, fetch it again")
    return tensors


def read_folder(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint: of the shards that its index names, or of its one file.

    Raises:
        CheckpointError: no weights, a shard that is missing or damaged, or an index that does not match its shards.
    """
    index = folder / INDEX_NAME
    if not index.is_file():
        if (folder / SINGLE_NAME).is_file():
            return read_shard(folder / SINGLE_NAME)
        if any(folder.glob("*.safetensors")):
            raise CheckpointError(f"{folder}: got shards but no {INDEX_NAME}; fetch the checkpoint again")
        if any(folder.glob("*.bin")):
            raise CheckpointError(f"{folder}: got .bin weights, wanted safetensors; load and save it with transformers")
        raise CheckpointError(f"{folder}: holds no weights; wanted {SINGLE_NAME} or {INDEX_NAME}")
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{index}: cannot be read; fetch it again") from None
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder}: shard {file} is missing, which {INDEX_NAME} names; fetch it again")
        shard = read_shard(folder / file)
        if twice := shard.keys() & tensors.keys():
            name = min(twice)
            raise CheckpointError(f"{folder}: {name} is both in {tensors[name].file.name} and in {file}; wanted it once")
        tensors |= shard
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            raise CheckpointError(f"{folder / file}: {name} is not in it, though {INDEX_NAME} says so; fetch it again")
    return tensors


def write_shard(path: Path, sources: Sequence[TensorSource]) -> dict[str, dict[str, Any]]:
    """Write a safetensors file: under a temporary name, flushed to disk, renamed. The same tensors give the same bytes.

    Args:
        path: where it is to be. On any error nothing is left there or beside it.
        sources: the tensors, streamed one after the other.

    Returns:
        The manifest's entry of each tensor: file, shape, dtype, sha256.
    """
    # Files are mapped into memory and read as they lie there. Tensors of whole cache lines come first and start on one; then
    # wide dtypes, as safetensors has it, so that every tensor starts at a multiple of its element size.
    ordered = sorted(sources, key=_place)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for source in ordered:
        length = byte_count(source.dtype, source.shape)
        header[source.name] = {"dtype": source.dtype, "shape": list(source.shape), "data_offsets": [offset, offset + length]}
        offset += length
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _CACHE_LINE)
    entries = {}
    with _replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for source in ordered:
            digest = hashlib.sha256()
            for chunk in source.chunks():
                file.write(chunk)
                digest.update(chunk)
            entries[source.name] = {
                "file": path.name,
                "shape": list(source.shape),
                "dtype": source.dtype,
                "sha256": digest.hexdigest(),
            }
    return entries


def _place(source: TensorSource) -> tuple[bool, int, str]:
    return byte_count(source.dtype, source.shape) % _CACHE_LINE != 0, -DTYPES[source.dtype].itemsize, source.name


def write_text(path: Path, text: str) -> None:
    """Write a small file the way :func:`write_shard` writes a large one."""
    with _replacing(path) as file:
        file.write(text.encode())


def header_digest(path: Path) -> str:
    """Hash of all of a safetensors file but its tensors."""
    with path.open("rb") as file:
        length = file.read(8)
        return hashlib.sha256(length + file.read(int.from_bytes(length, "little"))).hexdigest()


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on disk before anything that relies on them is written."""
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A temporary file that becomes ``path`` if all went well and is removed if not."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
