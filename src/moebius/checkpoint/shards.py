"""safetensors files byte by byte: headers that are checked before anything is read, tensors streamed from file to file.

A file is eight bytes with the length of the header, the header (JSON: name to dtype, shape and byte range), and the bytes
of the tensors without gaps.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from torch import Tensor

from moebius.errors import CheckpointError
from moebius.json_file import field, parse_object, read_object

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
INDEX_ENDING = ".safetensors.index.json"

#: What scales are called that belong to a weight of the same name without the ending.
SCALES = ("_scale_inv", "_scale", ".SCB")

_CACHE_LINE = 64
#: What safetensors calls the dtypes.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
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


#: What the parameters are called that a guard may stand for.
_GUARDED_NAMES = {"gate_up_proj", "up_proj", "down_proj", "weight"}


def is_guard(name: str, shape: Sequence[int], dtype: str) -> bool:
    """Whether a tensor is a guard. Parts of a packed layer without planes hold nothing either: they have other names."""
    return tuple(shape) == (0,) and dtype == "U8" and name.rpartition(".")[2] in _GUARDED_NAMES


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

    @property
    def stored_bytes(self) -> int:
        """Bytes in the file."""
        return self.end - self.begin

    @property
    def is_guard(self) -> bool:
        """Whether it holds nothing and only keeps its name taken, see :mod:`moebius.checkpoint.guards`."""
        return is_guard(self.name, self.shape, self.dtype)

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

    def rows(self, rows: Tensor) -> Tensor:
        """Some rows of a matrix (rows,) int64, read into memory of their own. (rows, width)"""
        width = self.shape[1] * DTYPES[self.dtype].itemsize
        stored = np.memmap(self.file, np.uint8, "r", self.begin, (self.shape[0], width))
        return torch.from_numpy(np.asarray(stored[rows.numpy()])).view(DTYPES[self.dtype])

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
        header = parse_object(file.read(start - 8), str(path))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = _sizes(entry["data_offsets"])
                shape = _sizes(entry["shape"])
                tensors[name] = StoredTensor(name, str(entry["dtype"]), shape, path, start + begin, start + end)
    except (CheckpointError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path}: its header cannot be read; the file is damaged, fetch it again") from None
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise CheckpointError(f"{path}: {name} has dtype {tensor.dtype}; wanted one of {', '.join(DTYPES)}")
        if tensor.end - tensor.begin != byte_count(tensor.dtype, tensor.shape):
            raise CheckpointError(f"{path}: {name} takes {tensor.end - tensor.begin} bytes, its shape {tensor.shape} does not")
    _check_no_gaps(path, start, tensors.values())
    wanted = max((tensor.end for tensor in tensors.values()), default=start)
    if size != wanted:
        what = "the file is truncated" if size < wanted else "something was appended to it"
        raise CheckpointError(f"{path}: got {size} bytes, wanted {wanted} as its header says; {what}, fetch it again")
    return tensors


def _sizes(values: Any) -> tuple[int, ...]:
    """Whole numbers that a file can have; not booleans, not fractions."""
    sizes = tuple(values)
    if not all(type(size) is int and 0 <= size < 1 << 63 for size in sizes):
        raise ValueError(f"got {sizes}, wanted sizes")
    return sizes


def _check_no_gaps(path: Path, start: int, tensors: Iterable[StoredTensor]) -> None:
    """Two tensors over the same bytes, or bytes of no tensor: safetensors refuses them as well."""
    end = start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.begin, tensor.end)):
        if tensor.begin != end and tensor.begin != tensor.end:
            what = "overlaps another tensor" if tensor.begin < end else f"leaves {tensor.begin - end} bytes to no tensor"
            raise CheckpointError(f"{path}: {tensor.name} {what}; the file is damaged, fetch it again")
        end = max(end, tensor.end)


def weight_files(folder: Path, config: Mapping[str, Any] | None = None) -> tuple[list[Path], dict[str, str]]:
    """The files that transformers loads from a folder: its one file, else the shards that the index names.

    An index beside ``model.safetensors`` is left over from another model; transformers does not look at it, and neither is it
    looked at here.

    Of the names in the index, transformers looks at the shards only.

    Args:
        folder: the checkpoint.
        config: its ``config.json``, which may name the file or the index (``transformers_weights``).

    Returns:
        The files, and for an index the file of every name in it.

    Raises:
        CheckpointError: no weights, an index that cannot be read, or a shard that is missing or outside the folder.
    """
    named = (config or {}).get("transformers_weights")
    if named is not None and (not isinstance(named, str) or not named.endswith((".safetensors", INDEX_ENDING))):
        raise CheckpointError(f"{folder}: config.json names the weights {named!r}; wanted a safetensors file or its index")
    if named is not None and not (_inside(folder, named) and (folder / named).is_file()):
        raise CheckpointError(f"{folder}: config.json names the weights {named!r}, which are not in this folder")
    single, index = folder / (named or SINGLE_NAME), folder / (named or INDEX_NAME)
    if not single.name.endswith(INDEX_ENDING) and single.is_file():
        return [single], {}
    if not index.is_file():
        if any(folder.glob("*.safetensors")):
            raise CheckpointError(f"{folder}: got shards but no {INDEX_NAME}; fetch the checkpoint again")
        if any(folder.glob("*.bin")):
            raise CheckpointError(f"{folder}: got .bin weights, wanted safetensors; load and save it with transformers")
        raise CheckpointError(f"{folder}: holds no weights; wanted {SINGLE_NAME} or {INDEX_NAME}")
    weight_map = field(read_object(index), "weight_map", dict, index)
    files = set(weight_map.values()) if all(isinstance(file, str) for file in weight_map.values()) else {""}
    for file in sorted(files):
        if not file.endswith(".safetensors") or not _inside(folder, file):
            raise CheckpointError(f"{index}: names the shard {file!r}; wanted safetensors files in the same folder")
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder}: shard {file} is missing, which {index.name} names; fetch it again")
    return [folder / file for file in sorted(files)], weight_map


def _inside(folder: Path, name: str) -> bool:
    """Whether a name is that of something in the folder, however it is spelled; links count as what they are called."""
    try:
        path = os.path.normpath(folder / name)
    except ValueError:  # a null character
        return False
    return Path(path).is_relative_to(os.path.normpath(folder)) and "\0" not in name


def read_folder(folder: Path, config: Mapping[str, Any] | None = None, *, guards: bool = False) -> dict[str, StoredTensor]:
    """Every tensor of the files that transformers loads, see :func:`weight_files`.

    Args:
        folder: the checkpoint.
        config: its ``config.json``, which may name other files.
        guards: also those that hold nothing and only keep their names taken, see :mod:`moebius.checkpoint.guards`.

    Raises:
        CheckpointError: no weights, a shard that is missing or damaged, a tensor in two shards, or one that the index names and
            no shard holds.
    """
    files, weight_map = weight_files(folder, config)
    tensors = read_files(files)
    for name in sorted(weight_map.keys() - tensors.keys() - set(leftovers(weight_map, tensors))):
        file = folder / weight_map[name]
        raise CheckpointError(f"{file}: {name} is not in it, though {INDEX_NAME} says so; fetch it again")
    return {name: tensor for name, tensor in tensors.items() if guards or not tensor.is_guard}


def leftovers(weight_map: Iterable[str], tensors: Mapping[str, StoredTensor]) -> list[str]:
    """Scales that an index still names, of weights that are in the files: they went when the weights were dequantized."""
    bases = ((name, name.removesuffix(ending)) for name in weight_map for ending in SCALES if name.endswith(ending))
    return sorted({name for name, base in bases if name not in tensors and (base in tensors or f"{base}.weight" in tensors)})


def read_files(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Every tensor of some safetensors files.

    Raises:
        CheckpointError: a file that is missing or damaged, or a tensor in two of them.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in files:
        shard = read_shard(path)
        if twice := shard.keys() & tensors.keys():
            name = min(twice)
            raise CheckpointError(
                f"{path.parent}: {name} is both in {tensors[name].file.name} and in {path.name}; wanted it once"
            )
        tensors |= shard
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
