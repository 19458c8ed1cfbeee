"""The peak memory of a piece of work."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path


class PeakMemory:
    """Most resident memory of this process since the object was made, weights and libraries included.

    Linux starts the count afresh when it is told to; where it cannot be told, the peak is that of the process so far.
    """

    def __init__(self) -> None:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def bytes(self) -> int:
        """The peak so far."""
        with contextlib.suppress(OSError, StopIteration):
            lines = Path("/proc/self/status").read_text().splitlines()
            return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
