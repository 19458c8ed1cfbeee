"""Work in a process of its own, so that what it takes of memory is its own, and all of it is given back."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from moebius.errors import MoebiusError, ResourceError
from moebius.memory import keep_freed_memory
from moebius.progress import Progress


def in_process(work: Callable[..., Any], *arguments: Any, progress: Progress) -> Any:
    """What ``work(*arguments, progress)`` returns in a fresh process.

    Args:
        work: a function of a module.
        arguments: what can be pickled.
        progress: told here what the process is told there.

    Raises:
        MoebiusError: those of ``work``.
        ResourceError: the process was ended from outside, as systems do when memory runs out.
        RuntimeError: any other error of ``work``, its traceback as a note.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(theirs, work, arguments))
    process.start()
    theirs.close()
    try:
        while True:
            kind, *values = ours.recv()
            if kind == "result":
                return values[0]
            if kind == "error":
                raise values[0]
            getattr(progress, kind)(*values)
    except EOFError:
        process.join()
        raise ResourceError(
            f"the process that measured ended with exit code {process.exitcode} before it was done;"
            f" {'memory ran out, most likely: ' if process.exitcode == -9 else ''}try fewer tokens, a smaller batch or model"
        ) from None
    finally:
        process.terminate()  # it is done, or we were interrupted
        process.join()
        ours.close()


class _Sender:
    """A :class:`moebius.progress.Progress` on the other side of a pipe."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe

    def stage(self, name: str, total: int) -> None:
        self.pipe.send(("stage", name, total))

    def advance(self, detail: str = "") -> None:
        self.pipe.send(("advance", detail))

    def finish(self) -> None:
        self.pipe.send(("finish",))


def _run(pipe: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    keep_freed_memory()
    try:
        pipe.send(("result", work(*arguments, _Sender(pipe))))
    except KeyboardInterrupt:
        pass  # the process that waits was interrupted as well, and says so
    except MoebiusError as error:
        pipe.send(("error", error))
    except Exception as error:
        plain = RuntimeError(f"{type(error).__name__}: {error}")
        plain.add_note(traceback.format_exc())
        pipe.send(("error", plain))
