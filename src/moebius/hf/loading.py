"""Models and tokenizers from the name of a checkpoint, packed or not, its files checked first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

import moebius  # noqa: F401  registers packed checkpoints with transformers
from moebius.checkpoint.manifest import is_packed
from moebius.checkpoint.quantized import refuse_quantized_config
from moebius.checkpoint.reader import SourceCheckpoint, locate
from moebius.checkpoint.shards import read_folder
from moebius.errors import CheckpointError, MoebiusError
from moebius.hf.hashes import hashes_unless_unwanted
from moebius.memory import require_memory
from moebius.models.load import why_not_loaded

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(source: str | Path, dtype: str = "float32", device: str = "cpu") -> PreTrainedModel:
    """A causal language model in evaluation mode, its files checked first, also by their hashes unless ``MOEBIUS_HASHES=0``.

    Args:
        source: folder or hub name.
        dtype: a key of :data:`DTYPES`; ``auto`` is the checkpoint's own.
        device: where it goes.

    Raises:
        MoebiusError: no such model, or a checkpoint that is damaged.
    """
    folder = checkpoint_folder(source)
    require_memory(_bytes_in_memory(folder, dtype), f"{source} in {dtype if dtype != 'auto' else 'its own dtype'}")
    with hashes_unless_unwanted():
        model: PreTrainedModel = _loaded(AutoModelForCausalLM, source, folder, dtype=DTYPES[dtype])
    return model.eval().to(device)


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint.

    Raises:
        MoebiusError: no such model, or no tokenizer in it.
    """
    tokenizer: PreTrainedTokenizerBase = _loaded(_TriedTokenizer, source, checkpoint_folder(source))
    return tokenizer


class _TriedTokenizer:
    """A tokenizer that has read a text: some files are only found to be wrong by then."""

    @staticmethod
    def from_pretrained(folder: Path) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer("a")
        return tokenizer


def checkpoint_folder(source: str | Path) -> Path:
    """The folder of a checkpoint, fetched from the hub where it is a name, its files complete.

    Raises:
        MoebiusError: no such model, or a checkpoint that is damaged.
    """
    folder = locate(source)
    # A packed checkpoint is checked against its manifest by what loads it.
    if not is_packed(folder):
        refuse_quantized_config(SourceCheckpoint.open(folder).config, source)  # transformers would go by the config
    return folder


def _bytes_in_memory(folder: Path, dtype: str) -> int:
    """Of the weights: 16-bit floats become ``dtype``, packed tensors stay what they are."""
    tensors = read_folder(folder).values()
    wide = 2 if dtype == "float32" else 1
    return sum((t.end - t.begin) * (wide if t.dtype in ("F16", "BF16") else 1) for t in tensors)


def quiet_transformers() -> None:
    """No progress bars and warnings of transformers between ours. It concerns the whole process: this is for programs."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _loaded(kind: Any, source: str | Path, folder: Path, **options: Any) -> Any:
    try:
        return kind.from_pretrained(folder, **options)
    except MoebiusError:
        raise
    except Exception as error:  # whatever transformers, tokenizers and safetensors raise for files they cannot read
        raise CheckpointError(f"{source}: transformers cannot load it: {why_not_loaded(error)}") from error
