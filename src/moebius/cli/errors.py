"""What the user sees when something goes wrong: one line and an exit code."""

from __future__ import annotations

import functools
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from moebius.errors import MoebiusError, ResourceError, want_of_memory

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
TERMINATED = 143  # 128 + SIGTERM
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
            with _terminated():
                command(*args, **kwargs)
        except ResourceError as error:
            _say(str(error), error.exit_code)
        except MoebiusError as error:
            _say(_no_memory(command, resumes) if want_of_memory(error) else str(error), error.exit_code)
        except KeyboardInterrupt as signal_:
            kept = "; finished layers are kept, and the same command resumes" if resumes else ""
            ended = isinstance(signal_, Terminated)
            _say(f"{'ended' if ended else 'interrupted'}{kept}", TERMINATED if ended else INTERRUPTED)
        except BrokenPipeError:  # `moebius info | head`: typer ends quietly
            raise
        except Exception as error:
            if want_of_memory(error) and not _tracebacks:
                _say(_no_memory(command, resumes), ResourceError.exit_code)
            if _tracebacks or type(error).__module__.startswith(("typer", "click")):
                raise
            where = _where(error)
            _say(f"{type(error).__name__} at {where}: {error}; set MOEBIUS_DEBUG=1 for the traceback", 1)

    return run


class Terminated(KeyboardInterrupt):
    """SIGTERM, which is to leave as little behind as Ctrl-C does."""


@contextmanager
def _terminated() -> Iterator[None]:
    """Within the context, SIGTERM raises :class:`Terminated`; outside of the main thread it does what it did."""

    def stop(*_: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


def _no_memory(command: Callable[..., None], resumes: bool) -> str:
    hint = "ask for fewer or shorter windows" if resumes else "free some memory, or ask for less at once"
    kept = "; finished layers are kept, and the same command resumes" if resumes else ""
    return f"{command.__name__}: out of memory; moebius plan says how much a recipe takes, {hint}{kept}"


def _say(message: str, exit_code: int) -> None:
    typer.echo("error: " + " ".join(message.split()), err=True)
    raise typer.Exit(exit_code)


def _where(error: Exception) -> str:
    """The innermost line of this package that the error passed through, such as ``moebius/cli/info.py:31``."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(_PACKAGE)]
    frame = own[-1]
    return f"{Path(frame.filename).relative_to(_PACKAGE.parent)}:{frame.lineno}"
