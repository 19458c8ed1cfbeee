"""Names to objects: the one way in which methods, formats and data sets are looked up by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

from moebius.errors import UnknownNameError


class Table(Mapping[str, Any]):
    """Names to objects, each imported on first use.

    Args:
        kind: what the names stand for, used in messages ("method").
        targets: name to ``"module:attribute"``.

    Raises:
        UnknownNameError: on a name that is not in the table; the message lists those that are.
    """

    def __init__(self, kind: str, targets: dict[str, str]) -> None:
        self.kind, self.targets = kind, targets

    def __getitem__(self, name: str) -> Any:
        if name not in self.targets:
            raise UnknownNameError(f"no {self.kind} named {name!r}; known: {', '.join(self.targets)}")
        module, _, attribute = self.targets[name].partition(":")
        return getattr(import_module(module), attribute)

    def __iter__(self) -> Iterator[str]:
        return iter(self.targets)

    def __len__(self) -> int:
        return len(self.targets)
