"""What the user sees when something goes wrong: one line and an exit code."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from moebius.errors import MoebiusError

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
_PACKAGE = Path(__file__).parent.parent

_tracebacks = False


def show_tracebacks(on: bool) -> None:
    """Whether an unexpected error keeps its traceback."""
    global _tracebacks
    _tracebacks = on


def reported(command: Callable[..., None], resumes: bool) -> Callable[..., None]:
    """The command with its errors turned into one line on stderr and an exit code.

    Args:
        command: the function behind a command.
        resumes: an interrupted run goes on where it was when it is started again.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except MoebiusError as error:
            _say(str(error), error.exit_code)
        except KeyboardInterrupt:
            kept = "; finished layers are kept, and the same command resumes" if resumes else ""
            _say(f"interrupted{kept}", INTERRUPTED)
        except BrokenPipeError:  # `moebius info | head`: typer ends quietly
            raise
        except Exception as error:
            if _tracebacks or type(error).__module__.startswith(("typer", "click")):
                raise
            where = _where(error)
            _say(f"{type(error).__name__} at {where}: {error}; set MOEBIUS_DEBUG=1 for the traceback", 1)

    return run


def _say(message: str, exit_code: int) -> None:
    typer.echo("error: " + " ".join(message.split()), err=True)
    raise typer.Exit(exit_code)


def _where(error: Exception) -> str:
    """The innermost line of this package that the error passed through, such as ``moebius/cli/info.py:31``."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(_PACKAGE)]
    frame = own[-1]
    return f"{Path(frame.filename).relative_to(_PACKAGE.parent)}:{frame.lineno}"
