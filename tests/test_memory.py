"""What becomes of memory that was freed."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_FAULTS = """
import resource
import torch
from moebius.memory import keep_freed_memory
{before}
def come_and_go():  # 16 and 48 MB
    for _ in range(16):
        torch.ones(4_000_000)
        torch.ones(12_000_000)
come_and_go()  # the memory finds its place
begin = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
come_and_go()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begin)
"""


def faults(before: str) -> int:
    """Pages that the system had to clear for tensors that came and went."""
    code = _FAULTS.format(before=before)
    return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_freed_memory_is_used_again() -> None:
    assert 4 * faults("keep_freed_memory()") < faults("")
