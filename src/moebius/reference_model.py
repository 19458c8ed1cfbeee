"""Where the embedded reference model is: the model of every command that is not given one."""

from __future__ import annotations

from pathlib import Path

from moebius.errors import ModelNotFoundError


def reference_path() -> Path:
    """The folder of the reference model (config, weights, tokenizer) inside this package.

    Raises:
        ModelNotFoundError: the installation has none.
    """
    folder = Path(__file__).parent / "reference"
    if not (folder / "config.json").exists():
        raise ModelNotFoundError(
            "this installation has no embedded reference model; name a model, or train one with scripts/train_reference.py"
        )
    return folder
