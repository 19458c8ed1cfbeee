"""The memory of this process: its peak, and what becomes of memory that was freed."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from pathlib import Path

import psutil

from moebius.errors import ResourceError

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # what glibc's malloc.h calls them


def keep_freed_memory(most: int = 1 << 26) -> None:
    """From now on, what tensors of up to ``most`` bytes leave behind stays with this process, for the next ones.

    The C library gives large blocks back at once, and the system clears every page of the next one: a tenth of the time of a
    prompt, a seventh of that of quantizing a layer. It concerns the whole process, so this is for programs, not for libraries.
    Does nothing where the C library is not glibc.

    Args:
        most: as much may be held that nobody uses.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # Windows has no library of this process
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, most)
        mallopt(_TRIM_THRESHOLD, most)


def return_freed_memory() -> None:
    """Give what nobody uses any more back to the system, :func:`keep_freed_memory` or not, so that a peak is not another's."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


_SPARE_BYTES = 1 << 27  # threads, libraries that are still to be loaded, what a pass works with


def require_memory(wanted: int, what: str) -> None:
    """Refuse what a limit on the address space has no room for: some libraries end the process then, without a word.

    Args:
        wanted: bytes that will be held.
        what: for the message, such as ``./model in float32``.

    Raises:
        ResourceError: says how much there is and how much is wanted.
    """
    free = _address_space()
    if free < wanted + _SPARE_BYTES:
        raise ResourceError(
            f"{what}: {free / 1e9:.2f} GB of memory are free, wanted about {(wanted + _SPARE_BYTES) / 1e9:.2f} GB; moebius "
            "plan says what a recipe takes; free some memory, or use a smaller dtype or model"
        )


def _address_space() -> float:
    """What a limit on the address space leaves; without one, everything."""
    try:
        import resource
    except ImportError:
        return float("inf")
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return float("inf") if limit == resource.RLIM_INFINITY else float(limit - psutil.Process().memory_info().vms)


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
        return _peak_of_the_process()


def _peak_of_the_process() -> int:
    """Where there is no /proc: macOS counts bytes, other Unixes kilobytes; Windows has a counter of its own."""
    try:
        import resource
    except ImportError:
        info = psutil.Process().memory_info()
        return int(getattr(info, "peak_wset", info.rss))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
