"""Source checkpoints: found, checked before use, and read tensor by tensor."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebius.checkpoint.dequantized import DequantizedTensor, SourceTensor, dequantized
from moebius.checkpoint.quantized import quantizations, refuse_codes, without_quantization
from moebius.checkpoint.shards import DTYPES, leftovers, read_folder, weight_files
from moebius.errors import CheckpointError, ModelNotFoundError, first_line
from moebius.json_file import read_config as read_model_config
from moebius.progress import Progress, Silent
from moebius.source import path_or_hub_name

# Everything of a hub repository that a checkpoint is made of; not its copies in other formats.
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "LICENSE*"]
_FINITE_CHUNK = 1 << 24


@dataclass(frozen=True)
class SourceCheckpoint:
    """A complete checkpoint on disk. Get it from :meth:`open`.

    Attributes:
        folder: where it is.
        config: its ``config.json``.
        tensors: what its files hold, by checkpoint name, in the order of the names; what is quantized as the weights that it
            stands for.
        stamps: size and time of change of its config and weights when it was opened.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, SourceTensor]
    stamps: dict[Path, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def open(cls, source: str | Path) -> SourceCheckpoint:
        """Find a checkpoint and check that it is complete, from the headers of its files alone.

        Args:
            source: a local folder, or a name on the Hugging Face hub, which is downloaded.

        Raises:
            ModelNotFoundError: nothing there.
            CheckpointError: a shard that is missing, truncated, unreadable or not what the index says.
            UnsupportedModelError: a checkpoint that is quantized in a way that Moebius does not read.
        """
        folder = locate(source)
        config = read_config(folder)
        stored = read_folder(folder, config)
        named = str(config.get("dtype") or config.get("torch_dtype"))
        tensors = dict(sorted(dequantized(stored, getattr(torch, named, None)).items()))
        refuse_codes(tensors, source)
        _say_leftovers(folder, leftovers(weight_files(folder, config)[1], stored))
        if (methods := {method for _, method in quantizations(config)}) and not _kinds(tensors):
            _say(
                f"{folder}: config.json says {', '.join(sorted(methods))}, but the weights are not quantized: there is nothing "
                "to dequantize, they are read as they are"
            )
        files = {folder / "config.json", *(tensor.file for tensor in stored.values())}
        return cls(folder, config, tensors, {file: _stamp(file) for file in sorted(files)})

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights as they are stored, whatever the config says: that of most bytes."""
        taken: Counter[str] = Counter()
        for tensor in self.tensors.values():
            if DTYPES[tensor.dtype].is_floating_point:
                taken[tensor.dtype] += tensor.end - tensor.begin
        return DTYPES[max(taken, key=lambda dtype: (taken[dtype], dtype))] if taken else torch.float32

    def packed_config(self, quantization_config: dict[str, Any]) -> dict[str, Any]:
        """``config.json`` of what is packed from this checkpoint.

        Its dtype is that of the stored weights where the config has none, or float16, which does not hold what bfloat16 holds.
        Code of the checkpoint's own is not named any more: what was packed are the modules of transformers' class.
        """
        config = {**without_quantization(self.config), "quantization_config": quantization_config}
        named = config.get("dtype") or config.get("torch_dtype")
        if named is None or (named == "float16" and self.dtype != torch.float16):
            config.pop("torch_dtype", None)
            config["dtype"] = str(self.dtype).removeprefix("torch.")
        if isinstance(code := config.pop("auto_map", None), dict):
            others = {name: place for name, place in code.items() if not name.startswith(("AutoModel", "AutoConfig"))}
            if others:
                config["auto_map"] = others
        return config

    @property
    def files(self) -> tuple[Path, ...]:
        """The safetensors files."""
        return tuple(sorted(file for file in self.stamps if file.suffix == ".safetensors"))

    def dequantized_from(self) -> dict[str, int]:
        """How many weights were quantized in the files, by what they are stored as."""
        return dict(sorted(_kinds(self.tensors).items()))

    def names(self) -> list[str]:
        """Checkpoint names of all tensors, sorted."""
        return list(self.tensors)

    def load(self, name: str) -> Tensor:
        """One tensor, read into memory of its own."""
        return self.tensors[name].load()

    def fingerprint(self) -> str:
        """Hash of the config and of every byte of the files: what a resumed run compares."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for path in self.files:
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while chunk := file.read(1 << 24):
                    digest.update(chunk)
        return digest.hexdigest()

    def check_unchanged(self) -> None:
        """Refuse a checkpoint that somebody wrote to since it was opened.

        Raises:
            CheckpointError: naming the file.
        """
        for file, stamp in self.stamps.items():
            if not file.exists() or _stamp(file) != stamp:
                raise CheckpointError(f"{file}: was changed while it was read; nothing was written, run again")

    def check_finite(
        self, names: Collection[str], progress: Progress | None = None, infinite: Collection[str] = frozenset()
    ) -> None:
        """Refuse NaN and Inf, one tensor in memory at a time.

        Args:
            names: what to look at.
            progress: told about every tensor.
            infinite: those that may hold Inf (a mask, a bound), because they are copied and not computed with here.

        Raises:
            CheckpointError: naming the tensor and how many of its values are not finite.
        """
        progress = progress or Silent()
        progress.stage("checking weights", len(names))
        for name in names:
            tensor = self.load(name)
            if tensor.is_floating_point():
                bad = 0
                for piece in tensor.view(-1).split(_FINITE_CHUNK):
                    bad += int(piece.isnan().sum() if name in infinite else (~piece.isfinite()).sum())
                if bad:
                    raise CheckpointError(
                        f"{self.tensors[name].file}: {name} holds {bad} values that are NaN or Inf; it cannot be quantized"
                    )
            progress.advance(name)


def _kinds(tensors: Mapping[str, SourceTensor]) -> Counter[str]:
    return Counter(tensor.kind for tensor in tensors.values() if isinstance(tensor, DequantizedTensor))


def _stamp(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def locate(source: str | Path) -> Path:
    """The folder of a checkpoint, packed or not; fetched from the hub where ``source`` is a name there.

    Raises:
        ModelNotFoundError: nothing there.
    """
    found = path_or_hub_name(source)
    if isinstance(found, Path):
        if not found.is_dir():
            raise ModelNotFoundError(f"{source}: is a file; give a checkpoint's folder")
        return found
    from huggingface_hub import snapshot_download  # slow to import, and seldom needed

    try:
        return Path(snapshot_download(found, allow_patterns=_HUB_PATTERNS))
    except Exception as error:  # the hub client, its HTTP library and the file system raise a dozen classes for "not there"
        raise ModelNotFoundError(f"{source}: no such folder, and the hub did not give it ({first_line(error)})") from None


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a checkpoint.

    Raises:
        ModelNotFoundError: there is none.
        CheckpointError: it cannot be read.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelNotFoundError(f"{folder}: no config.json in this folder; is it a transformers checkpoint?")
    return read_model_config(path)


@cache
def _say(message: str) -> None:
    """Once per process: several commands open a checkpoint more than once."""
    logging.getLogger("moebius").warning(message)


def _say_leftovers(folder: Path, names: list[str]) -> None:
    if names:
        _say(f"{folder}: the index names {len(names)} tensors that no file holds, such as {names[0]}; they are ignored")
