"""The memory of this process: its peak, and what becomes of memory that was freed."""

from __future__ import annotations

import contextlib
import ctypes
import resource
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # what glibc's malloc.h calls them


def keep_freed_memory(most: int = 1 << 26) -> None:
    """From now on, what tensors of up to ``most`` bytes leave behind stays with this process, for the next ones.

    The C library gives large blocks back at once, and the system clears every page of the next one: a tenth of the time of a
    prompt, a seventh of that of quantizing a layer. It concerns the whole process, so this is for programs, not for libraries.
    Does nothing where the C library is not glibc.

    Args:
        most: as much may be held that nobody uses.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, most)
        mallopt(_TRIM_THRESHOLD, most)


#: For :func:`keep_freed_memory` where experts are quantized.
WHILE_QUANTIZING = 1 << 30


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
