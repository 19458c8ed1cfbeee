"""What is refused before any work: outputs that are taken, devices that are not there, numbers that are none."""

from __future__ import annotations

import math
from pathlib import Path

from moebius.errors import OutputError, RecipeError

#: As far as PyTorch's generators and numpy's agree on.
LARGEST_SEED = 2**63 - 1


def require_free(out: Path) -> Path:
    """The output folder, a home directory written as ``~`` found, refused before any work if something is in it.

    Raises:
        OutputError: it is a file, or a folder that is not empty.
    """
    out = out.expanduser()
    if out.is_dir() and any(out.iterdir()):
        raise OutputError(f"{out}: this folder is not empty; remove it or choose another")
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: this is a file, wanted a folder; choose another")
    return out


def require_device(device: str) -> str:
    """The device, refused if torch cannot use it.

    Raises:
        RecipeError: no such device here.
    """
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise RecipeError(f"device {device}: torch cannot use it here; wanted cpu, or cuda where there is one") from None
    return device


def require_temperature(temperature: float) -> None:
    """Refuse what is no number.

    Raises:
        RecipeError: NaN, which every comparison lets through.
    """
    if math.isnan(temperature):
        raise RecipeError(f"temperature {temperature}: wanted 0 or more")
