"""Every way to open a packed checkpoint, and how each of them ends: well, in one line of a Moebius error, or in a fault."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import moebius  # noqa: F401 - registers the quantizer
from moebius.cli.app import app
from moebius.errors import MoebiusError


class FaultError(AssertionError):
    """A way that ended in something other than an answer or a Moebius error."""


@torch.inference_mode()
def logits(folder: Path) -> Tensor:
    """What a checkpoint makes of four tokens."""
    found: Tensor = AutoModelForCausalLM.from_pretrained(folder)(torch.arange(4).view(1, -1)).logits
    return found


def from_pretrained(folder: Path) -> str:
    """Load and run; the error's message, or an empty text."""
    try:
        logits(folder)
    except MoebiusError as error:
        return _one_line("from_pretrained", str(error))
    except Exception as error:
        raise FaultError(f"from_pretrained: {type(error).__name__}: {' '.join(str(error).split())[:160]}") from error
    return ""


def _command(*arguments: str) -> Callable[[Path], str]:
    name, *options = arguments

    def run(folder: Path) -> str:
        result = CliRunner().invoke(app, [name, str(folder), *options], input="a\n")
        if result.exit_code == 0:
            return ""
        if result.exit_code != 2:
            raise FaultError(
                f"{' '.join(arguments)}: exit {result.exit_code}: {result.stderr[-200:].strip() or result.exception}"
            )
        return _one_line(name, result.stderr.removesuffix("\n").rpartition("error: ")[2])

    return run


def _one_line(way: str, message: str) -> str:
    if not message or "\n" in message:
        raise FaultError(f"{way}: wanted one line, got {message[:200]!r}")
    return message


_TEXT = str(Path(__file__).parents[1] / "constraints.txt")
#: Name to a function of the folder: it returns the message of the refusal, or an empty text where all went well.
#:
#: Raises:
#:     FaultError: neither.
WAYS: dict[str, Callable[[Path], str]] = {
    "from_pretrained": from_pretrained,
    "info": _command("info"),
    "verify": _command("info", "--verify"),
    "evaluate": _command("evaluate", "--text", _TEXT, "--windows", "1", "--window-length", "4", "--quiet"),
    "chat": _command("chat", "--tokens", "1"),
    "generate": _command("generate", "--prompt", "a", "--tokens", "1", "--quiet"),
}
#: Ways to look at an original, which refuse every packed checkpoint; they take what they read from the same files.
OTHER_WAYS: dict[str, Callable[[Path], str]] = {
    "plan": _command("plan"),
    "quantize": _command("quantize", "--out", os.devnull + "/x", "--quiet"),
}
