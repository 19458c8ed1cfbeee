"""Whether the bytes of a packed checkpoint are compared with its hashes while it is loaded."""

from __future__ import annotations

import os

from moebius.errors import CheckpointError

#: Environment variable: 1 compares every tensor with its hash before it is loaded. The command line sets it where it is unset.
HASHES = "MOEBIUS_HASHES"


def hashes_wanted() -> bool:
    """What the environment says; without a word, no.

    Raises:
        CheckpointError: neither 0 nor 1.
    """
    value = os.environ.get(HASHES, "0")
    if value not in ("0", "1"):
        raise CheckpointError(f"{HASHES}: got {value!r}, wanted 1 (compare every tensor with its hash) or 0")
    return value == "1"
