"""How long work reports how far it is, without knowing who listens."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives stages of work and their steps."""

    def stage(self, name: str, total: int) -> None:
        """A stage of ``total`` steps begins; the stage before it, if any, is done."""

    def advance(self, detail: str = "") -> None:
        """One step of the current stage is done; ``detail`` says which, such as a layer's name."""

    def finish(self) -> None:
        """All stages are done."""


class Silent:
    """A listener that does nothing."""

    def stage(self, name: str, total: int) -> None: ...

    def advance(self, detail: str = "") -> None: ...

    def finish(self) -> None: ...


class Titled:
    """Puts a title before the name of every stage, and passes it on."""

    def __init__(self, progress: Progress, title: str) -> None:
        self._progress, self._title = progress, title

    def stage(self, name: str, total: int) -> None:
        self._progress.stage(f"{self._title}: {name}", total)

    def advance(self, detail: str = "") -> None:
        self._progress.advance(detail)

    def finish(self) -> None:
        self._progress.finish()
