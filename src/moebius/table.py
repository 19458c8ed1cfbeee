"""Names to objects: the one way in which methods, formats and data sets are looked up by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
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

    def __init__(self, kind: str, targets: Mapping[str, str]) -> None:
        self.kind = kind
        self._targets: dict[str, Any] = dict(targets)

    def register(self, name: str, target: Any) -> None:
        """Add an object under a name.

        Args:
            name: without spaces, ``@`` and ``=``, which mean something in recipes; not taken yet.
            target: the object, or ``"module:attribute"`` to import it on first use.

        Raises:
            UnknownNameError: a name that is taken by another object, or that cannot be given on a command line.
        """
        if not name or set(name) & set(" @=\t\n"):
            raise UnknownNameError(f"{self.kind} {name!r}: wanted a name without spaces, @ and =")
        if self._targets.get(name, target) != target:
            raise UnknownNameError(f"{self.kind} {name!r}: there is one of that name already; choose another")
        self._targets[name] = target

    def unregister(self, name: str) -> None:
        """Take out what :meth:`register` added; a name that is not there is no error."""
        self._targets.pop(name, None)

    def __getitem__(self, name: str) -> Any:
        if name not in self._targets:
            raise UnknownNameError(f"no {self.kind} named {name!r}; known: {', '.join(self)}{nearest(name, self)}")
        target = self._targets[name]
        if not isinstance(target, str):
            return target
        module, _, attribute = target.partition(":")
        return getattr(import_module(module), attribute)

    def __contains__(self, name: object) -> bool:
        return name in self._targets  # without importing it

    def __iter__(self) -> Iterator[str]:
        return iter(self._targets)

    def __len__(self) -> int:
        return len(self._targets)


def nearest(name: str, known: Iterable[str]) -> str:
    """A question that can be appended to a message: whether a similar name was meant."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


#: The methods. A new one is a file in ``methods/`` and a line here, or a call of ``METHODS.register`` from anywhere.
METHODS = Table(
    "method",
    {
        "moebius": "moebius.methods.moebius:METHOD",
        "mobie": "moebius.methods.mobie:METHOD",
        "rtn": "moebius.methods.rtn:METHOD",
        "gptq": "moebius.methods.gptq:METHOD",
        "awq": "moebius.methods.awq:METHOD",
        "moequant": "moebius.methods.moequant:METHOD",
        "mxmoe": "moebius.methods.mxmoe:METHOD",
        "gptvq": "moebius.methods.kbvq:GPTVQ",
        "vptq": "moebius.methods.vptq:METHOD",
        "nowag": "moebius.methods.nowag:METHOD",
        "kbvq": "moebius.methods.kbvq:METHOD",
        "bitsmoe": "moebius.methods.bitsmoe:METHOD",
        "billm": "moebius.methods.billm:METHOD",
        "arb": "moebius.methods.arb:METHOD",
    },
)
