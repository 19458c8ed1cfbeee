"""Entry point of ``moebius`` and of ``python -m moebius.cli``."""

from __future__ import annotations

import io
import os
import sys

from moebius.cli.app import app
from moebius.memory import keep_freed_memory


def main() -> None:
    """Run the command line."""
    keep_freed_memory()
    write_to_any_terminal()
    app(prog_name="moebius")


def write_to_any_terminal() -> None:
    """Characters that an output does not know become question marks, and what nobody reads goes nowhere: neither is a reason
    to lose finished work.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115  lives as long as the process
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


if __name__ == "__main__":
    main()
