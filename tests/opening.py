"""Every way to open a packed checkpoint, and how each of them ends: well, in one line of a Moebius error, or in a fault."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import moebius  # noqa: F401 - registers the quantizer
from moebius.cli.app import app
from moebius.errors import MoebiusError


class FaultError(AssertionError):
    """A way that ended in something other than an answer or a Moebius error."""


def from_pretrained(folder: Path) -> str:
    """Load and run four tokens; the error's message, or an empty text."""
    try:
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.inference_mode():
            model(torch.arange(4).view(1, -1))
    except MoebiusError as error:
        return _one_line("from_pretrained", str(error))
    except Exception as error:
        raise FaultError(f"from_pretrained: {type(error).__name__}: {' '.join(str(error).split())[:160]}") from error
    return ""


def _command(*arguments: str) -> Callable[[Path], str]:
    name, *options = arguments

    def run(folder: Path) -> str:
        result = CliRunner().invoke(app, [name, str(folder), *options])
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


#: Name to a function of the folder: it returns the message of the refusal, or an empty text where all went well.
#:
#: Raises:
#:     FaultError: neither.
WAYS: dict[str, Callable[[Path], str]] = {
    "from_pretrained": from_pretrained,
    "info": _command("info"),
    "verify": _command("info", "--verify"),
    "generate": _command("generate", "--prompt", "a", "--tokens", "1", "--quiet"),
}
