"""Where the work of a run is until it is complete: hidden, and beside the output or in it."""

from __future__ import annotations

from pathlib import Path


def beside(out: Path) -> Path:
    """``.NAME.partial`` beside an output folder, which it becomes."""
    return out.parent / f".{out.name}.partial"


def inside(out: Path) -> Path:
    """``.partial`` in an output folder that has to stay, such as a mount point."""
    return out / ".partial"


def is_begun(out: Path) -> bool:
    """Whether an earlier run into this output left work behind."""
    out = out.expanduser().resolve()
    return beside(out).exists() or inside(out).exists()
