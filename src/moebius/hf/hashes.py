"""Whether the bytes of a packed checkpoint are compared with its hashes while it is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from moebius.errors import CheckpointError

#: Environment variable: 1 compares every tensor with its hash before it is loaded, 0 does not, whoever loads.
HASHES = "MOEBIUS_HASHES"

_UNSAID: ContextVar[str] = ContextVar("hashes where the environment says nothing", default="0")


@contextmanager
def hashes_unless_unwanted() -> Iterator[None]:
    """Within the context: hashes are compared where the environment does not say otherwise, as the command line does."""
    token = _UNSAID.set("1")
    try:
        yield
    finally:
        _UNSAID.reset(token)


def hashes_wanted() -> bool:
    """What the environment says; without a word, no, but within :func:`hashes_unless_unwanted`.

    Raises:
        CheckpointError: neither 0 nor 1.
    """
    value = os.environ.get(HASHES, _UNSAID.get())
    if value not in ("0", "1"):
        raise CheckpointError(f"{HASHES}: got {value!r}, wanted 1 (compare every tensor with its hash) or 0")
    return value == "1"
