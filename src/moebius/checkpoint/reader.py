"""Source checkpoints: found, checked before use, and read tensor by tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from moebius.checkpoint.shards import StoredTensor, read_folder
from moebius.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError
from moebius.progress import Progress, Silent

# Everything of a hub repository that a checkpoint is made of; not its copies in other formats.
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "LICENSE*"]
_FINITE_CHUNK = 1 << 24


@dataclass(frozen=True)
class SourceCheckpoint:
    """A complete checkpoint on disk. Get it from :meth:`open`.

    Attributes:
        folder: where it is.
        config: its ``config.json``.
        tensors: what its files hold, by checkpoint name, in the order of the names.
        stamps: size and time of change of its config and weights when it was opened.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    stamps: dict[Path, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def open(cls, source: str | Path) -> SourceCheckpoint:
        """Find a checkpoint and check that it is complete, from the headers of its files alone.

        Args:
            source: a local folder, or a name on the Hugging Face hub, which is downloaded.

        Raises:
            ModelNotFoundError: nothing there.
            CheckpointError: a shard that is missing, truncated, unreadable or not what the index says.
            UnsupportedModelError: a checkpoint that is quantized already.
        """
        folder = locate(source)
        config = _config(folder)
        if quantization := config.get("quantization_config"):
            method = quantization.get("quant_method", "an unknown method")
            raise UnsupportedModelError(f"{source}: is quantized already ({method}); give the original in 16 or 32 bit")
        tensors = dict(sorted(read_folder(folder).items()))
        files = {folder / "config.json", *(tensor.file for tensor in tensors.values())}
        return cls(folder, config, tensors, {file: _stamp(file) for file in sorted(files)})

    @property
    def files(self) -> tuple[Path, ...]:
        """The safetensors files."""
        return tuple(sorted({tensor.file for tensor in self.tensors.values()}))

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

    def check_finite(self, names: Collection[str], progress: Progress | None = None) -> None:
        """Refuse NaN and Inf, one tensor in memory at a time.

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
                    wide = piece.float() if piece.element_size() == 1 else piece  # float8 has no isfinite
                    bad += int((~wide.isfinite()).sum())
                if bad:
                    raise CheckpointError(
                        f"{self.tensors[name].file}: {name} holds {bad} values that are NaN or Inf; it cannot be quantized"
                    )
            progress.advance(name)


def _stamp(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def locate(source: str | Path) -> Path:
    """The folder of a checkpoint, packed or not; fetched from the hub where ``source`` is a name there.

    Raises:
        ModelNotFoundError: nothing there.
    """
    path, text = Path(source).expanduser(), str(source)
    if path.is_dir():
        return path
    if path.exists():
        raise ModelNotFoundError(f"{source}: is a file; give a checkpoint's folder")
    if isinstance(source, Path) or path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1:
        raise ModelNotFoundError(f"{source}: no such folder; give a checkpoint's folder, or a hub name such as owner/model")
    from huggingface_hub import snapshot_download  # slow to import, and seldom needed

    try:
        return Path(snapshot_download(text, allow_patterns=_HUB_PATTERNS))
    except Exception as error:  # the hub client, its HTTP library and the file system raise a dozen classes for "not there"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelNotFoundError(f"{source}: no such folder, and the hub did not give it ({reason})") from None


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ModelNotFoundError(f"{folder}: no config.json in this folder; is it a transformers checkpoint?")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise CheckpointError(f"{path}: is not JSON; fetch it again") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: is not a JSON object; fetch it again")
    return config
