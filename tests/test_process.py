"""Work in another process: what it returns, what it says, and how it ends."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from moebius.errors import CheckpointError, ResourceError
from moebius.process import in_process
from moebius.progress import Progress, Silent


class Heard:
    def __init__(self) -> None:
        self.said: list[tuple[Any, ...]] = []

    def stage(self, name: str, total: int) -> None:
        self.said.append((name, total))

    def advance(self, detail: str = "") -> None:
        self.said.append((detail,))

    def finish(self) -> None: ...


def another_process(parent: int, progress: Progress) -> bool:
    progress.stage("thinking", 1)
    progress.advance("done")
    return os.getpid() != parent


def refuse(progress: Progress) -> None:
    raise CheckpointError("layer.codes: missing")


def divide(progress: Progress) -> float:
    return 1 / len("")


def die(progress: Progress) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_of_its_own() -> None:
    heard = Heard()
    assert in_process(another_process, os.getpid(), progress=heard) is True
    assert heard.said == [("thinking", 1), ("done",)]


def test_errors_come_through() -> None:
    with pytest.raises(CheckpointError, match=r"^layer\.codes: missing$"):
        in_process(refuse, progress=Silent())
    with pytest.raises(RuntimeError, match="ZeroDivisionError") as error:
        in_process(divide, progress=Silent())
    assert "in divide" in error.value.__notes__[0]


def test_a_process_that_was_killed() -> None:
    with pytest.raises(ResourceError, match="exit code -9 before it was done; memory ran out, most likely"):
        in_process(die, progress=Silent())
